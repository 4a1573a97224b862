"""Prompts -> context: the text tower of OpenCLIP, read as Stable Diffusion 2 reads it.

SD 2 takes the last-but-one layer of ViT-H/14's tower, then `ln_final`: every token's vector is kept, [B, 77, 1024]. Padding is
token 0. A tower may know only some words: its embedding table is then cut to the byte-pair tokens that spell them.
"""
import math
import re
import warnings
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import nn

from .tools.errors import UserError

IDENTIFIERS = ("sks", "phol", "ucd", "mwf")       # rare tokens, reserved for subjects that DreamBooth will teach
FILLERS = {",", *"a an and at by for from has in is its of on or that the to under with photo picture image wearing "
           "carrying riding sitting standing".split()}                           # these alone name no thing
COMMON = 40_000                                   # CLIP's tokens are sorted: the first were merged from the most frequent pairs


@dataclass
class TextConfig:
    """The defaults are the tower of OpenCLIP ViT-H/14 as Stable Diffusion 2 uses it."""
    width: int = 1024
    heads: int = 16
    layers: int = 24
    unused_layers: int = 1                       # how many of the last layers are held but not run
    output_dim: int | None = 1024                # columns of text_projection, held with CLIP's logit_scale but not used; None: neither
    context_length: int = 77
    words: tuple = ()                            # the words that the table is cut to; empty: the whole vocabulary of CLIP
    identifier: str = ""                         # the word that "[v]" in a prompt stands for, if dreambooth.py has taught one


@lru_cache(maxsize=1)
def tokenizer():
    from open_clip.tokenizer import SimpleTokenizer                              # importing open_clip takes seconds
    return SimpleTokenizer()


def name_subject(prompt, identifier):
    """The prompt with its "[v]" replaced; an empty identifier leaves it out."""
    return re.sub(r"\[v\]", identifier, prompt, flags=re.I)


def words_of(prompt):
    """The words and commas of a prompt, lower case, in order."""
    return re.findall(r"[a-z0-9]+|,", prompt.lower())


def check_identifier(text, word):
    """Warns if the TextTower has seen `word` meaning something, or spells it with several tokens. Raises UserError if it is no word
    that it knows."""
    free = [name for name in IDENTIFIERS if name != text.config.identifier]                            # reserved, and not yet taken
    advice = f"better ones are: {', '.join(free)}"
    if words_of(word) != [word] or word == "," or (text.config.words and word not in text.config.words):
        raise UserError(f"the model knows no word {word!r} that could be the identifier; {advice}")
    tokens = tokenizer().encode(word)
    if len(tokens) > 1:
        warnings.warn(f"the identifier {word!r} is {len(tokens)} tokens to the model, each of which means something; {advice}",
                      stacklevel=2)
    elif word == text.config.identifier:
        warnings.warn(f"the model has been taught another subject called {word!r}; {advice}", stacklevel=2)
    elif word not in IDENTIFIERS and (text.config.words or tokens[0] < COMMON):
        warnings.warn(f"the model has seen {word!r} meaning something; {advice}", stacklevel=2)


class TextTower(nn.Module):
    """OpenCLIP's TextTransformer and its tokenizer. `tower(tower.tokenize([prompt]))` -> [B, L, D]."""

    def __init__(self, config: TextConfig):
        super().__init__()
        from open_clip.transformer import TextTransformer
        self.config = config
        bpe = tokenizer()
        self.start, self.end = bpe.all_special_ids
        if config.words:                                                         # 0 pads, so it stays row 0
            kept = {0, self.start, self.end, *bpe.encode(",")}.union(*(bpe.encode(word) for word in config.words))
            self.row_of = {token: row for row, token in enumerate(sorted(kept))}
        else:
            self.row_of = {token: token for token in range(bpe.vocab_size)}
        self.tower = TextTransformer(config.context_length, len(self.row_of), config.width, config.heads, config.layers,
                                     output_dim=config.output_dim)
        self.tower.attn_mask = None                                              # made in forward: a buffer would have no weights
        if config.output_dim is not None:
            self.logit_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))

    def known_part(self, prompt):
        """The prompt with "[v]" replaced by the identifier, and without the words that the tower does not know, which a warning names.

        Raises UserError if it knows none of them, nothing but fillers, or no "[v]". The empty prompt is the unconditional one.
        """
        if name_subject(prompt, "") != prompt and not self.config.identifier:
            raise UserError("this model has been taught no [v]: make one that has with dreambooth.py, or leave [v] out")
        prompt = name_subject(prompt, self.config.identifier)
        if not self.config.words or not prompt:
            return prompt
        words, known = words_of(prompt), {",", *self.config.words}
        unknown = [word for word in dict.fromkeys(words) if word not in known]
        listing = "it knows: " + " ".join(word for word in self.config.words if word not in IDENTIFIERS)
        if not set(words) & known - FILLERS:
            raise UserError(f"the model knows nothing in {prompt!r}; {listing}")
        if unknown:
            warnings.warn(f"the model does not know {', '.join(unknown)}: left out; {listing}", stacklevel=3)
        return " ".join(word for word in words if word in known)

    def rows_of(self, word):
        """The rows of the embedding table that spell a word: int64 [n]."""
        return torch.tensor([self.row_of[token] for token in tokenizer().encode(word)])

    def tokenize(self, prompts):
        """A list of B prompts -> rows of the embedding table, int64 [B, L]: start, words, end, zeros; too long a prompt is cut."""
        bpe, length = tokenizer(), self.config.context_length
        rows = torch.zeros(len(prompts), length, dtype=torch.int64)
        for i, prompt in enumerate(prompts):
            tokens = bpe.encode(self.known_part(prompt))
            if len(tokens) > length - 2:
                warnings.warn(f"the prompt {prompt!r} is longer than {length - 2} tokens and is cut", stacklevel=2)
            tokens = [self.start, *tokens[:length - 2], self.end]
            rows[i, :len(tokens)] = torch.tensor([self.row_of[token] for token in tokens])
        return rows

    def forward(self, rows):
        """rows [B, L] -> context [B, L, D]: the last layer that is run, normalised (Stable Diffusion 2's "penultimate")."""
        tower = self.tower
        x = tower.token_embedding(rows) + tower.positional_embedding             # [B, L, D]
        causal = torch.full((x.shape[1], x.shape[1]), float("-inf"), device=x.device, dtype=x.dtype).triu(1)
        for block in tower.transformer.resblocks[:self.config.layers - self.config.unused_layers]:
            x = block(x, attn_mask=causal)
        return tower.ln_final(x)
