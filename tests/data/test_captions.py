"""What the cleaning of captions takes away, and what it leaves."""

import pytest

from diffusers_ext.data.captions import clean_caption


@pytest.mark.parametrize(
    ("caption", "cleaned"),
    [
        ("a large red circle on the left", "a large red circle on the left"),
        ("A man's hat, size 5.5!", "A man's hat, size 5.5!"),
        ("Shop now: https://shop.example/a?b=1 today", "Shop now: today"),
        ("see WWW.example.com/x or mail me@example.org.", "see or mail."),
        ("<b>Tom</b> &amp; Jerry<br/> &lt;3", "Tom & Jerry 3"),
        ("photo [stock image] of a cat {id: [7]} asleep", "photo of a cat asleep"),
        ("black-and-white / mono_chrome | 35mm", "black and white mono chrome 35mm"),
        ("the \u201cold\u201d 'new' dog\u2019s tail isn't `here`", "the old new dog's tail isnt here"),
        ("a cat , asleep .", "a cat, asleep."),
        ("an open [bracket", "an open bracket"),
        ("[removed] http://x.y", ""),
        ("  a \n\t cat ", "a cat"),
        ("2 < 3 and 5 > 4", "2 3 and 5 4"),
        ("\u00e9t\u00e9 \u00e0 Paris (1999)", "\u00e9t\u00e9 \u00e0 Paris (1999)"),
    ],
)
def test_captions(caption, cleaned):
    assert clean_caption(caption) == cleaned
    assert clean_caption(cleaned) == cleaned
