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
from warm_python import WarmPython  # noqa: E402

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
def warm_python(tmp_path_factory) -> Iterator[WarmPython]:
    """Runs programs as fresh processes would, without their imports of the libraries."""
    warm = WarmPython(tmp_path_factory.mktemp("warm"))
    yield warm
    warm.close()


@pytest.fixture(scope="session")
def run_python(warm_python) -> Callable[..., subprocess.CompletedProcess]:
    """Runs `code` in a Python process of its own; `env` is laid over this process's environment (None removes a name).

    `cold`: where the subject is what is imported when, the process begins from nothing, which takes 6 s longer.
    """

    def run(code: str, *, check: bool = True, cold: bool = False, **env: str | None) -> subprocess.CompletedProcess:
        environment = {k: v for k, v in {**os.environ, **env}.items() if v is not None}
        if cold:
            command = [sys.executable, "-c", code]
            result = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)
        else:
            result = warm_python.run("-c", code, env=environment)
        assert not check or result.returncode == 0, result.stdout + result.stderr
        return result

    return run


@pytest.fixture(scope="session")
def hub_of_all_tests() -> Iterator[HubDouble]:
    with HubDouble() as double:
        yield double


@pytest.fixture
def hub(hub_of_all_tests) -> HubDouble:
    """A local double of the Hub, empty; `hub.env` is what a fresh process needs to talk to it."""
    hub_of_all_tests.clear()
    return hub_of_all_tests
