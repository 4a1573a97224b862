"""Prompts -> context: the text tower of CLIP, read as Stable Diffusion 2 reads it.

A prompt becomes tokens, a token becomes a vector, and a stack of transformer blocks lets each
token look at those before it (CLIP, Radford et al. 2021, §2.4). Stable Diffusion 2 uses OpenCLIP's
ViT-H/14: it runs all blocks but the last, then a layer norm, and keeps every token's vector,
[B, 77, 1024]. The UNet attends to them. Padding is token 0 and counts as any other token.
"""
import math
import warnings
from dataclasses import dataclass
from functools import lru_cache
from importlib.util import find_spec, module_from_spec, spec_from_file_location
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from .tools.vocabulary import known_part, new_words


@dataclass
class TextConfig:
    """The defaults are the tower of OpenCLIP ViT-H/14 as Stable Diffusion 2 uses it."""
    width: int = 1024
    heads: int = 16
    layers: int = 24
    # How many of the last blocks are held, since the released file has them, but not run.
    unused_layers: int = 1
    # Width of CLIP's text_projection, which is loaded and saved with its logit_scale but not used.
    # None: the file has neither.
    output_dim: int | None = 1024
    context_length: int = 77
    # The words that the table of token vectors is cut to. Empty: all of CLIP's vocabulary.
    words: tuple = ()
    # The word that "[v]" in a prompt stands for, if dreambooth.py has taught one.
    identifier: str = ""


@lru_cache(maxsize=1)
def tokenizer():
    """CLIP's byte-pair tokenizer, open_clip's: `.encode(text)` -> a list of token numbers."""
    # Only that file is run. All of open_clip, which has networks and trainings, takes seconds.
    package = find_spec("open_clip")
    if package is None:
        raise ModuleNotFoundError("open_clip is missing: pip install -r requirements.txt")
    folder = Path(package.origin).parent
    spec = spec_from_file_location("open_clip_tokenizer", folder / "tokenizer.py")
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.SimpleTokenizer()


@lru_cache(maxsize=2**16)
def spell(word):
    """The token numbers of one word, a tuple."""
    return tuple(tokenizer().encode(word))


class Block(nn.Module):
    """Causal self-attention and a two-layer network, each with a residual: [B, L, D] -> same."""

    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        self.norm1 = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.norm2 = nn.LayerNorm(width)
        self.feed_in = nn.Linear(width, 4 * width)
        self.feed_out = nn.Linear(4 * width, width)

    def attention(self, x):
        """softmax(q kᵀ / sqrt(d)) v per head, where token i sees the tokens 0..i only."""
        B, L, D = x.shape
        x = x.transpose(0, 1)  # tokens first, so that a CPU rounds to the last bit as OpenCLIP does
        qkv = self.qkv(x).view(L, B, 3, self.heads, D // self.heads)
        q, k, v = qkv.permute(2, 1, 3, 0, 4)  # [B, heads, L, d] each
        seen = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        seen = seen.permute(2, 0, 1, 3).reshape(L, B, D)
        return self.out(seen).transpose(0, 1)

    def forward(self, x):
        x = x + self.attention(self.norm1(x))
        return x + self.feed_out(F.gelu(self.feed_in(self.norm2(x))))


class TextTower(nn.Module):
    """`tower(tower.tokenize(["a prompt"]))` -> context [1, L, D]."""

    def __init__(self, config: TextConfig):
        super().__init__()
        self.config = config
        self.start, self.end = tokenizer().all_special_ids
        self.row_of = self.rows_of_tokens(config.words)
        self.token_embedding = nn.Embedding(len(self.row_of), config.width)
        self.positional_embedding = nn.Parameter(torch.empty(config.context_length, config.width))
        self.blocks = nn.ModuleList(
            Block(config.width, config.heads) for _ in range(config.layers)
        )
        self.norm_out = nn.LayerNorm(config.width)
        if config.output_dim is not None:
            self.text_projection = nn.Parameter(torch.empty(config.width, config.output_dim))
            self.logit_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))
        self.initialise()

    def rows_of_tokens(self, words):
        """{token number: row of the embedding table}; all of CLIP's tokens if no words are given.

        A cut table keeps those of `tokens_kept`, in ascending order, so that token 0 is row 0.
        """
        kept = self.tokens_kept(words) if words else range(tokenizer().vocab_size)
        return {token: row for row, token in enumerate(sorted(kept))}

    def tokens_kept(self, words):
        """The token numbers of a cut table, a set: 0 (it pads), start, end, comma, the words'."""
        kept = {0, self.start, self.end, *spell(",")}
        for word in words:
            kept.update(spell(word))
        return kept

    def initialise(self):
        """The deviations that CLIP starts from, smaller where residuals add up (GPT-2, §2.3)."""
        width, layers = self.config.width, self.config.layers
        residual_std = width**-0.5 * (2 * layers) ** -0.5
        nn.init.normal_(self.token_embedding.weight, std=0.02)
        nn.init.normal_(self.positional_embedding, std=0.01)
        for block in self.blocks:
            nn.init.normal_(block.qkv.weight, std=width**-0.5)
            nn.init.zeros_(block.qkv.bias)
            nn.init.normal_(block.out.weight, std=residual_std)
            nn.init.zeros_(block.out.bias)
            nn.init.normal_(block.feed_in.weight, std=(2 * width) ** -0.5)
            nn.init.normal_(block.feed_out.weight, std=residual_std)
        if self.config.output_dim is not None:
            nn.init.normal_(self.text_projection, std=width**-0.5)

    # ---- words ----

    def word_rows(self, word):
        """The rows of the embedding table that spell a word: int64 [n]."""
        return torch.tensor([self.row_of[token] for token in spell(word)])

    def own_rows(self, words):
        """The rows that spell these words and no other word of the model: int64 [n], ascending.

        For words that `add_words` has just added, they are the rows that are new.
        """
        shared = self.tokens_kept(set(self.config.words) - set(words))
        own = {token for word in words for token in spell(word)} - shared
        return torch.tensor(sorted(self.row_of[token] for token in own), dtype=torch.int64)

    @torch.no_grad()
    def add_words(self, words):
        """Let a model with a cut table know more words: those that were new, sorted.

        New rows are random, each number with the mean and deviation that it has over the rows of
        the table: so the blocks meet what they are used to. (Rows with a deviation of 0.02, as at
        the start of a training, changed the context of the tiny model a third less.) The old ones
        keep their numbers, but move: `token_embedding.weight` is a new parameter, and all row
        numbers from before (`tokenize`, `word_rows`) are void. The same words give the same rows.
        """
        config = self.config
        added = new_words(words, config)
        if not added:
            return []
        old_row_of, old = self.row_of, self.token_embedding.weight
        config.words = tuple(sorted({*config.words, *added}))
        self.row_of = self.rows_of_tokens(config.words)

        generator = torch.Generator().manual_seed(0)
        table = torch.randn(len(self.row_of), config.width, generator=generator)
        table = old.mean(0) + old.std(0) * table.to(old)
        table[[self.row_of[token] for token in old_row_of]] = old
        self.token_embedding = nn.Embedding(len(table), config.width, _weight=table)
        self.token_embedding.requires_grad_(old.requires_grad)
        return added

    def tokens_of(self, known):
        """The token numbers, a list, of a `known_part`."""
        if not self.config.words:
            return tokenizer().encode(known)
        # Word by word, as the table was made, whatever the tokenizer does with a whole text.
        return [token for word in known.split() for token in spell(word)]

    def tokenize(self, prompts):
        """A list of B prompts -> rows of the embedding table, int64 [B, L]: start, words, end, 0...

        A prompt that is too long is cut, with a warning. Words that the model does not know are
        left out, with a warning; raises UserError if it knows none (`known_part`).
        """
        length = self.config.context_length
        rows = torch.zeros(len(prompts), length, dtype=torch.int64)
        for i, prompt in enumerate(prompts):
            tokens = self.tokens_of(known_part(prompt, self.config))
            if len(tokens) > length - 2:
                warnings.warn(
                    f"the prompt {prompt!r} is longer than {length - 2} tokens and is cut",
                    stacklevel=2,
                )
            tokens = [self.start, *tokens[: length - 2], self.end]
            rows[i, : len(tokens)] = torch.tensor([self.row_of[token] for token in tokens])
        return rows

    def forward(self, rows):
        """rows [B, L] -> context [B, L, D]: the last block that is run, normalised."""
        x = self.token_embedding(rows) + self.positional_embedding
        for block in self.blocks[: self.config.layers - self.config.unused_layers]:
            x = block(x)
        return self.norm_out(x)
