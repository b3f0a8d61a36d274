"""The table of all public pipelines for the contract tests: how to build a tiny one, and a call that works.

A family that is added later is checked by one entry here. `test_contract.py` fails while a public pipeline has none.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from diffusers import DiffusionPipeline
from pipelines.tiny_paella import quiet

import diffusers_ext
from diffusers_ext.models.vq_paella import PaellaVQModel
from pipelines import tiny_cascaded, tiny_glide, tiny_ldm, tiny_paella, tiny_versatile

Result = torch.Tensor | list[str]


@dataclass(frozen=True)
class Case:
    """One way to use a pipeline class.

    Args:
        pipeline: name of the public class.
        build: the tiny pipeline, always with the same weights, without progress bars.
        inputs: the arguments of a call for one sample.
        guided: options of a call that guides, empty where the pipeline or its network cannot be guided.
        returns_texts: the result is a list of texts, not of images.
    """

    pipeline: str
    build: Callable[[], Any]
    inputs: Callable[[], Mapping[str, Any]]
    guided: Mapping[str, Any] = field(default_factory=dict)
    returns_texts: bool = False


def _paella(name: str, **components: Any) -> Callable[[], Any]:
    def build() -> Any:
        parts = tiny_paella.tiny_paella_components(image_encoder=True)
        return quiet(getattr(diffusers_ext, name)(**parts | {key: make() for key, make in components.items()}))

    return build


def _f4_tokenizer() -> PaellaVQModel:
    """Paella's own tokenizer with one level: 16 x 16 pixels are 8 x 8 tokens."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        vqvae = PaellaVQModel(levels=1, bottleneck_blocks=1, embed_dim=8, num_vq_embeddings=tiny_paella.NUM_CODES)
        torch.nn.init.normal_(vqvae.vquantizer.embedding.weight)
        return vqvae.eval()


def _gumbel_tokenizer() -> Any:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        return tiny_paella.tiny_vqvae(gumbel=True)


def _ldm(task: str, first_stage: str = "kl") -> Callable[[], Any]:
    return lambda: tiny_ldm.tiny_ldm(task, first_stage=first_stage)


def _versatile() -> Any:
    return quiet(diffusers_ext.VersatilePipeline(**tiny_versatile.tiny_versatile_components()))


def _versatile_edit() -> Any:
    return quiet(diffusers_ext.VersatileEditPipeline(**tiny_versatile.tiny_versatile_components()))


def _picture() -> Any:
    return tiny_paella.tiny_picture(1)


PROMPT = "a red circle"
GUIDED = {"guidance_scale": 3.0}
TWO_STEPS = {"upscale_num_inference_steps": 2}  # of a second stage
CASES: dict[str, Case] = {
    "paella": Case("PaellaPipeline", _paella("PaellaPipeline"), lambda: {"prompt": PROMPT}, GUIDED),
    "paella-f4": Case(
        "PaellaPipeline", _paella("PaellaPipeline", vqvae=_f4_tokenizer), lambda: {"prompt": PROMPT}, GUIDED
    ),
    "paella-gumbel": Case(
        "PaellaPipeline", _paella("PaellaPipeline", vqvae=_gumbel_tokenizer), lambda: {"prompt": PROMPT}, GUIDED
    ),
    "paella-inpaint": Case(
        "PaellaInpaintPipeline",
        _paella("PaellaInpaintPipeline"),
        lambda: {"prompt": PROMPT, "image": _picture(), "mask_image": tiny_ldm.tiny_mask()},
        GUIDED,
    ),
    "paella-inpaint-f4": Case(
        "PaellaInpaintPipeline",
        _paella("PaellaInpaintPipeline", vqvae=_f4_tokenizer),
        lambda: {"prompt": PROMPT, "image": _picture(), "mask_image": tiny_ldm.tiny_mask()},
        GUIDED,
    ),
    "paella-inpaint-gumbel": Case(
        "PaellaInpaintPipeline",
        _paella("PaellaInpaintPipeline", vqvae=_gumbel_tokenizer),
        lambda: {"prompt": PROMPT, "image": _picture(), "mask_image": tiny_ldm.tiny_mask()},
        GUIDED,
    ),
    "paella-img2img": Case(
        "PaellaImg2ImgPipeline",
        _paella("PaellaImg2ImgPipeline"),
        lambda: {"prompt": PROMPT, "image": _picture()},
        GUIDED,
    ),
    "paella-variation": Case(
        "PaellaImageVariationPipeline",
        _paella("PaellaImageVariationPipeline"),
        lambda: {"image": _picture()},
        GUIDED,
    ),
    "ldm-unconditional": Case(
        "LDMUnconditionalPipeline", _ldm("unconditional"), lambda: tiny_ldm.tiny_inputs("unconditional")
    ),
    "ldm-unconditional-vq": Case(
        "LDMUnconditionalPipeline", _ldm("unconditional", "vq"), lambda: tiny_ldm.tiny_inputs("unconditional")
    ),
    "ldm-unconditional-known": Case(
        "LDMUnconditionalPipeline",
        _ldm("unconditional"),
        lambda: {"image": tiny_ldm.tiny_picture(1), "mask_image": tiny_ldm.tiny_mask()},
    ),
    "ldm-class": Case("LDMClassConditionalPipeline", _ldm("class"), lambda: tiny_ldm.tiny_inputs("class"), GUIDED),
    "ldm-text": Case("LDMTextPipeline", _ldm("text"), lambda: tiny_ldm.tiny_inputs("text"), GUIDED),
    "ldm-layout": Case("LDMLayoutPipeline", _ldm("layout"), lambda: tiny_ldm.tiny_inputs("layout"), GUIDED),
    "ldm-semantic": Case("LDMSemanticPipeline", _ldm("semantic"), lambda: tiny_ldm.tiny_inputs("semantic"), GUIDED),
    "ldm-upscale": Case("LDMUpscalePipeline", _ldm("upscale"), lambda: tiny_ldm.tiny_inputs("upscale"), GUIDED),
    "ldm-inpaint": Case("LDMInpaintPipeline", _ldm("inpaint"), lambda: tiny_ldm.tiny_inputs("inpaint"), GUIDED),
    "ldm-inpaint-vq": Case(
        "LDMInpaintPipeline", _ldm("inpaint", "vq"), lambda: tiny_ldm.tiny_inputs("inpaint"), GUIDED
    ),
    "versatile-text-to-image": Case("VersatilePipeline", _versatile, lambda: {"prompt": PROMPT}, GUIDED),
    "versatile-image-to-image": Case("VersatilePipeline", _versatile, lambda: {"image": _picture()}, GUIDED),
    "versatile-dual": Case("VersatilePipeline", _versatile, lambda: {"prompt": PROMPT, "image": _picture()}, GUIDED),
    "versatile-image-to-text": Case(
        "VersatilePipeline", _versatile, lambda: {"image": _picture(), "data_type": "text"}, GUIDED, True
    ),
    "versatile-text-to-text": Case(
        "VersatilePipeline", _versatile, lambda: {"prompt": PROMPT, "data_type": "text"}, GUIDED, True
    ),
    "versatile-edit": Case(
        "VersatileEditPipeline",
        _versatile_edit,
        lambda: {"image": _picture(), "prompt": PROMPT, "negative_prompt": "a blue star"},
        GUIDED,
    ),
    "cascaded-base": Case("CascadedBasePipeline", tiny_cascaded.tiny_base, lambda: {"class_labels": "star"}, GUIDED),
    "cascaded-base-unconditional": Case(
        "CascadedBasePipeline", lambda: tiny_cascaded.tiny_base(classes=False), lambda: {}
    ),
    "cascaded-upscale": Case(
        "CascadedUpscalePipeline",
        tiny_cascaded.tiny_upscale,
        lambda: {"image": tiny_cascaded.small_picture(), "class_labels": "star"},
        GUIDED,
    ),
    "cascaded": Case(
        "CascadedDiffusionPipeline", lambda: tiny_cascaded.tiny_cascade(2), lambda: {"class_labels": "star"}, GUIDED
    ),
    "glide": Case("GlidePipeline", lambda: tiny_glide.tiny_glide(upscale=False), lambda: {"prompt": PROMPT}, GUIDED),
    "glide-upscaled": Case("GlidePipeline", tiny_glide.tiny_glide, lambda: {"prompt": PROMPT, **TWO_STEPS}, GUIDED),
    "glide-inpaint": Case(
        "GlidePipeline",
        lambda: tiny_glide.tiny_glide(inpaint=True, upscale=False),
        lambda: {"prompt": PROMPT, "image": _picture(), "mask_image": tiny_ldm.tiny_mask()},
        GUIDED,
    ),
    "piti": Case(
        "PITIPipeline", lambda: tiny_glide.tiny_piti(upscale=False), lambda: tiny_glide.tiny_condition(), GUIDED
    ),
    "piti-upscaled": Case(
        "PITIPipeline",
        lambda: tiny_glide.tiny_piti("sketch"),
        lambda: tiny_glide.tiny_condition("sketch") | TWO_STEPS,
        GUIDED,
    ),
}
# One case a class where one is enough: loading, saving, signatures.
ONE_EACH = list({case.pipeline: name for name, case in reversed(CASES.items())}.values())[::-1]
# Pipelines of networks: a cascade consists of pipelines, whose own cases are here too.
ONE_NETWORK = [name for name in ONE_EACH if name != "cascaded"]
GUIDED_CASES = [name for name, case in CASES.items() if case.guided]


def networks(pipe: Any) -> dict[str, torch.nn.Module]:
    """All networks by name; those of the stages of a cascade as `stage.name`."""
    found: dict[str, torch.nn.Module] = {}
    for name, part in pipe.components.items():
        if isinstance(part, torch.nn.Module):
            found[name] = part
        elif isinstance(part, DiffusionPipeline):
            found |= {f"{name}.{inner}": network for inner, network in networks(part).items()}
    return found


def owner_of(pipe: Any, name: str) -> tuple[Any, str]:
    """The pipeline that a network of `networks` belongs to, and its name there."""
    *stage, name = name.split(".")
    return (getattr(pipe, stage[0]) if stage else pipe), name


def sample(pipe: Any, name: str, seed: int = 0, **options: Any) -> Result:
    """Runs a case for two steps: images (b, 3, H, W) in [0, 1], or texts."""
    case = CASES[name]
    generator = options.pop("generator", None) or torch.Generator().manual_seed(seed)
    output = {} if case.returns_texts else {"output_type": "pt"}
    call = {"num_inference_steps": 2, **case.inputs(), **case.guided, **output, **options}
    return pipe(**call, generator=generator, return_dict=False)[0]


def equal(one: Result, other: Result) -> bool:
    """Whether two results are the same to the bit."""
    return (
        torch.equal(one, other) if isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor) else one == other
    )


def assert_alike(one: Result, other: Result, atol: float = 1e-5) -> None:
    """Two results are the same up to rounding: texts to the letter."""
    if isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor):
        torch.testing.assert_close(one, other, atol=atol, rtol=0)
    else:
        assert one == other
