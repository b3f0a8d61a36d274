"""Layouts as tokens: the format by hand, the way back, what is refused."""

from random import Random

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from diffusers_ext.conditions.layout import LayoutObject, LayoutTokenizer

SMALL = LayoutTokenizer(
    num_classes=10, max_objects=3, vocab_size=256, encode_crop=False, use_group_flag=False
)  # a grid of 16 x 16


def test_released_length_and_tokens_by_hand():
    tokenizer = LayoutTokenizer()
    assert (tokenizer.length, tokenizer.side, tokenizer.none_token) == (92, 90, 8191)
    tokens = tokenizer.encode([LayoutObject(7, (0.5, 0.25, 0.5, 0.25), is_group_of=True)])
    # 0.5 * 89 = 44.5 and 0.25 * 89 = 22.25: halves go to the even neighbour
    assert tokens[:3].tolist() == [7 + 182, 22 * 90 + 44, 44 * 90 + 89]
    assert tokens.dtype == torch.int64 and tokens[3:90].eq(8191).all()
    assert tokens[90:].tolist() == [0, 8099]  # no crop: the whole picture


def test_flags_have_fixed_places():
    tokenizer = LayoutTokenizer(num_classes=5, vocab_size=128, use_group_flag=False, use_other_flags=True)
    flags = [{}, {"is_occluded": True}, {"is_depiction": True}, {"is_inside": True}, {"is_group_of": True}]
    labels = [int(tokenizer.encode([LayoutObject(1, (0, 0, 1, 1), **f)])[0]) for f in flags]
    assert labels == [1, 11, 21, 41, 1]


def test_crop_and_flip():
    left, right = LayoutObject(1, (0.0, 0.0, 0.4, 1.0)), LayoutObject(2, (0.5, 0.5, 0.5, 0.5))
    crop = (0.5, 0.0, 0.5, 1.0)
    relative, none = SMALL.decode(SMALL.encode([left, right], crop=crop))
    assert relative == [(2, (0.0, 8 / 15, 1.0, 7 / 15))] and none is None  # the left one lies outside
    mirrored, _ = SMALL.decode(SMALL.encode([right], flip=True))
    assert mirrored == [(2, (0.0, 8 / 15, 8 / 15, 7 / 15))]
    whole = LayoutTokenizer(num_classes=10)
    placed, told = whole.decode(whole.encode([left, right], crop=crop, flip=True))
    assert [label for label, _ in placed] == [2] and placed[0][1] == pytest.approx((0, 0.5, 0.5, 0.5), abs=0.01)
    assert told == pytest.approx((0.0, 0.0, 0.5, 1.0), abs=0.01)


def test_centre_points():
    tokenizer = LayoutTokenizer(
        num_classes=10, max_objects=3, vocab_size=256, encode_crop=False, use_group_flag=False, center_points=True
    )
    tokens = tokenizer.encode([LayoutObject(4, (0.2, 0.4, 0.4, 0.4))])
    assert tokens.tolist() == [4, 9 * 16 + 6, 255, 255, 255, 255]
    assert tokenizer.decode(tokens) == ([(4, (6 / 15, 9 / 15))], None)


def test_further_objects_are_dropped_before_the_order_is_drawn():
    objects = [LayoutObject(k, (0, 0, 1, 1)) for k in range(6)]
    kept = {int(SMALL.encode(objects, shuffle=Random(seed))[0]) for seed in range(50)}
    assert kept == {0, 1, 2}
    assert torch.equal(SMALL.encode(objects, shuffle=Random(3)), SMALL.encode(objects, shuffle=Random(3)))
    assert SMALL.encode(objects)[::3].tolist() == [0, 1, 2]
    assert SMALL.encode([]).eq(255).all()


@given(
    st.lists(
        st.tuples(st.integers(0, 9), *[st.floats(0.01, 0.99) for _ in range(4)]).map(
            lambda v: LayoutObject(v[0], (v[1], v[2], v[3] * (1 - v[1]), v[4] * (1 - v[2])))
        ),
        max_size=3,
    ),
    st.booleans(),
)
def test_decoding_finds_every_object_to_half_a_grid_step(objects, flip):
    found, _ = SMALL.decode(SMALL.encode(objects, flip=flip))
    assert [label for label, _ in found] == [item.category for item in objects]
    for item, (_, box) in zip(objects, found, strict=True):
        x, y, width, height = item.box
        x = 1 - x - width if flip else x
        for wanted, actual in zip(
            (x, y, x + width, y + height), (*box[:2], box[0] + box[2], box[1] + box[3]), strict=True
        ):
            assert abs(wanted - actual) <= 0.5 / 15 + 1e-6


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: LayoutTokenizer(num_classes=4096), r"`num_classes` is 4096, with flags 8192 class tokens.*8191"),
        (lambda: SMALL.encode([LayoutObject(10, (0, 0, 1, 1))]), r"`objects\[0\]\.category` is 10.*classes 0 to 9"),
        (lambda: SMALL.encode([LayoutObject(1, (0.5, 0, 0.6, 1))]), r"`objects\[0\]\.box` is \(0\.5, 0, 0\.6, 1\)"),
        (lambda: SMALL.encode([LayoutObject(1, (0, -0.1, 1, 1))]), r"expected \(x, y, width, height\) within"),
        (lambda: SMALL.encode([LayoutObject(1, (0, float("nan"), 1, 1))]), r"`objects\[0\]\.box`"),
        (lambda: SMALL.encode([], crop=(0, 0, 2, 1)), r"`crop` is \(0, 0, 2, 1\)"),
        (lambda: SMALL.encode([], crop=(0, 0, 1, 0)), r"`crop` is \(0, 0, 1, 0\).*empty"),
        (lambda: SMALL.decode([0] * 8), r"`tokens` holds 8 tokens, a sequence of this tokenizer 9"),
    ],
)  # fmt: skip
def test_bad_input(call, message):
    with pytest.raises(ValueError, match=message):
        call()
