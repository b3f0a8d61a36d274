"""What every test may count on: no network, no user configuration, one thread, fixed seeds."""

import os
import tempfile

# Before any Hugging Face import: their libraries read the environment once, when they are imported. Each test process
# (xdist worker) has a cache of its own, so that a user's token, cache or settings change nothing.
_home = tempfile.TemporaryDirectory(prefix="diffusers_ext_tests_")
os.environ.update(
    HF_HOME=_home.name,
    HF_HUB_OFFLINE="1",
    HF_HUB_DISABLE_TELEMETRY="1",
    HF_HUB_DISABLE_PROGRESS_BARS="1",
    HF_HUB_DISABLE_XET="1",
    OMP_NUM_THREADS="1",
    TOKENIZERS_PARALLELISM="false",
    MPLBACKEND="Agg",
    WANDB_MODE="disabled",
)
for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HF_ENDPOINT", "DIFFUSERS_EXT_NO_REGISTER"):
    os.environ.pop(name, None)

import random  # noqa: E402
import subprocess  # noqa: E402
import sys  # noqa: E402
from collections.abc import Callable, Iterator  # noqa: E402
from pathlib import Path  # noqa: E402

import numpy as np  # noqa: E402
import pytest  # noqa: E402
import torch  # noqa: E402
from hub_double import HubDouble  # noqa: E402

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def seeds() -> None:
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def repo_root() -> Path:
    return Path(__file__).parents[1]


@pytest.fixture(scope="session")
def run_python(repo_root) -> Callable[..., subprocess.CompletedProcess]:
    """Runs `code` in a fresh Python process; `env` is laid over this process's environment (None removes a name)."""

    def run(code: str, *, check: bool = True, **env: str | None) -> subprocess.CompletedProcess:
        environment = {k: v for k, v in {**os.environ, **env}.items() if v is not None}
        result = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, env=environment, timeout=300
        )
        assert not check or result.returncode == 0, result.stdout + result.stderr
        return result

    return run


@pytest.fixture
def hub() -> Iterator[HubDouble]:
    """A local double of the Hub; `hub.env` is what a fresh process needs to talk to it."""
    with HubDouble() as double:
        yield double
