"""Words that a model knows: reading prompts, leaving out unknown words, naming a subject "[v]".

The released model has CLIP's whole vocabulary. A small model knows the words of its captions only
(`TextConfig.words`): a prompt is cut down to them, and a warning names what was left out.
"""
import re
import unicodedata
import warnings

from .errors import UserError

# Rare tokens, kept free for the subjects that dreambooth.py teaches.
IDENTIFIERS = ("sks", "phol", "ucd", "mwf")
# Words that name no thing. A prompt of these alone is not a prompt.
FILLERS = set(
    ", a an and at by for from has in is its of on or that the to under with "
    "photo picture image wearing carrying riding sitting standing".split()
)
# What stands for the subject in a prompt: also as a keyboard for Chinese or Japanese writes it.
SUBJECT = re.compile(r"[\[［][vｖ][\]］]", re.IGNORECASE)
# CLIP's tokens are sorted: those below were merged from the most frequent pairs of letters.
COMMON_TOKENS = 40_000


def words_of(prompt):
    """The words and commas of a prompt, in lower case and in order.

    A word is a run of letters and digits of any script, with the marks that belong to them.
    Unicode writes many of them in several ways: these become one (NFKC, case folded).
    """
    text = unicodedata.normalize("NFKC", prompt).casefold()
    # To Python a mark is no part of a word, as little as a dash: all but the marks go. The lower
    # case of a Turkish capital I with a dot has two dots.
    text = re.sub(r"[^\w\s\x00-\x7f]", mark_or_space, text).replace("i\u0307", "i")
    text = unicodedata.normalize("NFKC", text)
    return re.findall(r"[^\W_](?:[^\W_]|[^\w\s\x00-\x7f])*|,", text)


def mark_or_space(match):
    """A mark (an accent, a vowel sign) as it is, any other character as a space.

    Nothing for what is not seen and only says how its neighbours are drawn, such as a joiner. (The
    space of width zero is one.)
    """
    character = match[0]
    category = unicodedata.category(character)
    if category == "Cf" and character != "\u200b":
        return ""
    if category[0] == "M":
        return "" if "VARIATION SELECTOR" in unicodedata.name(character, "") else character
    return " "


def new_words(captions, config):
    """The words of captions that a model does not know, sorted: [str].

    config: a TextConfig. A model with CLIP's whole vocabulary knows all.
    """
    if not config.words:
        return []
    found = set()
    for caption in captions:
        found.update(words_of(caption))
    return sorted(found - {",", *config.words})


def name_subject(prompt, identifier):
    """The prompt with every "[v]" replaced by the identifier token; "" leaves it out."""
    return identifier.join(SUBJECT.split(prompt))


def known_part(prompt, config):
    """The prompt with "[v]" replaced, and without the words that the model does not know.

    config: a TextConfig, of which `words` and `identifier` are read. A warning names what is left
    out. The empty prompt is the unconditional one and stays. Raises UserError if the model knows
    no word of the prompt but fillers, was taught no "[v]", or if the prompt is not text.
    """
    # What Python makes of bytes that are not UTF-8.
    if re.search("[\ud800-\udfff]", prompt):
        raise UserError(f"the prompt {prompt!r} is not UTF-8 text: type it in a terminal that is")
    if name_subject(prompt, "") != prompt and not config.identifier:
        raise UserError(
            "this model has been taught no [v]: "
            "make one that has with dreambooth.py, or leave [v] out"
        )
    prompt = name_subject(prompt, config.identifier)
    if not config.words or not prompt:
        return prompt
    words = words_of(prompt)
    known = {",", *config.words}
    nameable = [word for word in config.words if word not in IDENTIFIERS]
    listing = "it knows: " + " ".join(nameable)
    if not set(words) & known - FILLERS:
        raise UserError(f"the model knows nothing in {prompt!r}; {listing}")
    unknown = [word for word in dict.fromkeys(words) if word not in known]
    if unknown:
        warnings.warn(
            f"the model does not know {', '.join(unknown)}: left out; {listing}", stacklevel=3
        )
    return " ".join(word for word in words if word in known)


def check_identifier(word, config, tokens):
    """Check that a word can stand for a subject.

    config: the model's TextConfig. tokens: the token numbers that spell the word. Warns if the
    model spells it with several tokens, or has seen it meaning something. Raises UserError if it
    is not a word that the model knows.
    """
    free = [name for name in IDENTIFIERS if name != config.identifier]
    advice = f"better ones are: {', '.join(free)}"
    is_word = words_of(word) == [word] and word != ","
    if not is_word or (config.words and word not in config.words):
        raise UserError(f"the model knows no word {word!r} that could be the identifier; {advice}")
    if len(tokens) > 1:
        warnings.warn(
            f"the identifier {word!r} is {len(tokens)} tokens to the model, "
            f"each of which means something; {advice}",
            stacklevel=2,
        )
    elif word == config.identifier:
        warnings.warn(
            f"the model has been taught another subject called {word!r}; {advice}", stacklevel=2
        )
    elif word not in IDENTIFIERS and (config.words or tokens[0] < COMMON_TOKENS):
        warnings.warn(f"the model has seen {word!r} meaning something; {advice}", stacklevel=2)
