"""The tests of this folder need a GPU: `make gpu` runs them, and says what failed. Elsewhere they skip by name."""

import json
import os
from pathlib import Path

import pytest
import torch

HERE = Path(__file__).parent
DEVICE = os.environ.get("GPU_TESTS_DEVICE")  # "cpu": what of them can run without a GPU, for the test of `make gpu`
RESULTS = os.environ.get("GPU_TESTS_RESULTS")  # a line of JSON a test, so that a stopped run leaves what it found


def pytest_collection_modifyitems(items):
    for item in items:
        if HERE in item.path.parents:
            item.add_marker("gpu")


@pytest.fixture(scope="session")
def device() -> torch.device:
    if DEVICE:
        return torch.device(DEVICE)
    if not torch.accelerator.is_available():
        pytest.skip("needs a GPU; `make gpu` runs it where there is one")
    return torch.accelerator.current_accelerator()


@pytest.fixture(autouse=True)
def exact_convolutions():
    """Convolutions in float32, not in TF32: results are compared with those of the CPU."""
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    yield
    torch.backends.cudnn.allow_tf32 = before


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    report = yield
    if RESULTS and (report.when == "call" or report.outcome != "passed"):
        case = item.callspec.id if hasattr(item, "callspec") else ""
        line = {"check": item.originalname.removeprefix("test_").replace("_", " "), "case": case}
        line |= {"outcome": report.outcome, "seconds": round(report.duration, 2)}
        if report.failed:
            line["message"] = str(call.excinfo.value).strip()[:500] or repr(call.excinfo.value)
            line["traceback"] = report.longreprtext[-4000:]
        elif report.skipped:
            line["message"] = str(call.excinfo.value)
        with open(RESULTS, "a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
    return report
