"""`make gpu` without a GPU: its checks on the CPU, what it unpacks, and what it tells of parts that fail."""

import importlib.metadata
import json
import runpy
import sys
import zipfile
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from gpu import test_pipelines, test_recipes

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def runner(repo_root) -> SimpleNamespace:
    name = "gpu_run"  # dataclasses look their module up
    module = SimpleNamespace()
    vars(module).update(runpy.run_path(str(repo_root / "tests" / "gpu" / "run.py"), run_name=name))
    return module


@pytest.mark.parametrize("name", ["paella", "ldm-unconditional", "versatile-text-to-text", "cascaded"])
def test_the_checks_of_a_pipeline(name):
    test_pipelines.test_the_device_changes_no_result(name, CPU)
    test_pipelines.test_a_generator_on_the_device_repeats_itself(name, CPU)
    test_pipelines.test_half_precision(name, torch.bfloat16, CPU)


@pytest.mark.parametrize("name", ["ldm-unconditional", "cascaded"])
def test_the_checks_of_offloading(name):
    test_pipelines.test_model_offload_moves(name, CPU)
    test_pipelines.test_group_offload_moves(name, False, CPU)


def test_the_checks_of_one_graph_and_of_draws():
    test_pipelines.test_the_network_is_one_graph("ldm-unconditional", CPU)
    test_pipelines.test_cpu_generators_serve_tokens_on_the_device(CPU)


def test_they_see_another_result():
    one = torch.zeros(1, 3, 4, 4)
    test_pipelines.assert_near(one + 1e-3, one)
    with pytest.raises(AssertionError, match="100% of the values differ"):
        test_pipelines.assert_near(one + 0.1, one)
    with pytest.raises(AssertionError):
        test_pipelines.assert_near(one * float("nan"), one)


def test_the_check_of_a_recipe(monkeypatch, repo_root, tmp_path):
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    monkeypatch.chdir(repo_root)
    assert {path.stem for path in (repo_root / "training" / "presets").glob("*-smoke.yaml")} <= set(test_recipes.JOBS)
    test_recipes.test_two_steps_in_bf16("optimus-smoke", tmp_path)


def test_what_fails_is_told_and_the_rest_goes_on(runner, tmp_path, monkeypatch):
    """Real processes: one that breaks, one that never ends, one whose package is absent, rows, and pytest."""
    rows = "import json, sys; json.dump({'one step': [{'case': 'a step', 'ratio': 0.5}]}, open(sys.argv[1], 'w'))"
    never = "import time; print('  first case: 0.25', flush=True); time.sleep(60)"
    parts = [
        runner.Part("broken", ["-c", "raise ValueError('no kernel | here')"], 60),
        runner.Part("never", ["-c", never], 6),
        runner.Part("absent", ["-c", "pass"], 60, needs=["datasets"]),
        runner.Part("speed", ["-c", rows, "{json}"], 60),
    ]
    results = runner.run_all([parts, []], {"PATH": "/usr/bin:/bin"}, absent=["datasets"])
    assert [one["outcome"] for one in results] == ["failed", "stopped", "skipped", "passed"]
    assert [len(one["rows"]) for one in results] == [0, 1, 0, 1]
    told = runner.table(results)
    assert "| broken | the whole part | **failed** ValueError: no kernel / here |" in told
    assert (
        "| never | the whole part | **stopped** stopped after 6 s |" in told
        and "| never | first case | ratio 0.25 |" in told
    )
    assert "| absent | the whole part | **skipped** absent: datasets |" in told
    assert "| speed | a step | ratio 0.5 |" in told
    assert runner.failures(results) == 2 and json.dumps(results)


def test_the_whole_command_with_pytest(runner, monkeypatch, tmp_path, capsys):
    small = runner.tests("pipelines", "test_pipelines", "-k", "cpu_generators or of_another_device", limit=120)
    monkeypatch.setitem(runner.main.__globals__, "test_parts", lambda: [small])
    monkeypatch.setitem(runner.main.__globals__, "speed_parts", lambda device: [])
    assert runner.main(["--device", "cpu", "--json", str(tmp_path / "gpu.json")]) == 0
    told = capsys.readouterr().out
    assert "| pipelines | cpu generators serve tokens on the device | 1 passed |" in told and "0 failed" in told
    (part,) = json.loads((tmp_path / "gpu.json").read_text())["parts"]
    assert {row["outcome"] for row in part["rows"]} == {"passed", "skipped"}
    with pytest.raises(SystemExit):
        runner.main(["--device", "cpu", "--only", "speed"])


@pytest.mark.skipif(torch.accelerator.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so(runner, capsys):
    assert runner.main([]) == 0
    assert "sees no GPU here: nothing was run" in capsys.readouterr().out


def test_every_benchmark_of_speed_that_knows_a_device_is_run(runner, repo_root):
    parts = {part.name: part for part in runner.speed_parts("cuda")}
    assert {"speed_paella", "speed_ldm", "speed_versatile", "speed_cascaded", "speed_paella_cache"} <= set(parts)
    for name, part in parts.items():
        assert name in runner.FINDS_IT or part.words[1:3] == ["--device", "cuda"]
        options = [word for word in part.words if word.startswith("--")]
        text = (repo_root / "benchmarks" / f"{name}.py").read_text()
        assert all(f'"{option}"' in text for option in options), (name, options)
    group = max(part.limit for part in runner.test_parts())
    assert group + 30 < runner.SECONDS < 480


def wheel(folder: Path, name: str, version: str, *requires: str, tag: str = "py3-none-any") -> Path:
    path = folder / f"{name}-{version}-{tag}.whl"
    with zipfile.ZipFile(path, "w") as file:
        file.writestr(f"{name}/__init__.py", f"VERSION = {version!r}\n")
        lines = "".join(f"Requires-Dist: {line}\n" for line in requires)
        file.writestr(f"{name}-{version}.dist-info/METADATA", f"Name: {name}\nVersion: {version}\n{lines}")
    return path


def test_what_python_lacks_is_unpacked_and_nothing_else(runner, tmp_path):
    minor = sys.version_info[1]
    wheels = [
        wheel(tmp_path, "no_such_thing", "1.0", "numpy>=999", "torch ; extra == 'x'"),
        wheel(tmp_path, "numpy", "999.1"),  # here, but older than what the first one needs
        wheel(tmp_path, "torch", "999.1"),  # here, and new enough
        wheel(tmp_path, "no_such_part", "1.0", tag=f"cp3{minor}-cp3{minor}-manylinux_2_28_x86_64"),
        wheel(tmp_path, "stable_part", "1.0", tag="cp38-abi3-manylinux_2_28_x86_64"),
        wheel(tmp_path, "of_another_python", "1.0", tag=f"cp3{minor + 1}-cp3{minor + 1}-manylinux_2_28_x86_64"),
    ]
    taken = runner.unpack_missing(wheels, ["torch>=2.11,!=2.13.*"], tmp_path / "site")
    assert taken == ["no_such_part 1.0", "no_such_thing 1.0", "numpy 999.1", "stable_part 1.0"]
    found = {path.name for path in (tmp_path / "site").iterdir() if not path.name.endswith(".dist-info")}
    assert found == {"no_such_part", "no_such_thing", "numpy", "stable_part"}


@pytest.mark.parametrize(
    ("version", "wanted", "expected"),
    [
        ("0.42.1", "diffusers>=0.42,<0.43", True),
        ("0.43.0", "diffusers>=0.42,<0.43", False),
        ("0.41.2", "diffusers>=0.42,<0.43", False),
        ("2.11.0+cu130", "torch>=2.11,!=2.13.*", True),
        ("2.9.1", "torch>=2.11", False),
        ("1.0", "anything", True),
    ],
)
def test_versions_are_compared_as_numbers(runner, version, wanted, expected):
    assert runner.fits(version, wanted) is expected


def test_the_kit_holds_all_that_its_packages_need(repo_root):
    """For the Python and the packages of this machine: every requirement is packed, or is large and there."""
    pack = SimpleNamespace(**runpy.run_path(str(repo_root / "tests" / "gpu" / "pack.py")))
    pins = pack.closure(f"3.{sys.version_info[1]}")
    assert {"diffusers", "importlib-metadata", "transformers", "tokenizers", "safetensors", "pytest"} <= set(pins)
    assert not pack.THERE & set(pins)
    for name in pins:
        for line in importlib.metadata.requires(name) or []:
            need = pack.Requirement(line)
            if need.marker is None or need.marker.evaluate({"extra": ""}):
                assert pack.canonicalize_name(need.name) in {*pins, *pack.THERE}, (name, line)
    assert all((repo_root / name / "README.md").is_file() for name in map(Path, pack.bundled()))
