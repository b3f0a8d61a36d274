"""U-Nets of the ADM kind: projections taken apart, blocks named in the order of running, levels counted."""

import pytest
import torch

from diffusers_ext.conversion.adm import adm_blocks, adm_layers, split_heads, split_qkv

# the 64x64 network of ADM, GLIDE's upsampler in small, levels of several depths, one level
NETWORKS = [
    ([3, 3, 3, 3], [False, True, True, True]),
    ([2, 2, 2, 2], [False, False, True, True]),
    ([1, 2, 1], [True, False, True]),
    ([2], [False]),
]


@pytest.mark.parametrize(("parts", "names"), [(3, "qkv"), (2, "kv")])
@pytest.mark.parametrize("order", ["interleaved", "blocked"])
def test_a_projection_is_taken_apart(parts, names, order):
    """Each row is written down as (part, head, place in the head)."""
    heads, width = 3, 4
    rows = {
        "interleaved": [(p, h, d) for h in range(heads) for p in range(parts) for d in range(width)],
        "blocked": [(p, h, d) for p in range(parts) for h in range(heads) for d in range(width)],
    }[order]
    fused = torch.tensor(rows)  # (parts * heads * width, 3)
    found = split_heads(fused, heads, parts, order)
    assert len(found) == len(names)
    for part, rows in enumerate(found):
        assert rows.tolist() == [[part, h, d] for h in range(heads) for d in range(width)]
    assert torch.equal(split_heads(fused[..., None], heads, parts, order)[1], found[1][..., None])  # of a Conv1d


@pytest.mark.parametrize("order", ["interleaved", "blocked"])
def test_attention_with_split_weights_is_that_of_the_original(order):
    """The original's two attentions, on the fused projection, by their definitions."""
    heads, width, length = 2, 6, 5
    torch.manual_seed(0)
    weight, bias = torch.randn(3 * width, width), torch.randn(3 * width)
    hidden = torch.randn(width, length)
    fused = weight @ hidden + bias[:, None]
    if order == "interleaved":  # QKVAttentionLegacy: first by heads
        q, k, v = fused.reshape(heads, 3 * width // heads, length).split(width // heads, dim=1)
    else:  # QKVAttention: first by parts
        q, k, v = (part.reshape(heads, width // heads, length) for part in fused.chunk(3, dim=0))
    weights = {"block.qkv.weight": weight, "block.qkv.bias": bias, "block.norm.weight": torch.ones(width)}
    split = split_qkv(weights, {width: heads}, order)
    assert list(split) == [*(f"block.{n}.{kind}" for kind in ("weight", "bias") for n in "qkv"), "block.norm.weight"]
    for name, expected in (("q", q), ("k", k), ("v", v)):
        actual = split[f"block.{name}.weight"] @ hidden + split[f"block.{name}.bias"][:, None]
        torch.testing.assert_close(actual.view(heads, width // heads, length), expected)


def test_a_projection_that_the_heads_do_not_divide():
    with pytest.raises(ValueError, match=r"A projection of 20 rows does not hold 3 parts of 2 heads each"):
        split_heads(torch.zeros(20, 4), 2)


@pytest.mark.parametrize(("layers", "attention"), NETWORKS)
def test_blocks_are_named_once_and_the_levels_read_off_the_names(layers, attention):
    blocks = list(adm_blocks(layers, attention))
    for names in ([block.adm for block in blocks], [block.diffusers for block in blocks]):
        assert len(set(names)) == len(names)
    ops = [block.op for block in blocks]
    assert ops.count("res") == 2 * sum(layers) + len(layers) + 2 and ops.count("down") == len(layers) - 1
    assert ops.count("attention") == 1 + sum((2 * n + 1) * has for n, has in zip(layers, attention, strict=True))
    first = {"res": "in_layers.2.weight", "attention": "norm.weight", "down": "op.weight"}
    for upsampling in ("conv.weight", "in_layers.2.weight", "weight"):  # convolution, residual block, linear layer
        ends = {**first, "up": upsampling}
        assert adm_layers({block.adm + ends.get(block.op, "weight") for block in blocks}) == layers


def test_names_of_the_fact_sheets():
    """latent_diffusion.md, cascaded_diffusion.md and piti.md, for n = 3 layers a level."""
    names = {block.adm: block.diffusers for block in adm_blocks([3, 3, 3, 3], [False, True, True, True])}
    for level in range(4):
        for layer in range(3):
            assert names[f"input_blocks.{1 + 4 * level + layer}.0."] == f"down_blocks.{level}.resnets.{layer}."
            assert names[f"output_blocks.{4 * level + layer}.0."] == f"up_blocks.{level}.resnets.{layer}."
    assert names["input_blocks.4.0."] == "down_blocks.0.downsamplers.0."
    assert names["output_blocks.3.2."] == "up_blocks.0.upsamplers.0." and "output_blocks.15.1." not in names
