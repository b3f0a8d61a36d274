"""Captions from the web, cleaned so that a text autoencoder can give them back.

Xu et al., "Versatile Diffusion", arXiv 2211.08332, describe it in words and released no code: addresses, HTML, text in
square or curly brackets, symbols such as dashes, slashes and underscores, and all quotes except 's are removed.
"""

import html
import re

_ADDRESS = re.compile(r"\b(?:https?://|www\.)\S+|\S+@\S+\.\w+", re.IGNORECASE)
_TAG = re.compile(r"</?[a-zA-Z][^<>]*>|<!--.*?-->", re.DOTALL)
_BRACKETS = re.compile(r"\[[^\[\]]*\]|\{[^{}]*\}")
_SYMBOLS = re.compile(r"[-\u2010-\u2015/\\_|~^*#=+<>\[\]{}\u2022]")
_QUOTES = re.compile(r"[\"\u201c-\u201f\u00ab\u00bb`\u2018\u201a\u201b]|'(?!s\b)")
_SPACE_BEFORE = re.compile(r"\s+(?=[.,;:!?])")


def clean_caption(caption: str) -> str:
    """The caption without what nobody would say; "" if nothing is left."""
    text = html.unescape(caption)
    text = _ADDRESS.sub(" ", _TAG.sub(" ", text))
    while (shorter := _BRACKETS.sub(" ", text)) != text:  # from the inside outwards
        text = shorter
    text = text.replace("\u2019", "'")
    text = _QUOTES.sub("", _SYMBOLS.sub(" ", text))
    return _SPACE_BEFORE.sub("", " ".join(text.split()))
