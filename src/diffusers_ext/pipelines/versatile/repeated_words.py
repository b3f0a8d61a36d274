"""Texts out of a latent repeat themselves now and then; here the repetitions go (Versatile Diffusion, app.py)."""

_GLUE = "\0"  # joins a punctuation mark to its word; a token of its own, so that repetitions are found around it
_OPENING, _CLOSING = "([{", "?!.,:;}])"


def merge_repeated_words(text: str) -> str:
    """Leaves one of several equal runs of words that follow each other, short runs first.

    Punctuation counts as words: "yes, yes, no." becomes "yes, no.", "a red car a red car" becomes "a red car".
    """
    tokens = [token for word in text.split() for token in _split_punctuation(word)]
    length = 1
    while 2 * length <= len(tokens):
        start = 0
        while start + 2 * length <= len(tokens):
            if tokens[start : start + length] == tokens[start + length : start + 2 * length]:
                del tokens[start + length : start + 2 * length]
                start = max(0, start - 2 * length)  # what moved up may repeat what stands before
            else:
                start += 1
        length += 1
    return " ".join(tokens).replace(f" {_GLUE} ", "")


def _split_punctuation(word: str) -> list[str]:
    """ "(big)," -> ["(", GLUE, "big", GLUE, ")", GLUE, ","]."""
    left = len(word) - len(word.lstrip(_OPENING))
    opening, rest = word[:left], word[left:]
    stem = rest.rstrip(_CLOSING)
    parts = [*opening, *([stem] if stem else []), *rest[len(stem) :]]
    return [token for part in parts for token in (_GLUE, part)][1:]
