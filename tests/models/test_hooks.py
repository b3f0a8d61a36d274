"""What hooks do to every public model: offloading, casts for storage. It changes no result, or is refused by name.

The peers' tests of the same (diffusers' memory mixins) need an accelerator, where a weight that nobody brings back is
on the wrong device. Here it lies on the meta device, or is not-a-number.
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import accelerate
import diffusers
import pytest
import torch
from pipelines.contract import _f4_tokenizer
from pipelines.tiny_cascaded import UPSCALER, tiny_cascaded_unet
from pipelines.tiny_ldm import tiny_first_stage, tiny_unet
from pipelines.tiny_paella import CONDITION_DIM, NUM_CODES, tiny_vqvae
from pipelines.tiny_paella import tiny_unet as tiny_paella_unet
from pipelines.tiny_versatile import tiny_optimus, tiny_versatile_unet

import diffusers_ext
from diffusers_ext.models.token_codec import decode_indices, encode_indices
from diffusers_ext.pipelines.ldm.first_stage import decode_first_stage, encode_first_stage

PICTURES = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1
LABELS = torch.arange(512).view(2, 16, 16) % 4


def noise(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1))


@dataclass(frozen=True)
class Use:
    """A model and one way to use it, by its forward or by its other methods."""

    build: Callable[[], Any]
    run: Callable[[Any], torch.Tensor]
    public: str = ""  # name of our class, at the use that is its forward
    supports_groups: bool = True


USES = {
    "PaellaUNet": Use(
        tiny_paella_unet,
        lambda m: m(torch.arange(128).view(2, 8, 8) % NUM_CODES, 0.3, noise(2, CONDITION_DIM)).sample,
        "PaellaUNet",
    ),
    "PaellaVQModel": Use(_f4_tokenizer, lambda m: m(PICTURES / 2 + 0.5).sample, "PaellaVQModel"),
    "PaellaVQModel-tokens": Use(_f4_tokenizer, lambda m: decode_indices(m, encode_indices(m, PICTURES))),
    "GumbelVQModel": Use(lambda: tiny_vqvae(gumbel=True), lambda m: m(PICTURES).sample, "GumbelVQModel"),
    "GumbelVQModel-tokens": Use(
        lambda: tiny_vqvae(gumbel=True), lambda m: decode_indices(m, encode_indices(m, PICTURES))
    ),
    "GumbelVQModel-drawn": Use(
        lambda: tiny_vqvae(gumbel=True),
        lambda m: encode_indices(m, PICTURES, sample=True, generator=torch.Generator().manual_seed(2)),
    ),
    "VQModel-tokens": Use(tiny_vqvae, lambda m: decode_indices(m, encode_indices(m, PICTURES)), supports_groups=False),
    "VQModel-latents": Use(
        lambda: tiny_first_stage("vq"),
        lambda m: decode_first_stage(m, encode_first_stage(m, PICTURES)),
        supports_groups=False,
    ),
    "AutoencoderKL-latents": Use(
        lambda: tiny_first_stage("kl"), lambda m: decode_first_stage(m, encode_first_stage(m, PICTURES))
    ),
    "VersatileUNet-image": Use(
        tiny_versatile_unet,
        lambda m: m(noise(2, 4, 4, 4), 3, noise(2, 5, CONDITION_DIM), context_type="image").sample,
        "VersatileUNet",
    ),
    "VersatileUNet-text": Use(
        tiny_versatile_unet,
        lambda m: m(noise(2, 6), 3, noise(2, 5, CONDITION_DIM), data_type="text").sample,
    ),
    "AutoencoderOptimus": Use(
        lambda: tiny_optimus()[0], lambda m: m(LABELS[:, 0] + 4, LABELS[:, 1] + 4).logits, "AutoencoderOptimus"
    ),
    "AutoencoderOptimus-decode": Use(
        lambda: tiny_optimus()[0], lambda m: m.decode(noise(2, m.config["latent_dim"]), max_length=6, do_sample=False)
    ),
    "CascadedUNet": Use(
        lambda: tiny_cascaded_unet(num_class_embeds=4),
        lambda m: m(noise(2, 3, 8, 8), 3, torch.tensor([1, 3])).sample,
        "CascadedUNet",
    ),
    "CascadedUNet-upscaler": Use(
        lambda: tiny_cascaded_unet(**UPSCALER),
        lambda m: m(PICTURES, 3, low_res=noise(2, 3, 8, 8), augmentation_level=40).sample,
    ),
    "LDMUNet": Use(lambda: tiny_unet(heads=4), lambda m: m(noise(2, 3, 4, 4), 3).sample, "LDMUNet"),
    "LDMClassEmbedder": Use(
        lambda: diffusers_ext.LDMClassEmbedder(5, 8), lambda m: m(torch.tensor([1, 4])), "LDMClassEmbedder"
    ),
    "LDMLayoutEncoder": Use(
        lambda: diffusers_ext.LDMLayoutEncoder(
            vocab_size=32, max_length=16, hidden_size=16, num_layers=2, num_attention_heads=2, attention_head_dim=8
        ),
        lambda m: m(LABELS[:, 0]),
        "LDMLayoutEncoder",
    ),
    "LDMSpatialRescaler": Use(
        lambda: diffusers_ext.LDMSpatialRescaler(4, 3, bias=True), lambda m: m(LABELS), "LDMSpatialRescaler"
    ),
    "LDMSpatialRescaler-soft": Use(
        lambda: diffusers_ext.LDMSpatialRescaler(4, 3), lambda m: m(noise(2, 4, 16, 16).softmax(1))
    ),
    "GlideTextEncoder": Use(
        lambda: diffusers_ext.GlideTextEncoder(
            vocab_size=32, max_length=16, hidden_size=16, num_layers=2, num_attention_heads=2
        ),
        lambda m: m(LABELS[:, 0], LABELS[:, 0] > 1).last_hidden_state,
        "GlideTextEncoder",
    ),
    "GlideTextEncoder-vector": Use(
        lambda: diffusers_ext.GlideTextEncoder(
            vocab_size=32, max_length=16, hidden_size=16, num_layers=1, num_attention_heads=2
        ),
        lambda m: m(LABELS[:, 0]).pooler_output,
    ),
    "PITIEncoder": Use(
        lambda: diffusers_ext.PITIEncoder(3, 32, hidden_size=16, num_layers=2, num_attention_heads=2),
        lambda m: m(PICTURES.repeat(1, 1, 2, 2)).last_hidden_state,
        "PITIEncoder",
    ),
    "PatchDiscriminator-instance": Use(
        lambda: diffusers_ext.PatchDiscriminator(base_channels=8, num_layers=2, norm_type="instance"),
        lambda m: m(PICTURES),
    ),
    "PatchDiscriminator": Use(
        lambda: diffusers_ext.PatchDiscriminator(base_channels=8, num_layers=2),
        lambda m: m(PICTURES),
        "PatchDiscriminator",
    ),
}
ALL = pytest.mark.parametrize("name", USES)


def build(name: str) -> Any:
    torch.manual_seed(0)
    return USES[name].build().eval()


@torch.no_grad()
def run(name: str, model: Any) -> torch.Tensor:
    return USES[name].run(model)


def test_every_public_model_is_in_the_table():
    public = {
        name
        for name in diffusers_ext.__all__
        if isinstance(getattr(diffusers_ext, name), type)
        and issubclass(getattr(diffusers_ext, name), diffusers.ModelMixin)
    }
    assert {use.public for use in USES.values()} - {""} == public


@ALL
def test_sequential_offload_changes_nothing(name):
    model = build(name)
    expected = run(name, model)
    accelerate.cpu_offload(model, torch.device("cpu"))  # what `enable_sequential_cpu_offload` calls
    assert any(weight.is_meta for weight in model.parameters())
    assert torch.equal(run(name, model), expected)


@pytest.fixture
def poison():
    """Memory that was given back holds not-a-number: what is offloaded to a disk and read all the same shows."""
    torch.use_deterministic_algorithms(True)
    assert torch.empty(1).isnan()
    yield
    torch.use_deterministic_algorithms(False)


LEVELS = {"leaf": {"offload_type": "leaf_level"}, "block": {"offload_type": "block_level", "num_blocks_per_group": 1}}


@ALL
@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.usefixtures("poison")
def test_group_offload_changes_nothing(name, level, tmp_path):
    model = build(name)
    expected = run(name, model)
    options = {"onload_device": "cpu", "offload_device": "cpu", "offload_to_disk_path": str(tmp_path), **LEVELS[level]}
    if not USES[name].supports_groups:
        with pytest.raises(ValueError, match="does not support group offloading"):
            model.enable_group_offload(**options)
        return
    model.enable_group_offload(**options)
    assert any(weight.isnan().any() for weight in model.parameters())
    assert torch.equal(run(name, model), expected)
    assert torch.equal(run(name, model), expected)


@ALL
@pytest.mark.parametrize("storage", [torch.float8_e4m3fn, torch.bfloat16])
def test_layerwise_casting_is_the_network_with_rounded_weights(name, storage):
    model = build(name)
    rounded = copy.deepcopy(model)
    model.enable_layerwise_casting(storage_dtype=storage, compute_dtype=torch.float32)
    cast = [key for key, weight in model.named_parameters() if weight.dtype == storage]
    for key in cast:
        weight = rounded.get_parameter(key)
        weight.data = weight.data.to(storage).to(torch.float32)
    assert cast and torch.equal(run(name, model), run(name, rounded))


@pytest.mark.parametrize("name", [name for name, use in USES.items() if use.public])
def test_result_is_given_as_diffusers_models_give_it(name):
    """`return_dict=False` is a tuple everywhere, True an output object; the small networks' default is the tensor."""
    model, seen = build(name), []
    forward = model.forward

    def call(*args: Any, **kwargs: Any) -> Any:
        with torch.no_grad():
            seen.extend((forward(*args, **kwargs, return_dict=True), forward(*args, **kwargs, return_dict=False)))
            return forward(*args, **kwargs)

    model.forward = call
    default = run(name, model)
    output, values = seen
    assert isinstance(output, diffusers.utils.BaseOutput) and isinstance(values, tuple)
    assert torch.equal(output[0], values[0]) and torch.equal(values[0], default)


@pytest.mark.parametrize(
    "name",
    [
        "LDMClassEmbedder",
        "LDMLayoutEncoder",
        "LDMSpatialRescaler",
        "AutoencoderOptimus",
        "CascadedUNet",
        "CascadedUNet-upscaler",
        "GlideTextEncoder",
        "PITIEncoder",
    ],
)
def test_compiles_as_one_graph(name):
    model = build(name)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    assert torch.equal(run(name, compiled), run(name, model))
