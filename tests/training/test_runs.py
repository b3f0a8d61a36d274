"""What a run promises, over all recipes: nothing is lost, mixed up, or trained otherwise than asked.

Each recipe runs once, to step 4 with checkpoints at 2 and 4, in the precision that the launcher asks for; the tests
resume copies of that folder.
"""

import json
import logging
import os
import re
import shutil
import stat
import sys
from pathlib import Path

import pytest
import torch
import train_autoencoder
import train_cascaded
import train_clip
import train_ldm
import train_optimus
import train_paella
import train_piti
import train_versatile
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from accelerate.state import AcceleratorState
from huggingface_hub import ModelCard
from pipelines.tiny_glide import tiny_glide, tiny_piti
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import BertConfig, BertModel, GPT2Config, GPT2Model, PreTrainedTokenizerFast

from diffusers_ext import PaellaPipeline
from diffusers_ext.losses.adversarial import hinge_discriminator_loss
from diffusers_ext.training.autoencoder.networks import DISCRIMINATOR_LOSSES
from diffusers_ext.training.cascaded.data import Classes
from diffusers_ext.training.cascaded.networks import build_pipeline as build_stage
from diffusers_ext.training.clip.args import ClipArgs
from diffusers_ext.training.clip.networks import build_clip
from diffusers_ext.training.optimus.args import OptimusArgs
from diffusers_ext.training.optimus.networks import build_model as build_optimus
from diffusers_ext.training_utils import checkpoints, result_folder
from diffusers_ext.training_utils.args import DataArgs, TrainArgs
from diffusers_ext.training_utils.args import parse_args as parse
from diffusers_ext.training_utils.checkpoints import CheckpointError
from diffusers_ext.training_utils.log import RunLog
from diffusers_ext.training_utils.loop import fit
from diffusers_ext.training_utils.objective import Objective
from diffusers_ext.training_utils.optimizers import SkippedSteps
from diffusers_ext.training_utils.run import start
from diffusers_ext.training_utils.tokenizers import train_clip_tokenizer

ROOT = Path(__file__).parents[2]
PRESETS = ROOT / "training" / "presets"
STEPS = ["--max_train_steps", "4", "--checkpointing_steps", "2", "--logging_steps", "3"]
SMALL = ["--max_train_samples", "24"]

# recipe -> (its script, words of a short run, words that make it another run and how the refusal names them)
RECIPES = {
    "vq": (
        train_autoencoder,
        [PRESETS / "autoencoder-smoke.yaml", "--use_ema", "true", "--disc_start", "2", "--kmeans_samples", "4"],
        ["--l1_weight", "0.5"],
        "--l1_weight 1.0 -> 0.5",
    ),
    "kl": (
        train_autoencoder,
        [PRESETS / "autoencoder-kl-smoke.yaml", "--disc_start", "1", "--disc_learning_rate", "1e-3"],
        ["--kl_weight", "0.1"],
        "--kl_weight 1e-06 -> 0.1",
    ),
    "gumbel": (train_autoencoder, [PRESETS / "autoencoder-gumbel-smoke.yaml"], ["--resolution", "16"], "--resolution"),
    "cascaded": (
        train_cascaded,
        [PRESETS / "cascaded-smoke.yaml", "--num_inference_steps", "1"],
        ["--cond_dropout_prob", "0.5"],
        "--cond_dropout_prob None -> 0.5",
    ),
    "cascaded-upscale": (
        train_cascaded,
        [PRESETS / "cascaded-upscale-smoke.yaml", "--num_inference_steps", "1"],
        ["--clean_prob", "0.5"],
        "--clean_prob 0.05 -> 0.5",
    ),
    "clip": (train_clip, [PRESETS / "clip-smoke.yaml"], ["--patch_weight", "1"], "--patch_weight 0.0 -> 1.0"),
    "paella": (
        train_paella,
        [PRESETS / "paella-smoke.yaml", "--num_inference_steps", "1"],
        ["--label_smoothing", "0.5"],
        "--label_smoothing 0.1 -> 0.5",
    ),
    "ldm": (
        train_ldm,
        [PRESETS / "ldm-smoke.yaml", "--num_inference_steps", "1"],
        ["--cond_dropout_prob", "0.5"],
        "--cond_dropout_prob None -> 0.5",
    ),
    "optimus": (train_optimus, [PRESETS / "optimus-smoke.yaml"], ["--free_bits", "0"], "--free_bits 0.5 -> 0.0"),
    "piti": (
        train_piti,
        [PRESETS / "piti-smoke.yaml", "--num_inference_steps", "1"],
        ["--cond_dropout_prob", "0.5"],
        "--cond_dropout_prob None -> 0.5",
    ),
    "versatile": (
        train_versatile,
        [PRESETS / "versatile-smoke.yaml", "--num_inference_steps", "1", "--validation_samples", "2"],
        ["--cond_dropout_prob", "0.5"],
        "--cond_dropout_prob 0.1 -> 0.5",
    ),
}
LEARNT = {
    "clip": ["tokenizer"],
    "ldm": ["tokenizer"],
    "piti": ["tokenizer"],
    "optimus": ["encoder_tokenizer", "decoder_tokenizer"],
}


def run(recipe: str, folder: Path, *more: str) -> None:
    script, words, *_ = RECIPES[recipe]
    try:
        script.main([*map(str, words), *SMALL, *STEPS, "--output_dir", str(folder), *more])
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture(autouse=True)
def launched(monkeypatch):
    """As `accelerate launch --cpu --mixed_precision bf16` in the repository would start a recipe."""
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


_finished: dict[str, Path] = {}


@pytest.fixture(scope="module", autouse=True)
def forget():
    yield
    _finished.clear()


@pytest.fixture
def finished(request, tmp_path_factory, tmp_path):
    """A copy of the recipe's run, which each recipe makes once."""
    recipe = request.param
    if recipe not in _finished:
        folder = tmp_path_factory.mktemp("runs") / recipe
        before = os.umask(0o027)
        try:
            run(recipe, folder)
        finally:
            os.umask(before)
        _finished[recipe] = folder
    return recipe, Path(shutil.copytree(_finished[recipe], tmp_path / recipe))


over_recipes = pytest.mark.parametrize("finished", RECIPES, indirect=True)


def lines_of(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


@over_recipes
def test_the_run_says_what_it_was_started_with(finished):
    recipe, folder = finished
    kept = json.loads((folder / "options.json").read_text())
    manifest = checkpoints.verify(folder / "checkpoint-4")
    assert {name: manifest[name] for name in kept} == kept
    assert kept["options"]["max_train_samples"] == 24 and kept["options"]["learning_rate"] > 0
    assert kept["options"]["mixed_precision"] == "bf16"  # what the launcher was told, not the preset's "no"
    assert kept["processes"] == 1 and 0 < kept["rows"] <= 24 and kept["versions"]["torch"] == torch.__version__
    assert manifest["step"] == 4 and len(kept["branches"]) == 1
    learnt = sorted(path.name for path in (folder / "checkpoint-4" / "learnt").glob("*"))
    assert learnt == sorted(LEARNT.get(recipe, []))
    modes = {stat.S_IMODE(path.stat().st_mode) for path in folder.rglob("*.safetensors")}
    assert modes == {0o640}  # the umask of the run, not safetensors' 0600
    card = ModelCard.load(folder / "README.md")
    batch = kept["options"]["train_batch_size"]
    assert f"1 process x {batch} samples x 1 micro-steps = {batch} samples a step" in card.text
    script = RECIPES[recipe][0].__name__
    assert f"accelerate launch --num_processes 1 --mixed_precision bf16 training/{script}.py" in card.text
    assert not [path for path in folder.parent.iterdir() if ".tmp-" in path.name]


@over_recipes
def test_resuming_from_an_older_checkpoint_branches_off(finished, caplog):
    """Newer checkpoints are put aside, options of the optimizers apply, and the log goes on as it would have."""
    recipe, folder = finished
    straight = lines_of(folder)
    changed = ["--learning_rate", "1e-5", "--adam_weight_decay", "0.5", "--adam_beta1", "0.25", "--ema_decay", "0.5"]
    changed += ["--disc_learning_rate", "1e-6"] if recipe == "kl" else []
    with caplog.at_level(logging.WARNING):
        run(
            recipe, folder, *changed, "--checkpointing_steps", "1", "--checkpoints_total_limit", "1",
            "--resume_from_checkpoint", "checkpoint-2",
        )  # fmt: skip
    assert re.search(r"From step 2 on this differs: .*--learning_rate \S+ -> 1e-05", caplog.text)
    assert "is called checkpoint-4.aside from now on" in caplog.text
    names = sorted(path.name for path in folder.glob("checkpoint-*"))
    assert names == ["checkpoint-4", "checkpoint-4.aside"]
    checkpoints.verify(folder / "checkpoint-4.aside")
    found, manifest = checkpoints.find_checkpoint(folder, "latest")
    assert found.name == "checkpoint-4" and [first for _, first in manifest["branches"]] == [0, 2]

    for path in found.glob("*optimizer.pt"):
        for group in torch.load(path, weights_only=True)["param_groups"]:
            assert group["betas"][0] == 0.25 and group["weight_decay"] == 0.5
    rates = torch.load(found / "lr_scheduler.pt", weights_only=True)["base_lrs"]
    assert max(rates) == pytest.approx(1e-5)
    if (found / "disc_lr_scheduler.pt").is_file():
        rate = 1e-6 if recipe == "kl" else 1e-5
        assert torch.load(found / "disc_lr_scheduler.pt", weights_only=True)["base_lrs"] == [rate]
    if (found / "ema.pt").is_file():
        assert torch.load(found / "ema.pt", weights_only=True)["decay"] == 0.5

    # the mean of the steps 1 to 3, of which two lie before the checkpoint; step 3 starts from its weights
    first, resumed = ({k: v for k, v in lines_of_run[0].items() if k not in ("lr", "samples_per_second")}
                      for lines_of_run in (straight, lines_of(folder)))  # fmt: skip
    assert first["step"] == 3 and resumed == first
    for name in LEARNT.get(recipe, []):
        before, now = (json.loads((path / "learnt" / name / "tokenizer.json").read_text())
                       for path in (folder / "checkpoint-4.aside", found))  # fmt: skip
        assert before == now


@over_recipes
def test_another_run_is_refused_and_its_differences_are_listed(finished):
    recipe, folder = finished
    words, named = RECIPES[recipe][2:]
    with pytest.raises(CheckpointError, match="pass --resume_with_changes") as refused:
        run(recipe, folder, *words, "--seed", "7", "--max_train_samples", "20", "--resume_from_checkpoint", "latest")
    message = str(refused.value)
    assert "--seed 0 -> 7" in message and named in message and "--max_train_samples 24 -> 20" in message
    assert "samples in the data set" in message and "learning_rate" not in message
    assert sorted(path.name for path in folder.glob("checkpoint-*")) == ["checkpoint-2", "checkpoint-4"]


def test_a_resume_with_changes_lists_and_takes_them(tmp_path, caplog):
    run("gumbel", tmp_path, "--max_train_steps", "1")
    with caplog.at_level(logging.WARNING):
        run(
            "gumbel", tmp_path, "--max_train_steps", "2", "--seed", "7", "--resume_from_checkpoint", "latest",
            "--resume_with_changes",
        )  # fmt: skip
    assert "From step 1 on this differs: --seed 0 -> 7; --max_train_steps 1 -> 2" in caplog.text
    with pytest.raises(CheckpointError, match="checkpoint-2 is at step 2, beyond --max_train_steps=1"):
        run("gumbel", tmp_path, "--max_train_steps", "1", "--seed", "7", "--resume_from_checkpoint", "latest")


def test_captions_that_changed_meanwhile_do_not_change_the_tokenizer(tmp_path):
    """Learnt again from other sentences it would give the words other numbers."""
    (tmp_path / "text").mkdir()
    text = tmp_path / "text" / "a.txt"
    text.write_text("a red ring\n" * 30 + "the sea at night\n" * 10)
    words = ["--train_data_dir", str(text.parent), "--output_dir", str(tmp_path / "run"), "--max_train_samples", "40"]
    preset = str(PRESETS / "optimus-smoke.yaml")
    train_optimus.main([preset, *words, "--max_train_steps", "1"])
    AcceleratorState._reset_state(reset_partial_state=True)
    text.write_text("zebras quietly juggling xylophones\n" * 40)
    more = ["--max_train_steps", "2", "--resume_from_checkpoint", "latest", "--resume_with_changes"]
    learnt = tmp_path / "run" / "encoder_tokenizer" / "tokenizer.json"
    before = learnt.read_text()
    train_optimus.main([preset, *words, *more])
    assert learnt.read_text() == before


def test_the_lists_of_options_name_options():
    scripts = {script for script, *_ in RECIPES.values()}
    classes = {value for script in scripts for name, value in vars(script).items() if name.endswith("Args")}
    for kind in classes:
        named = {*getattr(kind, "APPLIED", ()), *getattr(kind, "BOOKKEEPING", ())}
        assert named <= set(kind.__dataclass_fields__), kind


# Processes, versions: between records, no training needed


def compared(before: dict, *, processes: int = 1, **options) -> tuple[list[str], list[str], list[str]]:
    from diffusers_ext.training_utils.record import Record, compare

    train = TrainArgs(**options)
    now = {name: getattr(train, name) for name in ("train_batch_size", "gradient_accumulation_steps", "seed")}
    record = Record(now, processes, 10, {"torch": "2"}, "abc", [("x", 0)])
    manifest = {
        "options": {"train_batch_size": 4, "gradient_accumulation_steps": 1, "seed": 0},
        "processes": 2, "rows": 10, "versions": {"torch": "2"}, "commit": "abc",
    }  # fmt: skip
    return compare(manifest | before, record, train)


def test_fewer_processes_with_equal_steps_are_a_warning_and_others_a_refusal():
    refused, applied, warned = compared({}, processes=1, train_batch_size=8)
    assert refused == applied == [] and len(warned) == 1
    assert warned[0].startswith("2 -> 1 processes: the steps keep their 8 samples")
    refused, _, warned = compared({}, processes=1, train_batch_size=4)
    assert refused == ["2 -> 1 processes, so 8 -> 4 samples a step"] and warned == []
    refused, _, _ = compared({}, processes=2, train_batch_size=2, gradient_accumulation_steps=2)
    assert refused == ["--gradient_accumulation_steps 1 -> 2", "--train_batch_size 4 -> 2"]


def test_other_versions_are_a_warning():
    refused, _, warned = compared({"versions": {"torch": "1"}, "commit": None}, processes=2, train_batch_size=4)
    assert refused == [] and warned == [
        "The checkpoint was written by other versions, so results may differ: torch 1 -> 2, commit None -> abc"
    ]


# Checkpoints of branches, names, damage


def published(folder: Path, step: int, *branches: tuple[str, int]) -> Path:
    path = folder / f"checkpoint-{step}"
    checkpoints.publish(path, lambda staging: (staging / "x").touch(), {"step": step, "branches": list(branches)})
    return path


def test_only_the_way_to_the_resumed_checkpoint_stays(tmp_path):
    for step, branches in ((2, [("a", 0)]), (4, [("a", 0), ("b", 2)]), (5, [("a", 0)]), (6, [("a", 0), ("b", 2)])):
        published(tmp_path, step, *branches)
    (tmp_path / "checkpoint-6.aside").mkdir()
    checkpoints.put_aside(tmp_path, 5, [("a", 0)])
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == [
        "checkpoint-2",
        "checkpoint-4.aside",
        "checkpoint-5",
        "checkpoint-6.aside",
        "checkpoint-6.aside-2",
    ]


def test_what_was_just_written_is_never_rotated_away(tmp_path):
    for step in (8, 9, 3):
        newest = published(tmp_path, step)
    checkpoints.rotate(tmp_path, 1, newest=newest)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-3"]


@pytest.mark.parametrize(
    "name, message",
    [
        (
            "true",
            "--resume_from_checkpoint true: there is no such folder, neither in .*checkpoints there: checkpoint-4",
        ),
        ("checkpoint-5", "checkpoint-5: there is no such folder"),
        (".", r"\. is the folder of a run: name one of its checkpoints \(checkpoint-4\)"),
    ],
)
def test_a_wrong_name_says_which_there_are(tmp_path, monkeypatch, name, message):
    published(tmp_path, 4)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CheckpointError, match=message):
        checkpoints.find_checkpoint(tmp_path, name)


def test_a_bare_name_lies_in_the_output_dir(tmp_path):
    path = published(tmp_path, 4)
    assert checkpoints.find_checkpoint(tmp_path, "checkpoint-4")[0] == path


@pytest.mark.parametrize("change", [('"step": 6', '"step": 2'), ('"x"', '"y"'), ('"sha256": "', '"sha257": "')])
def test_a_changed_manifest_is_damage(tmp_path, change):
    path = published(tmp_path, 6) / "manifest.json"
    assert change[0] in path.read_text()
    path.write_text(path.read_text().replace(*change))
    with pytest.raises(CheckpointError, match="damaged|is missing|no readable"):
        checkpoints.verify(path.parent)


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), RuntimeError("unexpected pos 64 vs 0")])
def test_a_full_disk_is_named(tmp_path, monkeypatch, error):
    if isinstance(error, RuntimeError):  # torch.save's own error: only the disk itself tells
        usage = type(shutil.disk_usage(tmp_path))
        monkeypatch.setattr(checkpoints.shutil, "disk_usage", lambda path: usage(100, 100, 0))

    def write(staging):
        (staging / "half").write_bytes(bytes(10))
        raise error

    with pytest.raises(
        OSError, match="No space left on the disk of .*checkpoint-1 could not be written after 10 bytes"
    ):
        checkpoints.publish(tmp_path / "checkpoint-1", write, {"step": 1})
    assert not list(tmp_path.iterdir())


# The result: whole or not at all


def save_parts(folder: Path, seed: int) -> None:
    """The shape of a pipeline: two networks, which must be of one run, and the index that names them."""
    for name in ("unet", "vqvae"):
        (folder / name).mkdir(parents=True)
        save_file({"weight": torch.full((3,), float(seed))}, folder / name / "model.safetensors")
        (folder / name / "config.json").write_text(str(seed))
    (folder / "README.md").write_text(str(seed))
    (folder / "model_index.json").write_text(json.dumps({"unet": ["diffusers", "VQModel"], "seed": seed}))


def seed_of(folder: Path) -> int:
    """The one seed of all parts."""
    seed = json.loads((folder / "model_index.json").read_text())["seed"]
    for name in ("unet", "vqvae"):
        assert load_file(folder / name / "model.safetensors")["weight"].tolist() == [seed] * 3
        assert (folder / name / "config.json").read_text() == str(seed)
    assert (folder / "README.md").read_text() == str(seed)
    return seed


def killed_at(operation: int, work) -> int:
    """Forks a process that dies as by SIGKILL before its n-th operation on files; its exit status (0: it ended)."""
    child = os.fork()
    if child == 0:
        left = [operation]

        def count(event: str, arguments: tuple) -> None:
            writes = event == "open" and isinstance(arguments[1], str) and set(arguments[1]) & set("wax+")
            if writes or event.split(".")[0] in ("os", "shutil", "ctypes"):
                left[0] -= 1
                if left[0] < 0:
                    os._exit(9)

        sys.addaudithook(count)
        try:
            work()
        except BaseException:
            os._exit(1)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


@pytest.mark.parametrize("place", ["exchanged", "two renames", "the root of a volume"])
def test_a_kill_at_any_moment_leaves_the_old_result_or_the_new_one(tmp_path, monkeypatch, place):
    monkeypatch.setattr(checkpoints, "_fsync", lambda path: None)  # a kill is no power failure
    for name in ("one", "other"):
        (tmp_path / name).mkdir()
    if place == "exchanged":
        try:
            checkpoints._exchange(tmp_path / "one", tmp_path / "other")
        except OSError:
            pytest.skip("this file system cannot exchange two folders")
    else:  # as on file systems that cannot

        def refuse(one, other):
            raise OSError(22, "not here")

        monkeypatch.setattr(checkpoints, "_exchange", refuse)
    if place == "the root of a volume":
        monkeypatch.setattr(Path, "is_mount", lambda self: True)
    found, operation, status = [], 0, 9
    while status == 9:
        base = tmp_path / str(operation)
        run_folder = base / "run"
        run_folder.mkdir(parents=True)
        save_parts(run_folder, 1)
        published(run_folder, 4)
        (run_folder / "log.jsonl").write_text("{}\n")
        (run_folder / "diffusion_pytorch_model-00001-of-00002.safetensors").write_bytes(b"of an older result")
        status = killed_at(
            operation, lambda folder=run_folder: result_folder.write_result(folder, lambda f: save_parts(f, 2))
        )
        assert status in (0, 9)
        if place == "exchanged":
            found.append(seed_of(run_folder))
        result_folder.recover_result(run_folder)  # as every run does at its start
        assert place == "exchanged" or found.append(seed_of(run_folder)) is None
        checkpoints.verify(run_folder / "checkpoint-4")
        assert (run_folder / "log.jsonl").read_text() == "{}\n"
        rest = {"checkpoint-4", "log.jsonl", "unet", "vqvae", "README.md", "model_index.json"}
        stale = {"diffusion_pytorch_model-00001-of-00002.safetensors"} if found[-1] == 1 else set()
        assert {path.name for path in run_folder.iterdir()} == rest | stale
        assert [path.name for path in base.iterdir()] == ["run"]
        shutil.rmtree(base)
        operation += 1
    assert found == sorted(found) and set(found) == {1, 2} and operation > 40  # old, from some moment on new


def test_the_folder_stays_the_users(tmp_path, monkeypatch):
    """Its mode, files of other names, and the place that the process works in."""
    folder = tmp_path / "run"
    folder.mkdir(mode=0o750)
    own = folder / "model-of-mine.safetensors"
    save_file({"weight": torch.zeros(1)}, own)
    for number, place in enumerate((tmp_path, folder), start=1):
        monkeypatch.chdir(place)
        result_folder.write_result(folder, lambda staging, seed=number: save_parts(staging, seed))
        assert Path.cwd() == place and seed_of(folder) == number and own.is_file()
        assert folder.stat().st_mode & 0o777 == 0o750
    assert (Path("unet") / "config.json").read_text() == "2"


def test_a_result_that_is_not_finite_is_not_written(tmp_path):
    save_parts(tmp_path / "run", 1)

    def save(folder: Path) -> None:
        save_parts(folder, 2)
        save_file({"a": torch.ones(1), "b": torch.tensor([1, float("nan")])}, folder / "unet" / "model.safetensors")

    with pytest.raises(FloatingPointError, match="`b` of unet/model.safetensors is not finite"):
        result_folder.write_result(tmp_path / "run", save)
    assert seed_of(tmp_path / "run") == 1


@pytest.mark.parametrize("finished", ["paella"], indirect=True)
def test_a_failed_export_leaves_the_old_result(finished, monkeypatch):
    _, folder = finished
    before = {path: path.read_bytes() for path in folder.rglob("*.safetensors") if "checkpoint" not in str(path)}

    def full(self, folder, *args, **kwargs):
        Path(folder, "model_index.json").write_text("{}")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(PaellaPipeline, "save_pretrained", full)
    with pytest.raises(OSError, match="No space left on the disk of"):
        run("paella", folder, "--max_train_steps", "5", "--resume_from_checkpoint", "latest")
    assert {path: path.read_bytes() for path in before} == before


# What the launcher was told


@pytest.mark.parametrize(
    "told, words, precision, source",
    [
        ("bf16", [], "bf16", "the launcher"),
        ("bf16", ["--mixed_precision", "no"], "no", "the command line"),
        ("no", ["--mixed-precision=bf16"], "bf16", "the command line"),
        ("no", [], "fp16", "the preset"),
        (None, [], "fp16", "the preset"),
    ],
)
def test_precision_is_the_command_lines_then_the_launchers_then_the_presets(
    tmp_path, monkeypatch, told, words, precision, source
):
    (tmp_path / "p.yaml").write_text("dataset_name: scenes\nmixed_precision: fp16\n")
    monkeypatch.delenv("ACCELERATE_MIXED_PRECISION")
    if told:
        monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", told)
    _, train = parse((DataArgs, TrainArgs), [str(tmp_path / "p.yaml"), *words])
    assert train.mixed_precision == precision and train.origin.sources["mixed_precision"] == source
    assert train.origin.sources["gradient_accumulation_steps"] == "the default"  # which the preset does not name


def test_arguments_that_were_built_by_hand_follow_the_launcher_too(tmp_path, caplog):
    with caplog.at_level(logging.INFO):
        accelerator = start(TrainArgs(output_dir=str(tmp_path), train_batch_size=4))
    assert accelerator.mixed_precision == "bf16"
    assert "1 process x 4 samples x 1 micro-steps = 4 samples a step" in caplog.text
    assert "precision bf16 (from the launcher)" in caplog.text


class Line(Objective):
    def __init__(self, network: nn.Module, loss):
        super().__init__()
        self.network, self.loss = network, loss

    def losses(self, batch, generators, step):
        return {"loss": self.loss(self.network, batch)}


def linear_run(tmp_path, **options) -> torch.Tensor:
    args = TrainArgs(
        output_dir=str(tmp_path), max_train_steps=2, train_batch_size=2, learning_rate=0.1, adam_epsilon=1.0,
        max_grad_norm=1e9, **options
    )  # fmt: skip
    torch.manual_seed(0)
    model = nn.Linear(3, 1)
    rows = [torch.full((3,), float(i)) for i in range(8)]
    accelerator = start(args)
    fit(
        accelerator, Line(model, lambda network, batch: network(batch).square().mean()), rows, args,
        transform=lambda row, generator: row,
    )  # fmt: skip
    AcceleratorState._reset_state(reset_partial_state=True)
    return model.weight.detach()


def test_the_environments_accumulation_counts_once(tmp_path, monkeypatch):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
    asked = linear_run(tmp_path / "asked", gradient_accumulation_steps=2)
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "2")
    told = linear_run(tmp_path / "told")
    assert torch.equal(asked, told)  # with a large epsilon a gradient that is halved once more shows
    assert json.loads((tmp_path / "told" / "options.json").read_text())["options"]["gradient_accumulation_steps"] == 2
    _, train = parse((DataArgs, TrainArgs), ["--dataset_name", "scenes", "--gradient_accumulation_steps", "3"])
    assert train.gradient_accumulation_steps == 3


@pytest.mark.parametrize(
    "environment, message",
    [
        ({"ACCELERATE_MIXED_PRECISION": "fp16"}, r"--mixed_precision=fp16 \(from the launcher\) needs a GPU"),
        (
            {"ACCELERATE_MIXED_PRECISION": "fp8"},
            "The launcher asks for --mixed_precision fp8; the recipes know no, fp16",
        ),
        ({"ACCELERATE_USE_FSDP": "true"}, "configured for FSDP, which the recipes do not know yet"),
        ({"ACCELERATE_USE_DEEPSPEED": "true"}, "configured for DeepSpeed"),
        ({"ACCELERATE_USE_MEGATRON_LM": "true"}, "configured for Megatron-LM"),
        ({"ACCELERATE_USE_PARALLELISM_CONFIG": "true"}, "configured for a parallelism configuration"),
        ({"ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "-2"}, "='-2' is no number of micro-steps > 0: unset it"),
    ],
)
@pytest.mark.parametrize("recipe", ["paella", "vq"])
def test_what_cannot_be_done_as_configured_is_refused_by_name(tmp_path, monkeypatch, environment, message, recipe):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=message):
        run(recipe, tmp_path)
    assert not list(tmp_path.iterdir())


# Numbers that are not finite


def test_the_scaler_may_skip_19_steps_in_a_row_but_not_20():
    parameter = nn.Parameter(torch.ones(2))
    accelerator = Accelerator(cpu=True)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    optimizer = AcceleratedOptimizer(torch.optim.SGD([parameter], lr=0.1), scaler=scaler)
    skipped = SkippedSteps()

    def step(number: int, factor: float) -> None:
        optimizer.zero_grad()
        loss = (parameter * factor).sum()
        scaler.scale(loss).backward()
        optimizer.step()
        skipped.add(optimizer.step_was_skipped, number, loss.detach())

    for number in range(19):
        step(number, float("inf"))
    step(19, 1.0)  # a good one starts the count anew
    assert skipped.count == 0 and torch.allclose(parameter, torch.full((2,), 0.9))
    for number in range(19):
        step(number, float("nan"))
    assert skipped.count == 19 and bool(torch.isfinite(parameter).all())
    with pytest.raises(FloatingPointError, match="not finite in 20 steps in a row, up to step 19 .*bf16"):
        step(19, float("nan"))
    assert accelerator.scaler is None


def test_a_discriminator_that_is_not_finite_stops_the_run_and_nothing_is_saved(tmp_path, monkeypatch):
    calls = []

    def once(real, fake):
        calls.append(1)
        return hinge_discriminator_loss(real, fake) * (float("nan") if len(calls) == 2 else 1.0)

    monkeypatch.setitem(DISCRIMINATOR_LOSSES, "hinge", once)
    with pytest.raises(FloatingPointError, match="The gradient of the discriminator in step 2 is not finite"):
        run("kl", tmp_path, "--checkpointing_steps", "1")
    assert sorted(path.name for path in tmp_path.glob("checkpoint-*")) == ["checkpoint-1", "checkpoint-2"]
    monkeypatch.undo()


def test_weights_that_are_not_finite_are_neither_saved_nor_resumed(tmp_path, monkeypatch):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
    linear_run(tmp_path / "good")
    args = TrainArgs(output_dir=str(tmp_path / "bad"), max_train_steps=1, train_batch_size=2, learning_rate=3e37)
    model, rows = nn.Linear(3, 1), [torch.full((3,), float(i)) for i in range(8)]
    with pytest.raises(FloatingPointError, match="`network.weight` of model is not finite after step 1, so nothing"):
        accelerator = start(args)
        model.weight.data.fill_(-3e38)
        fit(
            accelerator, Line(model, lambda network, batch: network(batch * 1e-38).mean()), rows, args,
            transform=lambda row, generator: row,
        )  # fmt: skip
    assert not list((tmp_path / "bad").glob("checkpoint-*"))
    AcceleratorState._reset_state(reset_partial_state=True)

    found = tmp_path / "good" / "checkpoint-2"
    state = load_file(found / "model.safetensors")
    state["network.bias"][0] = float("inf")  # as a version without the check would have saved it
    checkpoints.publish(
        found, lambda f: [shutil.copy(p, f) for p in found.glob("*.pt")] and save_file(state, f / "model.safetensors"),
        {"step": 2},
    )  # fmt: skip
    with pytest.raises(CheckpointError, match="`network.bias` in .*model.safetensors is not finite: resume from"):
        linear_run(tmp_path / "good", resume_from_checkpoint="latest")


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory) -> dict[str, Path]:
    """Folders that the recipes load networks from; the pipelines among them are fixtures of this repository."""
    base = tmp_path_factory.mktemp("pretrained")
    os.environ["ACCELERATE_USE_CPU"] = "true"
    bert = BertConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8, vocab_size=300)
    gpt2 = GPT2Config(n_embd=8, n_layer=1, n_head=2, n_positions=32, vocab_size=300)
    train = OptimusArgs(
        latent_dim=4, encoder_hidden_size=8, encoder_num_layers=1, decoder_hidden_size=8, decoder_num_layers=1,
        num_attention_heads=2, vocab_size=300,
    )  # fmt: skip
    model, tokenizers = build_optimus(train, ["a red ring"])
    model.save_pretrained(base / "optimus")
    for part, tokenizer in zip(("encoder", "decoder"), tokenizers, strict=True):
        tokenizer.save_pretrained(base / "optimus" / f"{part}_tokenizer")
    for name, network, tokenizer in (("bert", BertModel(bert), 0), ("gpt2", GPT2Model(gpt2), 1)):
        network.save_pretrained(base / name)
        tokenizers[tokenizer].save_pretrained(base / name)
    train_autoencoder.build_autoencoder(
        train_autoencoder.AutoencoderArgs(block_out_channels=[8, 16], num_vq_embeddings=8), 32
    ).save_pretrained(base / "vq")
    clip = ClipArgs(
        text_width=8, text_layers=1, vision_width=8, vision_layers=1, num_attention_heads=2, projection_dim=8,
        vocab_size=300,
    )  # fmt: skip
    words = train_clip_tokenizer(["a red ring"], clip.vocab_size, clip.max_length)
    build_clip(clip, words, 32).save_pretrained(base / "clip")
    words.save_pretrained(base / "clip")
    stage, data, _ = train_cascaded.parse_args([str(PRESETS / "cascaded-smoke.yaml")])
    build_stage(stage, data.resolution, Classes(48)).save_pretrained(base / "cascaded")
    tiny_glide(upscale=False).save_pretrained(base / "glide")
    tiny_glide().save_pretrained(base / "glide-upscaled")
    tiny_piti(upscale=False).save_pretrained(base / "piti")
    checkpoints_dir, fixtures = ROOT / "checkpoints", ROOT / "tests" / "fixtures" / "pipelines"
    return {
        "cascaded": base / "cascaded", "glide": base / "glide", "piti": base / "piti",
        "glide-upscaled": base / "glide-upscaled",
        "optimus": base / "optimus", "bert": base / "bert", "gpt2": base / "gpt2", "vq": base / "vq",
        "clip": base / "clip", "versatile-unet": fixtures / "versatile-text-to-image" / "unet",
        "paella": checkpoints_dir / "paella-scenes-64", "kl-f4": checkpoints_dir / "kl-f4-scenes-64",
        "paella-fixture": fixtures / "paella", "ldm-text": fixtures / "ldm-text", "ldm-class": fixtures / "ldm-class",
        "versatile": fixtures / "versatile-text-to-image",
    }  # fmt: skip


# recipe, option, folder, file there, further words ({name}: a folder of `pretrained`)
LOADED = [
    ("vq", "pretrained_model_name_or_path", "vq", ".", []),
    ("vq", "perceptual_model", "paella", "image_encoder", []),
    ("vq", "feature_model", "paella", "image_encoder", []),
    ("paella", "pretrained_vqvae_name_or_path", "vq", ".", []),
    ("paella", "pretrained_clip_name_or_path", "paella", "text_encoder", []),
    ("paella", "pretrained_clip_name_or_path", "paella", "image_encoder", []),
    ("paella", "pretrained_model_name_or_path", "paella-fixture", "unet", []),
    ("paella", "pretrained_model_name_or_path", "paella-fixture", "vqvae", []),
    ("ldm", "pretrained_vqvae_name_or_path", "kl-f4", ".", []),
    ("ldm", "pretrained_model_name_or_path", "ldm-text", "bert", []),
    ("ldm", "pretrained_model_name_or_path", "ldm-text", "unet", []),
    ("ldm", "pretrained_model_name_or_path", "ldm-text", "vqvae", []),
    ("optimus", "pretrained_model_name_or_path", "optimus", ".", []),
    ("optimus", "pretrained_encoder_name_or_path", "bert", ".", ["--pretrained_decoder_name_or_path", "{gpt2}"]),
    ("optimus", "pretrained_decoder_name_or_path", "gpt2", ".", ["--pretrained_encoder_name_or_path", "{bert}"]),
    ("versatile", "pretrained_vae_name_or_path", "kl-f4", ".", []),
    ("versatile", "pretrained_optimus_name_or_path", "optimus", ".", []),
    ("versatile", "pretrained_clip_name_or_path", "paella", "text_encoder", []),
    ("versatile", "pretrained_clip_name_or_path", "paella", "image_encoder", []),
    ("versatile", "pretrained_model_name_or_path", "versatile", "unet", []),
    ("versatile", "pretrained_unet_name_or_path", "versatile-unet", ".", []),
    ("clip", "pretrained_model_name_or_path", "clip", ".", []),
    ("cascaded", "pretrained_model_name_or_path", "cascaded", "unet", []),
    ("cascaded", "pretrained_unet_name_or_path", "cascaded", "unet", ["--unet_subfolder", "unet"]),
    ("piti", "pretrained_model_name_or_path", "glide", "unet", []),
    ("piti", "pretrained_model_name_or_path", "glide", "text_encoder", []),
    ("piti", "pretrained_model_name_or_path", "piti", "encoder", ["--stage", "joint"]),
    ("piti", "pretrained_upsampler_name_or_path", "glide-upscaled", "upscale_unet",
     ["--stage", "prior_upsampler", "--pretrained_model_name_or_path", "{glide}"]),
]  # fmt: skip


@pytest.mark.parametrize("damage", ["missing", "not finite"])
@pytest.mark.parametrize("recipe, option, name, part, more", LOADED)
def test_a_network_that_is_not_whole_and_finite_is_refused(
    tmp_path, pretrained, recipe, option, name, part, more, damage
):
    folder = Path(shutil.copytree(pretrained[name], tmp_path / name))
    (weights,) = (folder / part).glob("*.safetensors")
    state = load_file(weights)
    # of a decoder, where there is one: an encoder's would be met in the first step
    key = max((key for key in state if state[key].is_floating_point()), key=lambda key: ("decoder" in key, key))
    if damage == "missing":
        del state[key]
    else:
        state[key].flatten()[-1] = float("nan")
    save_file(state, weights, metadata={"format": "pt"})
    words = [f"--{option}", str(folder), *(word.format(**pretrained) for word in more)]
    script, preset, *_ = RECIPES[recipe]
    wanted = rf"`{re.escape(key)}` in .*{weights.name} is not finite" if damage != "missing" else (
        rf"{weights.name} lacks `{re.escape(key)}`"
    )  # fmt: skip
    with pytest.raises(ValueError, match=wanted):
        script.main([*map(str, preset), *SMALL, *STEPS, "--output_dir", str(tmp_path / "run"), *words])


# The log


def test_logs_keep_significant_digits_and_means_of_what_was_logged(tmp_path, monkeypatch):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
    accelerator = start(args := TrainArgs(output_dir=str(tmp_path)))
    log = RunLog(accelerator, args)
    log.begin(0)
    for step in range(4):
        values = {"loss": torch.tensor(1.5e-8)}
        if step >= 3:
            values["disc_loss"] = torch.tensor(0.995)
        log.add(values, 4)
    log.flush(4, lr=4.5e-6, broken=float("nan"))
    (line,) = lines_of(tmp_path)
    assert line["loss"] == pytest.approx(1.5e-8) and line["disc_loss"] == pytest.approx(0.995)
    assert line["lr"] == 4.5e-6 and line["broken"] is None


# Fixtures of older versions


def test_a_checkpoint_without_a_record_is_resumed(tmp_path, caplog):
    """As 2a37a55 wrote it: no options, no log, no tokenizer, no hash of the manifest."""
    run("optimus", tmp_path / "run", "--max_train_steps", "1")
    folder = tmp_path / "run" / "checkpoint-1"
    manifest = json.loads((folder / "manifest.json").read_text())
    shutil.rmtree(folder / "learnt")
    (folder / "log.pt").unlink()
    files = {name: value for name, value in manifest["files"].items() if (folder / name).is_file()}
    old = {"step": 1, "seed": 0, "torch": torch.__version__, "files": files}
    (folder / "manifest.json").write_text(json.dumps(old))
    with caplog.at_level(logging.INFO):
        run("optimus", tmp_path / "run", "--max_train_steps", "2", "--resume_from_checkpoint", "latest")
    assert "says nothing of its options" in caplog.text and "holds no encoder_tokenizer" in caplog.text
    assert PreTrainedTokenizerFast.from_pretrained(tmp_path / "run" / "checkpoint-2" / "learnt" / "encoder_tokenizer")


def test_every_option_that_names_a_network_is_in_the_table():
    options = {(RECIPES[recipe][0], option) for recipe, option, *_ in LOADED}
    for script, *_ in RECIPES.values():
        args = next(value for name, value in vars(script).items() if name.endswith("Args") and name not in (
            "DataArgs", "TrainArgs"))  # fmt: skip
        named = {field for field in args.__dataclass_fields__ if field.startswith("pretrained_")}
        assert named - {"pretrained_tokenizer_name_or_path"} == {
            option for other, option in options if other is script and option.startswith("pretrained_")
        }
