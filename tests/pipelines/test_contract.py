"""What every public pipeline owes to its users, checked over the table of `contract.py`: one section a promise."""

from concurrent.futures import ThreadPoolExecutor

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image
from pipelines.contract import CASES, ONE_EACH, assert_alike, equal, sample
from pipelines.tiny_ldm import tiny_mask
from pipelines.tiny_paella import quiet, tiny_picture

import diffusers_ext

ALL = pytest.mark.parametrize("name", CASES)


def test_every_public_pipeline_is_in_the_table():
    public = {
        name
        for name in diffusers_ext.__all__
        if isinstance(getattr(diffusers_ext, name), type)
        and issubclass(getattr(diffusers_ext, name), diffusers.DiffusionPipeline)
    }
    assert {case.pipeline for case in CASES.values()} == public


@ALL
def test_same_seed_same_result(name):
    assert equal(sample(CASES[name].build(), name), sample(CASES[name].build(), name))


# --- wrapped components: torch.compile, DDP, unknown wrappers


def networks(pipe) -> dict[str, torch.nn.Module]:
    return {name: part for name, part in pipe.components.items() if isinstance(part, torch.nn.Module)}


WRAPPERS = {
    "compile": torch.compile,
    "parallel": lambda part: torch.compile(torch.nn.DataParallel(torch.compile(part))),
}


@pytest.fixture
def nothing_is_compiled():
    """Compiled networks run as they are written: what is tested is how they are called, not the compiler."""
    with torch.compiler.set_stance("force_eager"):
        yield


@pytest.mark.usefixtures("nothing_is_compiled")
@pytest.mark.parametrize("wrapper", WRAPPERS)
@ALL
def test_wrapped_components_change_no_result(name, wrapper):
    pipe = CASES[name].build()
    expected = sample(pipe, name)
    for part, network in networks(pipe).items():
        setattr(pipe, part, WRAPPERS[wrapper](network))
    assert_alike(sample(pipe, name), expected)


@pytest.mark.usefixtures("nothing_is_compiled")
@pytest.mark.parametrize("name", ONE_EACH)
def test_pipeline_with_wrapped_components_is_saved_like_the_bare_one(name, tmp_path):
    pipe = CASES[name].build()
    expected = sample(pipe, name)
    pipe.register_modules(**{part: WRAPPERS["parallel"](network) for part, network in networks(pipe).items()})
    pipe.save_pretrained(tmp_path)
    loaded = type(pipe).from_pretrained(tmp_path)
    loaded.set_progress_bar_config(disable=True)
    assert_alike(sample(loaded, name), expected)


class Shell(torch.nn.Module):
    """A wrapper that nobody knows."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, *args, **kwargs):
        return self.inner(*args, **kwargs)


@pytest.mark.parametrize("name", ONE_EACH)
def test_unknown_wrapper_is_refused_by_name(name):
    pipe = CASES[name].build()
    for part, network in networks(pipe).items():
        with pytest.raises(TypeError, match=rf"`{part}` is a Shell, which has no `config`.*Assign the network"):
            setattr(pipe, part, Shell(network))
        with pytest.raises(TypeError, match=rf"`{part}` is a Shell"):
            pipe.register_modules(**{part: Shell(network)})
        assert getattr(pipe, part) is network


# --- offloading, group offloading, layerwise casting


# --- callbacks: cut-off, scales changed in a run, tensors given and taken


# --- one generator an image


# --- threads


def _sharing(pipe):
    """A pipeline with a scheduler of its own on the networks of another."""
    return quiet(type(pipe).from_pipe(pipe, scheduler=type(pipe.scheduler).from_config(pipe.scheduler.config)))


@ALL
def test_threads_that_share_the_networks_get_exact_results(name):
    alone, shared = CASES[name].build(), CASES[name].build()
    # prompts of several lengths, so that a setting of the tokenizer that is torn shows
    changes = [
        {"prompt": text} if "prompt" in CASES[name].inputs() else {}
        for text in ("a", "a red star", "a large blue star on the left")
    ]
    wanted = [sample(alone, name, seed=seed, **change) for seed, change in enumerate(changes)]

    def run(seed: int):
        pipe = _sharing(shared)
        return [sample(pipe, name, seed=seed, **changes[seed]) for _ in range(2)]

    with ThreadPoolExecutor(3) as pool:
        for found, one in zip(pool.map(run, range(3)), wanted, strict=True):
            assert all(equal(result, one) for result in found)


def test_a_mask_of_one_thread_is_not_seen_by_another():
    shared = CASES["versatile-image-to-image"].build()
    picture, mask = tiny_picture(1), tiny_mask()
    masked, whole = ({"image": [picture] * 8, "image_masks": masks} for masks in ([mask] * 8, None))
    wanted = [shared.encode_image(**call)[0] for call in (masked, whole)]
    assert not torch.allclose(*wanted, atol=1e-2)

    def run(k: int):
        pipe = _sharing(shared)
        return [pipe.encode_image(**(masked, whole)[k])[0] for _ in range(10)]

    with ThreadPoolExecutor(2) as pool:
        for found, one in zip(pool.map(run, range(2)), wanted, strict=True):
            assert all(torch.equal(tokens, one) for tokens in found)


ENCODERS = pytest.mark.parametrize("name", ["paella", "ldm-text", "versatile-text-to-image"])


@ENCODERS
def test_prompts_of_threads_are_encoded_apart(name, caplog):
    shared = CASES[name].build()
    texts = ["a", "a red circle", "a large blue star on the left"]
    wanted = [shared.encode_prompt(text)[0] for text in texts]

    def run(k: int):
        pipe = _sharing(shared)
        return all(torch.equal(pipe.encode_prompt(texts[k])[0], wanted[k]) for _ in range(40))

    with ThreadPoolExecutor(3) as pool:
        assert all(pool.map(run, range(3)))
    assert not caplog.records  # nothing was cut off


# --- adapters, saving


# --- pictures and masks


READS_PICTURES = [name for name, case in CASES.items() if "image" in case.inputs()]
READS_MASKS = [name for name, case in CASES.items() if "mask_image" in case.inputs()]


def _other_forms(picture, form):
    """The same grey picture or mask, as another file or array would hold it."""
    grey = np.asarray(picture.convert("L"))
    return {
        "alpha": lambda: Image.fromarray(grey).convert("RGBA"),
        "palette": lambda: Image.fromarray(grey).convert("P"),
        "16 bits": lambda: Image.fromarray(grey.astype(np.uint16) * 257),
        "32 bits": lambda: Image.fromarray(grey.astype(np.int32)),
        "floats": lambda: Image.fromarray(grey.astype(np.float32) / np.float32(254.99995)),
        "one channel": lambda: grey[..., None],
    }[form]()


@pytest.mark.parametrize("name", READS_PICTURES)
def test_pictures_and_masks_of_other_forms_are_the_same_to_the_pipeline(name):
    pipe, call = CASES[name].build(), dict(CASES[name].inputs())
    call["image"] = call["image"].convert("L")
    if name == "versatile-image-to-image":
        call["image_masks"] = tiny_mask()
    wanted = sample(pipe, name, **call, num_inference_steps=1)
    for form in ("alpha", "palette", "16 bits", "32 bits", "floats", "one channel"):
        changed = {key: _other_forms(call[key], form) for key in ("image", "mask_image", "image_masks") if key in call}
        assert_alike(sample(pipe, name, **call | changed, num_inference_steps=1), wanted, atol=1e-4)


@pytest.mark.parametrize("name", READS_MASKS)
def test_a_brush_on_nothing_is_the_mask_it_shows(name):
    pipe, call = CASES[name].build(), dict(CASES[name].inputs())
    brush = np.full((16, 16, 4), 255, dtype=np.uint8)
    brush[..., 3] = np.asarray(call["mask_image"].convert("L"))
    assert equal(sample(pipe, name, **call), sample(pipe, name, **call | {"mask_image": Image.fromarray(brush)}))


# --- schedulers: wrong kinds, adapters


# --- parts that are missing or of a wrong kind


# --- long prompts, options without effect


# --- not-a-number from a network


# --- pipelines made of another's components


# --- loading: folders of another family, dtypes
