"""All kinds of checkpoints: what is missing in a file is named, never a bare KeyError."""

from pathlib import Path

import pytest
from conversion.test_ldm_pipeline import CASES, KL, original
from conversion.test_versatile import stable_diffusion
from conversion.versatile_originals import original_weights, tiny_unet
from open_clip.model import CLIP
from pipelines.tiny_paella import tiny_tokenizer
from safetensors.torch import load_file

from diffusers_ext.conversion.catalogue import KINDS
from diffusers_ext.conversion.keys import Weights

PARITY = Path(__file__).parents[1] / "parity" / "cases"


def recorded(case: str) -> dict:
    return load_file(PARITY / case / "weights.safetensors")


def open_clip() -> dict:
    vision = {"image_size": 8, "patch_size": 4, "width": 16, "layers": 1, "head_width": 8}
    return CLIP(6, vision, {"width": 12, "heads": 3, "layers": 1}).state_dict()


def whole_ldm(release: str) -> dict:
    sizes, parts, _ = CASES[release]
    return original(sizes, **parts)[1]["state_dict"]


# kind, its file, the options that the file needs
FILES = [
    ("paella-unet", lambda: recorded("paella/v1_unet_forward"), {"time_embed_dim": 16}),
    ("paella-vqgan", lambda: recorded("paella/v1_vqgan_gumbel_f8"), {}),
    ("paella-vqgan-f4", lambda: recorded("paella/v3_vqgan_f4"), {}),
    ("open-clip", open_clip, {"vision_heads": 2, "text_heads": 3}),
    ("adm", lambda: recorded("cdm/unet_iddpm_style_uncond"), {"resolution": 16, "num_heads": 2}),
    (
        "glide",
        lambda: recorded("piti/glide_base_unet"),
        {"num_heads": [4], "num_head_channels": [16], "tokenizer": tiny_tokenizer()},
    ),
    ("piti", lambda: recorded("piti/piti_mask"), {"num_heads": [4], "num_head_channels": [16]}),
    ("ldm", lambda: whole_ldm("cin256-v2"), {"release": "cin256-v2", "use_ema": False}),
    ("ldm", lambda: whole_ldm("layout2img-openimages256"), {"release": "layout2img-openimages256", "use_ema": False}),
    ("ldm", lambda: whole_ldm("semantic_synthesis256"), {"release": "semantic_synthesis256", "use_ema": False}),
    ("ldm-first-stage", lambda: KL, {}),
    ("versatile-unet", lambda: original_weights(tiny_unet(), "current"), {"num_heads": 4}),
    ("versatile-start", lambda: stable_diffusion().state_dict(), {"num_heads": 4}),
    ("optimus", lambda: recorded("vd/optimus"), {"encoder_heads": 4, "decoder_heads": 2}),
]


def test_every_kind_has_a_file():
    assert {kind for kind, _, _ in FILES} == KINDS.keys()


@pytest.mark.parametrize(("kind", "file", "options"), FILES, ids=[f"{k}-{o.get('release', '')}" for k, _, o in FILES])
def test_each_weight_that_tells_a_size_is_asked_for_by_name(kind, file, options, monkeypatch):
    weights, read = file(), set()

    def record(self, key):
        read.add(key)
        return dict.__getitem__(self, key)

    with monkeypatch.context() as patch:
        patch.setattr(Weights, "__getitem__", record, raising=False)
        try:
            KINDS[kind].convert(weights, **options)
        except ValueError as error:  # open_clip's tokenizer is for the real vocabulary
            assert kind == "open-clip" and "vocabulary" in str(error)
    sizes = [key for key in weights if key in read or any(key.endswith(f".{name}") for name in read)]
    assert sizes or kind in ("open-clip", "versatile-unet", "versatile-start")  # these ask before they read
    sizes += [key for key in list(weights)[:2] if not sizes]
    for key in sizes:
        rest = {name: value for name, value in weights.items() if name != key}
        with pytest.raises(ValueError, match=r"lacks|missing|holds no|levels hold|is not|is no |AutoencoderKL needs"):
            KINDS[kind].convert(rest, **options)
