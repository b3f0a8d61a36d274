"""benchmarks/versatile_flows.py and versatile_figures.py: the checks on true cases, the scripts on a tiny pipeline."""

import json
import runpy
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from pipelines.tiny_paella import WORDS
from pipelines.tiny_versatile import tiny_versatile_components

from diffusers_ext.data.scenes import full_caption, parse_caption, render
from diffusers_ext.data.scenes_verifier import read_picture
from diffusers_ext.pipelines.pipeline_versatile import VersatilePipeline

SMALL = ["--num_inference_steps", "2", "--batch_size", "3"]


def load(repo_root, name: str) -> SimpleNamespace:
    sys.path.insert(0, str(repo_root / "benchmarks"))
    try:
        return SimpleNamespace(**runpy.run_path(str(repo_root / "benchmarks" / name)))
    finally:
        sys.path.remove(str(repo_root / "benchmarks"))


@pytest.fixture(scope="module")
def script(repo_root) -> SimpleNamespace:
    return load(repo_root, "versatile_flows.py")


@pytest.fixture(scope="module")
def figures(repo_root) -> SimpleNamespace:
    return load(repo_root, "versatile_figures.py")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> str:
    """Sixteen pixels, the least that `scenes` draws; weights are random."""
    folder = tmp_path_factory.mktemp("versatile")
    VersatilePipeline(**tiny_versatile_components()).save_pretrained(folder)
    return str(folder)


def test_print(folder, script, capsys):
    script.main([folder, *SMALL, "--num_cases", "4"])
