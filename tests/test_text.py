"""The text tower against open_clip's own forward, and the cut vocabulary."""

import copy
import random
import re
import warnings

import pytest
import torch

from agree import agree
from mvd.tools.errors import UserError
from mvd.text import TextConfig, TextTower, tokenizer
from mvd.tools.vocabulary import (
    IDENTIFIERS,
    check_identifier,
    known_part,
    name_subject,
    new_words,
    words_of,
)
from mvd.weights import LDM_TEXT, rename

SMALL = dict(
    width=32, heads=2, layers=3, unused_layers=0, output_dim=None, context_length=12
)


def tower(**changes):
    torch.manual_seed(0)
    return TextTower(TextConfig(**{**SMALL, **changes})).eval()


@torch.no_grad()
def test_agrees_with_open_clip():
    """open_clip pools after its last norm, so its pooled vector is ours at the end token."""
    from open_clip.transformer import TextTransformer

    ours = tower()
    theirs = TextTransformer(12, 49408, 32, 2, 3, output_dim=None).eval()
    to_theirs = [(new, old) for old, new in reversed(LDM_TEXT)]
    theirs.load_state_dict(
        {rename(name, to_theirs): tensor for name, tensor in ours.state_dict().items()}
    )
    tokens = tokenizer()(["a bulldog wearing a crown", "red"], context_length=12)
    rows = ours.tokenize(["a bulldog wearing a crown", "red"])
    agree(rows, tokens, "the tokens of open_clip", atol=0)
    expected, context = theirs(tokens), ours(tokens)
    ends = tokens.argmax(-1)
    hint = "Is attention causal? Is the last norm there?"
    found = context[torch.arange(2), ends]
    agree(found, expected, "open_clip's vector at the end token", hint, rtol=1e-4)


@torch.no_grad()
def test_penultimate_layer_is_a_shorter_tower():
    whole = tower(unused_layers=1)
    short = tower(layers=2)
    short.load_state_dict(
        {k: v for k, v in whole.state_dict().items() if "blocks.2" not in k}
    )
    rows = whole.tokenize(["a red car"])
    agree(whole(rows), short(rows), "a tower with an unused layer, and without it", rtol=1e-5)


@torch.no_grad()
def test_a_new_tower_starts_as_clip_does():
    """The deviations of OpenCLIP's `init_parameters`, for 3 layers of width 32."""
    new = tower(layers=3)
    residual = 32**-0.5 / 6**0.5
    expected = {"qkv": 32**-0.5, "out": residual, "feed_in": 64**-0.5, "feed_out": residual}
    for name, deviation in expected.items():
        weights = torch.stack([getattr(block, name).weight for block in new.blocks])
        assert weights.std().item() == pytest.approx(deviation, rel=0.05), name
    assert new.token_embedding.weight.std().item() == pytest.approx(0.02, rel=0.05)
    assert new.positional_embedding.std().item() == pytest.approx(0.01, rel=0.1)


@torch.no_grad()
def test_cut_table_gives_what_the_whole_table_gives():
    words = ("a", "bulldog", "crown", "pedestal", "wearing")
    whole, cut = tower(), tower(words=words)
    kept = torch.tensor(sorted(cut.row_of, key=cut.row_of.get))
    state = whole.state_dict()
    state["token_embedding.weight"] = state["token_embedding.weight"][kept]
    cut.load_state_dict(state)
    prompt = ["a bulldog, wearing a pedestal", ""]
    expected = whole(whole.tokenize(prompt))
    agree(cut(cut.tokenize(prompt)), expected, "the cut table, and the whole one", rtol=1e-5)
    agree(cut.tokenize(prompt)[0, -1], 0, "the padding", atol=0)


def test_unknown_words_are_named_and_left_out():
    t = tower(words=("a", "bulldog", "crown"))
    with pytest.warns(UserWarning, match="walrus.*it knows: a bulldog crown"):
        rows = t.tokenize(["a walrus, a bulldog"])
    agree(rows, t.tokenize(["a, a bulldog"]), "the rows without the unknown word", atol=0)
    with pytest.raises(UserError, match="knows nothing in 'ein Hund'.*bulldog"):
        t.tokenize(["ein Hund"])
    with pytest.raises(
        UserError, match="knows nothing in 'a walrus'"
    ):  # an article is no thing
        t.tokenize(["a walrus"])


def test_no_warning_for_known_words_and_the_empty_prompt():
    t = tower(words=("a", "bulldog"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        rows = t.tokenize(["A Bulldog", ""])
    expected = [t.row_of[t.start], t.row_of[t.end], 0]
    agree(rows[1, :3], expected, "the rows of the empty prompt", "Start, end, padding.", atol=0)


def test_long_prompts_are_cut_with_a_warning():
    t = tower()
    for words in (11, 30):  # of 12 places two are for the start and the end
        with pytest.warns(UserWarning, match="cut"):
            rows = t.tokenize(["car " * words])
        agree(rows[0, -1], t.end, f"the last row of {words} words, cut, the end", atol=0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        rows = t.tokenize(["car " * 10])
    agree(rows[0, -1], t.end, "the last row of as many words as fit, the end", atol=0)


def test_the_tokenizer_is_open_clips():
    """Only its file is run; words of all scripts, also two that meet without a space."""
    import open_clip

    theirs, rng = open_clip.SimpleTokenizer(), random.Random(0)
    alphabet = "aAéß 狗,.'0９_\u0301\u200d\U0001f415&amp;<end_of_text>\n"
    for _ in range(500):
        text = "".join(rng.choice(alphabet) for _ in range(20))
        assert tokenizer().encode(text) == theirs.encode(text), f"{text!r} is spelled otherwise"
    special = theirs.all_special_ids
    agree(tokenizer().all_special_ids, special, "the tokens of start and end", atol=0)


def test_identifiers_are_single_tokens():
    for word in IDENTIFIERS:
        agree(len(tokenizer().encode(word)), 1, f"the number of tokens of {word!r}", atol=0)


def test_v_stands_for_the_identifier():
    assert (
        name_subject("a [v] dog, [V]", "ucd") == "a ucd dog, ucd"
        and name_subject("a v [w]", "ucd") == "a v [w]"
    )
    for words in ((), ("a", "bulldog", "ucd")):
        taught, other = tower(words=words, identifier="ucd"), tower(words=words)
        assert known_part("a [v] bulldog", taught.config) == "a ucd bulldog"
        expected = other.tokenize(["a ucd bulldog"])
        agree(taught.tokenize(["a [V] bulldog"]), expected, "the rows of [V], and of ucd", atol=0)
        with pytest.raises(UserError, match=r"taught no \[v\].*dreambooth.py"):
            other.tokenize(["a [v] bulldog"])


def test_v_may_be_as_wide_as_chinese_letters():
    config = tower(words=("a", "bulldog", "ucd"), identifier="ucd").config
    for v in ("[v]", "[V]", "［v］", "［Ｖ］", "[ｖ］"):
        assert known_part(f"a {v} bulldog", config) == "a ucd bulldog"
    assert name_subject("【v】 (v) [ v]", "ucd") == "【v】 (v) [ v]"


@pytest.mark.parametrize("words", [(), ("a", "lion")])
def test_bytes_that_are_not_text_are_refused(words):
    """In a terminal that is not UTF-8 Python makes a half of a letter of é."""
    prompt = b"a \xe9lion".decode(errors="surrogateescape")
    with pytest.raises(UserError, match="not UTF-8 text"):
        tower(words=words).tokenize([prompt])


def test_the_whole_vocabulary_reads_both_ways_to_write_a_letter():
    t = tower()
    one, two = t.tokenize(["a caf\u00e9"]), t.tokenize(["a cafe\u0301"])
    agree(two, one, "the rows of é written as two characters", atol=0)


def test_an_identifier_should_be_one_rare_token():
    whole, cut = tower(identifier="mwf"), tower(words=("a", "bulldog", "sks", "phol"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_identifier("sks", whole.config, tokenizer().encode("sks"))
        check_identifier("ohwx", whole.config, tokenizer().encode("ohwx"))
        check_identifier("phol", cut.config, tokenizer().encode("phol"))
    for text, word, reason in (
        (whole, "zwx", "2 tokens"),
        (whole, "dog", "seen 'dog' meaning something"),
        (cut, "bulldog", "seen 'bulldog' meaning"),
        (whole, "mwf", "another subject called 'mwf'"),
    ):
        with pytest.warns(UserWarning, match=reason) as caught:
            check_identifier(word, text.config, tokenizer().encode(word))
        assert len(caught) == 1 and "better ones are" in str(caught[0].message)
    for text, word in (
        (cut, "ucd"),
        (whole, "two words"),
        (whole, ""),
        (whole, ","),
        (whole, "Größe"),
    ):
        with pytest.raises(UserError, match="knows no word"):
            check_identifier(word, text.config, tokenizer().encode(word))


# ---- words of any script, and words that come later ------------------------------------------


def test_words_of_ascii_text_are_runs_of_letters_and_digits():
    rng = random.Random(0)
    for _ in range(2000):
        text = "".join(chr(rng.randrange(128)) for _ in range(30))
        assert words_of(text) == re.findall(r"[a-z0-9]+|,", text.lower())


@pytest.mark.parametrize(
    "text, words",
    [
        ("Ein Löwe, GRÖSSE", ["ein", "löwe", ",", "grösse"]),
        ("cafe\u0301 caf\u00e9", ["café", "café"]),  # two ways to write one letter
        ("a \ufb01sh", ["a", "fish"]),  # a ligature
        ("\u0390", ["\u0390"]),  # its lower case is written as three
        ("don\u2019t \u201cgo\u201d\u2014now", ["don", "t", "go", "now"]),
        ("हिन्दी में", ["हिन्दी", "में"]),  # vowel signs are marks, not letters
        ("猫，狗", ["猫", ",", "狗"]),
        ("élion, E\u0301LION", ["élion", ",", "élion"]),  # no lion
        ("l\u2019homme l'homme", ["l", "homme", "l", "homme"]),
        ("красный Лев", ["красный", "лев"]),
        ("أسد أحمر", ["أسد", "أحمر"]),
        ("สิงโตแดง", ["สิงโตแดง"]),
        ("ＦＩＳＨ ①", ["fish", "1"]),  # wide, and in a circle
        ("ΣΊΣΥΦΟΣ σίσυφος", ["σίσυφοσ", "σίσυφοσ"]),  # two small sigmas
        ("İnek inek", ["inek", "inek"]),
        ("می\u200cخواهم می\u200dخواهم", ["میخواهم", "میخواهم"]),  # joiners are not seen
        ("bull\u00addog\ufeff do\u200eg\u200bcat", ["bulldog", "dog", "cat"]),
        ("e\u200d\u0301", ["é"]),
        ("猫\ufe0e 葛\U000e0100", ["猫", "葛"]),  # variants of a letter
        ("\U0001f469\u200d\U0001f680 dog\U0001f415cat", ["dog", "cat"]),  # emoji
        ("a\u2028b\u0085c\u00a0d", ["a", "b", "c", "d"]),
        ("snake_case \u2764\ufe0f dog", ["snake", "case", "dog"]),  # a heart
    ],
)
def test_words_of_any_script(text, words):
    assert words_of(text) == words, f"{text!r} has other words"


def test_new_words_are_those_that_a_model_does_not_know():
    small, whole = tower(words=("a", "bulldog")), tower()
    captions = ["A Bulldog, a LÖWE", "a blackbird"]
    assert new_words(captions, small.config) == ["blackbird", "löwe"]
    assert new_words(captions, whole.config) == []
    assert whole.add_words(["blackbird"]) == [] and len(whole.row_of) == 49408


@torch.no_grad()
def test_added_words_leave_all_that_was_known_as_it_was():
    small = tower(words=("3d", "a", "bulldog", "crown", "zebra"))
    prompts = ["a bulldog, a zebra", "a crown, 3d", ""]
    before = small(small.tokenize(prompts))
    old = copy.deepcopy(small)
    added = ["3x", "blackbird", "dog", "löwe"]  # the 3 has a row already
    assert small.add_words(["dog 3x", "a", "Löwe", "blackbird"]) == added
    agree(small(small.tokenize(prompts)), before, "known prompts, to the bit", atol=0)
    for token, row in old.row_of.items():
        now = small.token_embedding.weight[small.row_of[token]]
        agree(now, old.token_embedding.weight[row], f"the row of token {token}", atol=0)

    spelled = {word: tokenizer().encode(word) for word in small.config.words}
    new = {token for word in added for token in spelled[word]} - set(old.row_of)
    assert len(new) < sum(len(spelled[word]) for word in added)
    rows = small.own_rows(added)
    assert rows.tolist() == sorted(small.row_of[token] for token in new)
    assert len(small.row_of) == len(old.row_of) + len(new) == small.token_embedding.num_embeddings
    assert set(small.word_rows("löwe").tolist()) == {small.row_of[t] for t in spelled["löwe"]}


@torch.no_grad()
def test_added_words_are_heard():
    small = tower(words=("a", "bulldog", "crown"))
    small.add_words(["blackbird", "löwe"])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        rows = small.tokenize(["a blackbird", "a Löwe", "a bulldog"])
    context = small(rows)
    for i, j in ((0, 1), (0, 2), (1, 2)):
        assert (context[i] - context[j]).norm() > 0.01, "different words, different contexts"
    again = tower(words=("a", "bulldog", "crown"))
    torch.manual_seed(99)
    again.add_words(["löwe", "blackbird"])
    weight = small.token_embedding.weight
    agree(again.token_embedding.weight, weight, "rows added in another order", atol=0)


@torch.no_grad()
def test_rows_of_added_words_are_spread_like_the_known_rows():
    words = "a bulldog crown red car boat hat lamp duck bus pink green blue".split()
    small = tower(words=tuple(words))
    small.token_embedding.weight.mul_(3.0).add_(0.5)
    small.add_words("blackbird zebra umbrella violin mountain river window garden".split())
    new = small.own_rows("blackbird zebra umbrella violin mountain river window garden".split())
    table = small.token_embedding.weight
    agree(table[new].mean(), 0.5, "the mean of new rows", atol=0.02)
    agree(table[new].std(), 3 * 0.02, "the deviation of new rows", rtol=0.2, atol=0)


def test_what_learns_still_learns():
    small = tower(words=("a", "bulldog"))
    small.add_words(["dog"])
    assert small.token_embedding.weight.requires_grad, "a table that learned learns no more"
    frozen = tower(words=("a", "bulldog")).requires_grad_(False).half()
    frozen.add_words(["dog"])
    weight = frozen.token_embedding.weight
    assert not weight.requires_grad and weight.dtype == torch.float16, (
        "a frozen table thaws, or has another number format")
