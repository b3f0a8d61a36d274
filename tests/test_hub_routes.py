"""Whatever this library saves, uploads or exports loads elsewhere, by every route, over a double of the Hub.

The routes of the README and of `diffusers-ext export-hub`, each for all pipeline classes, all bundled checkpoints and
a result of every recipe. Loads of one kind share a fresh process, since starting one takes longer than all of them.
"""

import json
import pickle
import re
from pathlib import Path

import diffusers
import pytest
import torch
from accelerate.state import AcceleratorState
from hub_double import HubDouble
from huggingface_hub import constants, hf_api
from PIL import Image
from pipelines.contract import CASES, ONE_EACH, assert_alike, networks, sample
from pipelines.tiny_glide import tiny_glide, tiny_piti
from pipelines.tiny_ldm import tiny_mask, tiny_picture
from safetensors.torch import load_file

import diffusers_ext
from diffusers_ext import cli
from diffusers_ext.training_utils.hub import export_self_contained, push_folder
from diffusers_ext.training_utils.saved_folders import read_saved

ROOT = Path(__file__).parents[1]
BUNDLED = sorted(path.name for path in (ROOT / "checkpoints").iterdir())
RECIPES = ("autoencoder", "cascaded", "clip", "paella", "ldm", "optimus", "piti", "versatile")

# What every fresh process begins with. `calls`: repository -> (class, arguments of a call, or None for a model).
LOADING = """
import pickle, sys, torch
torch.set_num_threads(1)
calls, results = pickle.load(open(sys.argv[1], "rb")), {}
def keep(route, repo, pipe):
    pipe.set_progress_bar_config(disable=True)
    call = calls[repo][1]
    outcome = pipe(**call, generator=torch.Generator().manual_seed(0), return_dict=False)[0]
    results[route, repo] = type(pipe).__name__, outcome, weights(pipe)
def weights(pipe):
    if hasattr(pipe, "unet"):
        return pipe.unet.state_dict()
    stages = {name: stage for name, stage in pipe.components.items() if stage is not None}  # of a cascade
    return {f"{name}.{key}": value for name, stage in stages.items() for key, value in weights(stage).items()}
def fingerprint(route, repo, model):
    results[route, repo] = type(model).__name__, None, model.state_dict()
"""
# Card lines name no number of steps; two are enough here.
QUICK = f"""
import diffusers_ext
def in_two_steps(call):
    return lambda *args, **options: call(*args, **{{"num_inference_steps": 2}} | options)
for name in {sorted({case.pipeline for case in CASES.values()})!r}:
    pipeline = getattr(diffusers_ext, name)
    pipeline.__call__ = in_two_steps(pipeline.__call__)
"""
SAVING = '\ntorch.save(results, sys.argv[1] + ".results")\n'


@pytest.fixture(scope="module")
def online():
    """One double for the file; this process talks to it too."""
    with HubDouble() as hub, pytest.MonkeyPatch.context() as patch:
        patch.setattr(constants, "ENDPOINT", hub.url)
        patch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", hub.url + "/{repo_id}/resolve/{revision}/{filename}")
        patch.setattr(hf_api.api, "endpoint", hub.url)  # behind `create_repo` and its like
        patch.setattr(constants, "HF_HUB_OFFLINE", False)
        patch.setenv("HF_TOKEN", "hf_double")
        patch.setenv("ACCELERATE_USE_CPU", "true")
        for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "http_proxy", "https_proxy", "all_proxy"):
            patch.delenv(name, raising=False)
        yield hub


def call_of(name) -> dict:
    case = CASES[name]
    output = {} if case.returns_texts else {"output_type": "pt"}
    return {"num_inference_steps": 2, **case.inputs(), **case.guided, **output}


@pytest.fixture(scope="module")
def pushed(online, tmp_path_factory) -> dict[str, tuple]:
    """Every pipeline class on the Hub, pushed and exported: repository -> (class, call, result, weights)."""
    folder, repositories = tmp_path_factory.mktemp("pushed"), {}
    for name in ONE_EACH:
        pipe = CASES[name].build()
        pipe.push_to_hub(f"user/{name}")
        pipe.save_pretrained(folder / name)
        export_self_contained(folder / name, folder / f"{name}-exported", hub_model_id=f"user/{name}-exported")
        assert push_folder(folder / f"{name}-exported", f"user/{name}-exported")
        unets = {part: network.state_dict() for part, network in networks(pipe).items() if part.endswith("unet")}
        weights = {f"{part}.{key}"[5:] if part == "unet" else f"{part[:-5]}.{key}": value
                   for part, state in unets.items() for key, value in state.items()}  # fmt: skip
        result = sample(pipe, name), weights
        for repo in (f"user/{name}", f"user/{name}-exported"):
            repositories[repo] = (CASES[name].pipeline, call_of(name), *result)
    return repositories


@pytest.fixture(scope="module")
def load(online, run_python, tmp_path_factory):
    """Runs code in a fresh process that talks to the double; returns what it kept."""

    def run(code: str, calls: dict[str, tuple], **env: str | None) -> dict[tuple[str, str], tuple]:
        home = tmp_path_factory.mktemp("stranger")
        (home / "calls").write_bytes(pickle.dumps({repo: call[:2] for repo, call in calls.items()}))
        head = f"import sys; sys.argv = ['', {str(home / 'calls')!r}]; sys.path.insert(0, {str(ROOT / 'tests')!r})"
        run_python(head + LOADING + code + SAVING, **online.env(home) | env)
        return torch.load(home / "calls.results", weights_only=False)

    return run


def assert_same(found: tuple, wanted: tuple) -> None:
    """The class, every weight to the bit, and the result (tensors of another process are aligned otherwise)."""
    assert found[0] == wanted[0]
    assert found[2].keys() == wanted[3].keys()
    assert all(torch.equal(found[2][key], value) for key, value in wanted[3].items())
    if wanted[2] is not None:
        assert_alike(found[1], wanted[2])


def test_every_pipeline_loads_from_the_hub_in_a_fresh_process(pushed, load):
    """By its class and by DiffusionPipeline, without trust; and by the entry file, once the package is imported."""
    entries = {}
    for path in sorted((ROOT / "pipelines").glob("*.py")):
        entries[re.search(r"import (\w+Pipeline)\b", path.read_text())[1]] = str(path)
    code = f"""
from safetensors.torch import load_file

import diffusers_ext
from diffusers import DiffusionPipeline
entries = {entries!r}
for repo, (name, _) in calls.items():
    keep("class", repo, getattr(diffusers_ext, name).from_pretrained(repo))
    keep("generic", repo, DiffusionPipeline.from_pretrained(repo))
    custom = DiffusionPipeline.from_pretrained(repo, custom_pipeline=entries[name], trust_remote_code=True)
    assert type(custom) is getattr(diffusers_ext, name), repo
"""
    calls = {repo: call for repo, call in pushed.items() if not repo.endswith("-exported")}
    assert {call[0] for call in calls.values()} == {case.pipeline for case in CASES.values()}
    results = load(code, calls)
    for route in ("class", "generic"):
        for repo, wanted in calls.items():
            assert_same(results[route, repo], wanted)


def test_a_cascade_of_stages_that_are_named_on_the_hub(pushed, online, tmp_path):
    """Read in their turn, saved as names, and found again by both routes; and one that is pushed as a whole."""
    names = ["user/cascaded-base", "user/cascaded-upscale"]
    pipe = diffusers_ext.CascadedDiffusionPipeline.from_stages(names, stage_by_stage=True)
    pipe.save_pretrained(tmp_path / "names")
    index = json.loads((tmp_path / "names" / "model_index.json").read_text())
    assert [index["base"], index["upscale_1"]] == names
    assert not (tmp_path / "names" / "base").exists()
    pipe.push_to_hub("user/cascade-of-names")
    whole = "user/cascaded"
    loaded = [
        pipe,
        diffusers_ext.CascadedDiffusionPipeline.from_pretrained(tmp_path / "names"),
        diffusers.DiffusionPipeline.from_pretrained(tmp_path / "names"),
        diffusers.DiffusionPipeline.from_pretrained("user/cascade-of-names"),
        diffusers_ext.CascadedDiffusionPipeline.from_pretrained("user/cascade-of-names", stage_by_stage=True),
        diffusers_ext.CascadedDiffusionPipeline.from_pretrained(whole, stage_by_stage=True),
    ]
    for one in loaded:
        one.set_progress_bar_config(disable=True)
        assert_alike(sample(one, "cascaded"), pushed[whole][2])
    with pytest.raises(ValueError, match="'user/nothing' holds no pipeline"):
        diffusers_ext.CascadedDiffusionPipeline.from_stages(["user/nothing"], stage_by_stage=True)(1)


def test_every_exported_pipeline_needs_no_import_and_every_class_finds_itself(pushed, load):
    """Exported copies from the Hub, with trust alone; the first load is in a process without the package's import."""
    code = """
from diffusers import DiffusionPipeline
assert "diffusers_ext" not in sys.modules
for repo in calls:
    keep("generic", repo, DiffusionPipeline.from_pretrained(repo, trust_remote_code=True))
import diffusers_ext
for repo, (name, _) in calls.items():
    pipe = getattr(diffusers_ext, name).from_pretrained(repo, trust_remote_code=True)
    assert type(pipe) is getattr(diffusers_ext, name), repo
pipe = diffusers_ext.PaellaInpaintPipeline.from_pretrained("user/paella-exported", trust_remote_code=True)
assert type(pipe) is diffusers_ext.PaellaInpaintPipeline, type(pipe)
"""
    calls = {repo: call for repo, call in pushed.items() if repo.endswith("-exported")}
    results = load(code, calls)
    for repo, wanted in calls.items():
        assert_same(results["generic", repo], wanted)


def python_of(card: str) -> str:
    return "\n".join(re.findall(r"^```python\n(.*?)^```", card, re.M | re.S))


def card_of(online, repo: str) -> str:
    return online.repos[repo]["README.md"].decode()


def test_every_card_draws_from_the_repository(pushed, online, load, tmp_path):
    """The lines of each card, as they stand, in a folder with the pictures that they name."""
    tiny_picture(1).save(tmp_path / "picture.png")
    tiny_picture(1, 4, 4).save(tmp_path / "small.png")
    tiny_mask().save(tmp_path / "mask.png")
    tiny_mask().point(lambda value: value // 255).save(tmp_path / "labels.png")
    cards = {}
    for repo in pushed:
        card = card_of(online, repo)
        cards[repo] = python_of(card)
        assert f'from_pretrained("{repo}"' in cards[repo] and "pip install ." in card and "/tmp" not in card, repo
        assert "pipeline_tag: " in card and "pip install diffusers" not in card
        assert "diffusers_ext" in cards[repo] and ("import diffusers_ext\n" in card) != repo.endswith("-exported")
    code = f"""
import os
os.chdir({str(tmp_path)!r})
for repo, lines in {cards!r}.items():
    names = {{}}
    try:
        exec(lines, names)
    except Exception as error:
        raise AssertionError(f"{{repo}}:\\n{{lines}}") from error
    assert {{"image", "images", "larger", "text"}} & names.keys(), repo
"""
    load(QUICK + code, {})


def test_bundled_checkpoints_are_exported_and_load(online, load, tmp_path, capsys):
    """`export-hub --push`, with and without `--no-import`: cards name the repository, models and pipelines load."""
    calls, quick = {}, {"num_inference_steps": 1, "output_type": "pt"}
    inputs = {
        "ldm-super-resolution-scenes-64": {"image": tiny_picture(1)},
        "cascaded-scenes-64": {"class_labels": "red circle", "num_inference_steps": 2},  # one step reaches no level
    }
    for name in BUNDLED:
        folder = ROOT / "checkpoints" / name
        push = ["--push", "--hub_model_id", f"user/{name}"]
        assert cli.main(["export-hub", str(folder), *push]) == 0, capsys.readouterr()
        copy = ["--no-import", "--output_dir", str(tmp_path / name), "--push", "--hub_model_id", f"user/{name}-copy"]
        assert cli.main(["export-hub", str(folder), *copy]) == 0, capsys.readouterr()
        is_pipeline = (folder / "model_index.json").is_file()
        call = quick | inputs.get(name, {"prompt": "a large red circle"}) if is_pipeline else None
        for repo in (f"user/{name}", f"user/{name}-copy"):
            calls[repo] = (read_saved(folder).class_name, call)
            assert f'from_pretrained("{repo}"' in python_of(card_of(online, repo)), repo
            assert f'"checkpoints/{name}' not in python_of(card_of(online, repo)), repo
    code = """
import diffusers
for repo in [repo for repo in calls if repo.endswith("-copy")]:
    if calls[repo][1] is None:
        fingerprint("generic", repo, diffusers.AutoModel.from_pretrained(repo))
    else:
        loaded = diffusers.DiffusionPipeline.from_pretrained(repo, dtype=torch.float32, trust_remote_code=True)
        keep("generic", repo, loaded)
import diffusers_ext
for repo in [repo for repo in calls if not repo.endswith("-copy")]:
    if calls[repo][1] is None:
        fingerprint("generic", repo, diffusers.AutoModel.from_pretrained(repo))
    else:
        keep("generic", repo, diffusers.DiffusionPipeline.from_pretrained(repo, dtype=torch.float32))
sketches = diffusers_ext.PITIPipeline.from_prior("user/piti-scenes", "user/piti-scenes", subfolder="sketch")
assert sketches.config["condition_type"] == "sketch", sketches.config
"""
    results = load(code, calls)
    for name in BUNDLED:
        folder = ROOT / "checkpoints" / name
        one, other = results["generic", f"user/{name}"], results["generic", f"user/{name}-copy"]
        assert one[0] == other[0] == read_saved(folder).class_name
        assert all(torch.equal(one[2][key], other[2][key]) for key in one[2])
        if one[1] is not None:
            assert_alike(one[1], other[1])


def test_a_condition_and_its_prior_are_named_on_the_hub(online, tmp_path, monkeypatch, capsys):
    """`sample PRIOR --lora ADAPTER`, of repositories and of a folder in one; what is no pipeline says so."""
    prior, pipe = tiny_glide(upscale=False), tiny_piti("sketch", upscale=False)
    prior.save_pretrained(tmp_path / "prior")
    pipe.save_adapter(tmp_path / "prior" / "sketch", tmp_path / "prior", rank=2)
    push_folder(tmp_path / "prior", "user/shared-prior")
    push_folder(tmp_path / "prior" / "sketch", "user/sketches")
    monkeypatch.chdir(tmp_path / "prior" / "sketch")  # where nothing is called like them
    assert cli.main(["info", "user/shared-prior"]) == 0
    assert "adapter: --lora user/shared-prior/sketch" in capsys.readouterr().out.splitlines()
    lines = Image.new("L", (32, 32))
    lines.paste(255, (3, 4, 20, 5))
    lines.save("lines.png")
    words = ["sample", "user/shared-prior", "--sketch", "lines.png", "--steps", "2", "--out"]
    assert cli.main([*words, "none.png"]) == 2
    assert "takes other options: pass --lora user/shared-prior/sketch too" in capsys.readouterr().err
    for name, adapter in (("one.png", "user/sketches"), ("other.png", "user/shared-prior/sketch")):
        assert cli.main([*words, name, "--lora", adapter]) == 0, capsys.readouterr()
        assert Image.open(name).info["diffusers_ext"].count("PITIPipeline") == 1
    assert Image.open("one.png").tobytes() == Image.open("other.png").tobytes()
    assert cli.main([*words, "none.png", "--lora", "user/shared-prior/lines"]) == 2
    words = ["sample", "user/shared-prior", "a star", "--out", "none.png", "--lora", "user/shared-prior/lines"]
    assert cli.main(words) == 2
    assert "There is no adapter 'user/shared-prior/lines'" in capsys.readouterr().err
    for kind in (diffusers_ext.PITIPipeline, diffusers.DiffusionPipeline):
        with pytest.raises(ValueError, match="'user/sketches' holds what a condition adds to a prior, and no U-Net"):
            kind.from_pretrained("user/sketches")


@pytest.fixture(scope="module")
def trained(online, tmp_path_factory) -> dict[str, Path]:
    """A result of every recipe, two steps of its smoke preset, uploaded by `--push_to_hub`."""
    base, folders = tmp_path_factory.mktemp("trained"), {}
    for recipe in RECIPES:
        module = __import__(f"train_{recipe}")
        preset, folders[recipe] = ROOT / "training" / "presets" / f"{recipe}-smoke.yaml", base / recipe
        push = ["--push_to_hub", "--hub_model_id", f"user/trained-{recipe}", "--max_train_steps", "2"]
        module.main([str(preset), "--output_dir", str(folders[recipe]), *push])
        AcceleratorState._reset_state(reset_partial_state=True)
    return folders


def test_a_stage_is_trained_in_the_chain_of_one_on_the_hub(trained, tmp_path):
    """`--stages_before` takes the name that the stage below was pushed to."""
    preset = ROOT / "training" / "presets" / "cascaded-upscale-smoke.yaml"
    words = ["--stages_before", "user/trained-cascaded", "--max_train_steps", "1", "--output_dir", str(tmp_path)]
    __import__("train_cascaded").main([str(preset), *words])
    AcceleratorState._reset_state(reset_partial_state=True)
    assert (tmp_path / "validation-1.png").is_file()


def test_pitis_stages_chain_from_the_hub(trained, online, tmp_path):
    """Prior, encoder, both: each from the name that the last was pushed to, and the card names it as its base."""
    preset = ROOT / "training" / "presets" / "piti-joint-smoke.yaml"
    before, unets = "user/trained-piti", {}
    for stage in ("encoder", "joint"):
        words = ["--stage", stage, "--pretrained_model_name_or_path", before, "--max_train_steps", "1"]
        before = f"user/piti-{stage}"
        push = ["--push_to_hub", "--hub_model_id", before, "--output_dir", str(tmp_path / stage)]
        __import__("train_piti").main([str(preset), *words, *push])
        AcceleratorState._reset_state(reset_partial_state=True)
        assert f"base_model: {words[3]}" in card_of(online, before)
        unets[stage] = diffusers_ext.PITIPipeline.from_pretrained(before).unet.state_dict()
    prior = diffusers_ext.GlidePipeline.from_pretrained("user/trained-piti").unet.state_dict()
    assert all(torch.equal(value, prior[key]) for key, value in unets["encoder"].items())
    assert not all(torch.equal(value, prior[key]) for key, value in unets["joint"].items())


def test_a_result_of_every_recipe_loads_from_where_it_was_uploaded(trained, online, load):
    """By the lines of its card, in a fresh process: the weights that lie in the trainer's folder."""
    calls = {f"user/trained-{recipe}": (recipe, None) for recipe in RECIPES}
    cards = {repo: python_of(card_of(online, repo)) for repo in calls}
    for repo, card in cards.items():
        whole = card_of(online, repo)
        assert f'from_pretrained("{repo}"' in card and str(trained[calls[repo][0]]) not in whole, repo
        assert "pip install ." in whole and "pip install diffusers" not in whole, repo
    code = f"""
import numpy as np, PIL.Image
PIL.Image.fromarray(np.zeros((64, 64, 3), np.uint8)).save("picture.png")
for repo, lines in {cards!r}.items():
    names = {{}}
    try:
        exec(lines, names)
    except Exception as error:
        raise AssertionError(f"{{repo}}:\\n{{lines}}") from error
    loaded = next(names[name] for name in ("pipe", "model", "autoencoder", "clip") if name in names)
    fingerprint("card", repo, getattr(loaded, "unet", loaded))
"""
    results = load(f"import os; os.chdir(os.path.dirname(sys.argv[1]))\n{QUICK}{code}", calls)
    for repo, (recipe, _) in calls.items():
        part = "unet" if (trained[recipe] / "unet").is_dir() else "."
        files = sorted((trained[recipe] / part).glob("*.safetensors"))
        weights = {key: value for path in files if "lora" not in path.name for key, value in load_file(path).items()}
        found = results["card", repo][2]
        assert weights and all(torch.equal(found[key], value) for key, value in weights.items()), repo
