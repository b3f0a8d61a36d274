"""What every public pipeline owes to its users, checked over the table of `contract.py`: one section a promise."""

import diffusers
import pytest
import torch
from pipelines.contract import CASES, ONE_EACH, assert_alike, equal, sample

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


# --- adapters, saving


# --- pictures and masks


# --- schedulers: wrong kinds, adapters


# --- parts that are missing or of a wrong kind


# --- long prompts, options without effect


# --- not-a-number from a network


# --- pipelines made of another's components


# --- loading: folders of another family, dtypes
