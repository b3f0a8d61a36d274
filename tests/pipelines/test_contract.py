"""What every public pipeline owes to its users, checked over the table of `contract.py`: one section a promise."""

import diffusers
import pytest
from pipelines.contract import CASES, equal, sample

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
