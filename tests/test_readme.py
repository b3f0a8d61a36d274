"""What the documents promise runs: every Python block, every shell line, every preset.

Python blocks run in processes of their own, those under one heading together and in order, in a copy of what a
clone holds, with a double of the Hub; `runs/<name>`, where the shell lines train to, is the bundled checkpoint there.
README's fine-tuning command is run for two steps, its upload included.

A shell line is checked by its first words (environment assignments in front are skipped):

| line | check |
|---|---|
| `make X` | X is a target of the Makefile |
| `accelerate launch training/train_R.py ...` (or `-m`, the module) | R's own parser accepts the words as they stand |
| `diffusers-ext ...`, `python FILE ...`, `python -m MODULE ...` | runs with `--help`, which names every option used |
| `pip install ...` | the extras exist |
| `git clone`, `cd`, `source`, `export`, `hf` | nothing of ours runs |

Anything else fails: a new kind of line needs a rule here.
"""

import ast
import contextlib
import functools
import importlib
import io
import itertools
import os
import re
import shlex
import shutil
import tomllib
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from PIL import Image

from diffusers_ext import cli
from diffusers_ext.data.scenes import full_caption, render, sample_scene

ROOT = Path(__file__).parents[1]
DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md"] + sorted(
    path for folder in ("training", "docs", "benchmarks", "checkpoints/*") for path in ROOT.glob(f"{folder}/*.md")
)
ON_STAND_INS = "weights_"  # documents whose Python runs in tests/conversion/test_weights_page*.py, on stand-ins
# `runs/<name>` in a block -> the words after `train_ldm.py ldm-smoke.yaml` that make it, in seconds.
TRAINED = {
    "ldm-smoke": [],
    "ldm-smoke-maps": ["--task", "semantic", "--output_dir", "runs/ldm-smoke-maps"],
    "ldm-smoke-inpainting": ["--task", "inpainting", "--output_dir", "runs/ldm-smoke-inpainting"],
}
PRESETS = sorted((ROOT / "training" / "presets").glob("*.yaml"))

# `-paper-` preset -> the recipe's functions that build the networks from the parsed arguments, and the exact counts.
PAPER_PARAMETERS = {
    # Latent Diffusion, first stages: KL 55.3, 83.7, 69.6, 103.9, VQ 55.3, 53.2, 67.7, 67.7, 69.6 million. f2 was never
    # released: its counts are those of the paper's channels and codes with the levels of f4.
    "autoencoder-paper-kl-f2.yaml": {"build_autoencoder": 13_314_465},
    "autoencoder-paper-kl-f4.yaml": {"build_autoencoder": 55_312_063},
    "autoencoder-paper-kl-f8.yaml": {"build_autoencoder": 83_653_863},
    "autoencoder-paper-kl-f16.yaml": {"build_autoencoder": 69_610_963},
    "autoencoder-paper-kl-f32.yaml": {"build_autoencoder": 103_880_131},
    "autoencoder-paper-vq-f2.yaml": {"build_autoencoder": 13_313_937},
    "autoencoder-paper-vq-f4.yaml": {"build_autoencoder": 55_322_782},
    "autoencoder-paper-vq-f4-noattn.yaml": {"build_autoencoder": 53_219_486},
    "autoencoder-paper-vq-f8.yaml": {"build_autoencoder": 67_717_295},
    "autoencoder-paper-vq-f8-n256.yaml": {"build_autoencoder": 67_652_783},
    "autoencoder-paper-vq-f16.yaml": {"build_autoencoder": 69_593_371},
    # Latent Diffusion, U-Nets: 274.1, 295.0, 395.0, 400.9, 872.3, 403.6, 246.3, 215.2, 113.6, 387.2, 215 million, and
    # with their encoders 1.45 billion (text) and 306 million (layout; less 4.2 of an output head that nothing used).
    # Layout on COCO was never released: the paper counts 345 million in all, these are 367.
    "ldm-paper-celebahq-256.yaml": {"build_unet": 274_056_163},
    "ldm-paper-ffhq-256.yaml": {"build_unet": 274_056_163},
    "ldm-paper-lsun-bedrooms-256.yaml": {"build_unet": 274_056_163},
    "ldm-paper-lsun-churches-256.yaml": {"build_unet": 294_966_916},
    "ldm-paper-imagenet-ldm8.yaml": {"build_unet": 394_984_196, "build_conditioner": 1000 * 512},
    "ldm-paper-imagenet-ldm4.yaml": {"build_unet": 400_920_579, "build_conditioner": 1001 * 512},
    "ldm-paper-text-laion.yaml": {"build_unet": 872_300_484, "build_conditioner": 581_994_042},
    "ldm-paper-text-conceptual.yaml": {"build_unet": 403_623_939, "build_conditioner": 186_154_682},
    "ldm-paper-layout-openimages.yaml": {"build_unet": 246_277_379, "build_conditioner": 54_656_000},
    "ldm-paper-layout-coco.yaml": {"build_unet": 312_241_540, "build_conditioner": 54_656_000},
    "ldm-paper-semantic-256.yaml": {"build_unet": 215_229_315, "build_conditioner": 182 * 3},
    "ldm-paper-semantic-512.yaml": {"build_unet": 215_229_315, "build_conditioner": 182 * 3},
    "ldm-paper-super-resolution.yaml": {"build_unet": 113_622_563},
    "ldm-paper-super-resolution-bsr.yaml": {"build_unet": 113_622_563},
    "ldm-paper-inpainting-big.yaml": {"build_unet": 387_245_827},
    "ldm-paper-inpainting.yaml": {"build_unet": 215_230_467},
    # ADM's base and upsampler as released; the stages of Cascaded Diffusion as our network has them, unverified.
    "cascaded-paper-adm-64.yaml": {"build_unet": 295_904_454},
    "cascaded-paper-adm-64-256.yaml": {"build_unet": 311_795_910},
    "cascaded-paper-32.yaml": {"build_unet": 825_505_542},
    "cascaded-paper-32-64.yaml": {"build_unet": 751_690_758},
    "cascaded-paper-64-128.yaml": {"build_unet": 575_283_203},
    "cascaded-paper-64-256.yaml": {"build_unet": 634_046_467},
    "cascaded-paper-lsun-64-128.yaml": {"build_unet": 575_099_907},
    # PITI: GLIDE's base, 385,030,726 with its text encoder; 338,015,302, 338,012,166, 338,020,006 with the encoders.
    "piti-paper-prior.yaml": {"build_unet": 308_728_902, "build_text_encoder": 76_301_824},
    **{
        f"piti-paper-{kind}-{run}.yaml": {"build_unet": 308_728_902, "build_encoder": count}
        for kind, count in (("mask", 29_286_400), ("sketch", 29_283_264), ("geometry", 29_291_104))
        for run in ("encoder", "encoder-continued", "joint")
    },
    "piti-paper-upsampler.yaml": {"build_encoder": 29_286_400},
    "paella-paper-v1.yaml": {"build_unet": 577_995_184},
    # Versatile Diffusion: one flow, two (a context more), all four.
    "versatile-paper-single-256.yaml": {"build_unet": 859_520_964},
    "versatile-paper-single-512.yaml": {"build_unet": 859_520_964},
    "versatile-paper-dual-256.yaml": {"build_unet": 1_126_760_324},
    "versatile-paper-dual-512.yaml": {"build_unet": 1_126_760_324},
    "versatile-paper-four-256.yaml": {"build_unet": 2_566_318_852},
    "versatile-paper-four-512.yaml": {"build_unet": 2_566_318_852},
    # Their networks are BERT and GPT-2 as published, fetched by name.
    "optimus-paper-snli.yaml": {},
    "optimus-paper-wikipedia.yaml": {},
}


def blocks(document: Path, *languages: str) -> list[tuple[str, str]]:
    """(heading, text) of every fenced block in one of `languages`, in order."""
    heading, fence, found = "", None, []
    for line in document.read_text(encoding="utf-8").splitlines():
        if fence is None and re.match(r"#+ ", line):
            heading = line.lstrip("# ")
        elif fence is None and (match := re.match(r"\s*```(\w*)", line)):
            fence, lines = match[1], []
        elif fence is not None and line.strip() == "```":
            if fence in languages:
                found.append((heading, "\n".join(lines)))
            fence = None
        elif fence is not None:
            lines.append(line)
    assert fence is None, f"{document}: a code block is not closed"
    return found


def python_sections(stand_ins: bool = False) -> list[tuple[str, str]]:
    """("document: heading", the heading's blocks one after another), of the documents that run on stand-ins or not."""
    sections: dict[str, list[str]] = {}
    for document in DOCUMENTS:
        if document.name.startswith(ON_STAND_INS) != stand_ins:
            continue
        for heading, text in blocks(document, "python", "py"):
            sections.setdefault(f"{document.relative_to(ROOT)}: {heading}", []).append(text)
    return [(name, "\n".join(texts)) for name, texts in sections.items()]


def shell_lines() -> list[tuple[str, str]]:
    """("document:line", command) with continued lines joined; comments and prompts dropped."""
    found = []
    for document in DOCUMENTS:
        for _, text in blocks(document, "shell", "bash", "sh", "console"):
            for line in text.replace("\\\n", " ").splitlines():
                words = shlex.split(line.removeprefix("$ "), comments=True)
                for separator, group in itertools.groupby(words, lambda word: word in ("&&", "||", ";")):
                    if not separator:
                        found.append((str(document.relative_to(ROOT)), shlex.join(group)))
    return list(dict.fromkeys(found))


def recipe(name: str):
    """The module `training/train_<name>.py` (training/ is on pytest's path)."""
    return importlib.import_module(f"train_{name}")


def builder(name: str, function: str):
    """A function that builds a network of a recipe."""
    modules = [recipe(name)]
    if (ROOT / "training" / name / "networks.py").is_file():
        modules.append(importlib.import_module(f"diffusers_ext.training.{name}.networks"))
    return next(getattr(module, function) for module in modules if hasattr(module, function))


SECTIONS = python_sections()
LINES = shell_lines()


def test_the_readme_has_something_to_check():
    assert [name for name, _ in SECTIONS if name.startswith("README.md")], "README.md shows no Python"
    commands = {line.split()[0] for document, line in LINES if document == "README.md"}
    assert {"make", "accelerate"} <= commands, commands


@pytest.mark.parametrize("code", [code for _, code in SECTIONS], ids=[name for name, _ in SECTIONS])
def test_python_blocks_run(code, hub, warm_python, tmp_path):
    clone = tmp_path / "clone"
    clone.mkdir()
    for name in ("benchmarks", "checkpoints", "pipelines", "training"):
        if (ROOT / name).exists():
            shutil.copytree(ROOT / name, clone / name, ignore=shutil.ignore_patterns("__pycache__"))
    environment = {k: v for k, v in {**os.environ, **hub.env(tmp_path / "home")}.items() if v is not None}

    def run(*words: str) -> None:
        result = warm_python.run(*words, cwd=clone, env=environment)
        assert result.returncode == 0, f"{words}\n---\n{result.stdout}{result.stderr}"

    for name in set(re.findall(r"runs/([\w.-]+)", code)):
        if name == "my-finetune":
            train_as_the_readme_says(clone, run)
            shutil.rmtree(clone / "runs")  # what a stranger has is the repository alone
            pushed = hub.repos["user/my-finetune"].keys()
            assert {"model_index.json", "README.md", "pytorch_lora_weights.safetensors"} <= pushed
        elif name in TRAINED:
            run("training/train_ldm.py", "training/presets/ldm-smoke.yaml", *TRAINED[name])
        else:
            shutil.copytree(ROOT / "checkpoints" / "paella-scenes-64", clone / "runs" / name)
    run("-c", code)


def train_as_the_readme_says(clone: Path, run: Callable[..., None]) -> None:
    """Runs README's fine-tuning command as it stands, but for two steps, on eight images with text files."""
    folder = clone / "my" / "images"
    folder.mkdir(parents=True)
    for row in range(8):
        scene = sample_scene(0, row)
        Image.fromarray(render(scene, 64)).save(folder / f"{row}.png")
        (folder / f"{row}.txt").write_text(full_caption(scene))
    (command,) = [text for heading, text in blocks(ROOT / "README.md", "shell") if heading == "Fine-tune"]
    words = shlex.split(command.replace("\\\n", " "))
    assert words[:2] == ["accelerate", "launch"] and {"--rank", "--push_to_hub"} <= set(words)
    run(*words[2:], "--max_train_steps", "2", "--train_batch_size", "2")


@pytest.mark.parametrize("document", DOCUMENTS, ids=[str(path.relative_to(ROOT)) for path in DOCUMENTS])
def test_links_lead_somewhere(document):
    """Files and headings that a document links to are there; addresses on the web are not asked."""
    text = re.sub(r"```.*?```", "", document.read_text(encoding="utf-8"), flags=re.S)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if target.startswith(("http://", "https://")):
            continue
        name, _, anchor = target.partition("#")
        path = document.parent / name if name else document
        assert path.exists(), f"{document.name} links to {target}"
        if anchor:
            assert anchor in headings(path), f"{document.name} links to {target}; there are {sorted(headings(path))}"


def headings(document: Path) -> set[str]:
    """The anchors that GitHub gives to the headings of a document."""
    found = re.findall(r"^#+ (.*)$", document.read_text(encoding="utf-8"), flags=re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in found}


def test_every_document_is_reached_from_the_index():
    """docs/README.md links to every other document in docs/."""
    linked = set(re.findall(r"\]\(([\w.]+\.md)\)", (ROOT / "docs" / "README.md").read_text(encoding="utf-8")))
    assert {path.name for path in (ROOT / "docs").glob("*.md")} - {"README.md"} == linked


SEEDED = SECTIONS + python_sections(stand_ins=True)


@pytest.mark.parametrize(("name", "code"), SEEDED, ids=[name for name, _ in SEEDED])
def test_blocks_that_sample_have_a_seed(name, code):
    """Every call whose images or texts a block takes has a generator."""
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.Attribute) and node.attr in ("images", "texts") and isinstance(node.value, ast.Call):
            words = {keyword.arg for keyword in node.value.keywords}
            common = None in words and "generator" in code  # pipe(prompt, **common)
            assert "generator" in words or common, f"{name}: {ast.unparse(node)}"


@pytest.fixture(scope="module")
def program_help(warm_python) -> Callable[..., str]:
    """What `python <target> --help` prints; documents name the same programs again and again."""

    @functools.cache
    def printed(*target: str) -> str:
        result = warm_python.run(*target, "--help", cwd=ROOT)
        assert result.returncode == 0, result.stderr
        return result.stdout

    return printed


def check_line(words: list[str], program_help: Callable[..., str]) -> None:
    """Applies the rule of the table above; AssertionError or SystemExit when the line would not work."""
    while re.match(r"\w+=", words[0]):
        words = words[1:]
    options = [word.split("=")[0] for word in words if word.startswith("--")]
    match words:
        case ["make", *targets]:
            known = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), flags=re.M)
            wanted = [target for target in targets if "=" not in target]
            assert wanted and set(wanted) <= set(known), f"the Makefile has only {known}"
        case ["accelerate", "launch", *rest]:
            at = next(i for i, word in enumerate(rest) if word.endswith(".py") or ".train_" in word)
            form = r"diffusers_ext\.training\.train_(\w+)" if rest[at - 1] == "-m" else r"training/train_(\w+)\.py"
            script = re.fullmatch(form, rest[at])
            assert script, f"{rest[at]} is no recipe"
            recipe(script[1]).parse_args([str(ROOT / w) if w.endswith(".yaml") else w for w in rest[at + 1 :]])
        case ["diffusers-ext", *rest]:
            assert set(options) <= set(re.findall(r"--\w[\w-]*", cli_help(rest)))
        case [python, *rest] if re.fullmatch(r"(\.venv/bin/)?python3?", python):
            target = rest[:2] if rest[0] == "-m" else rest[:1]
            command = next(iter(rest[len(target) :]), "")  # the help of a program lists its commands in braces
            if any(command in listed.split(",") for listed in re.findall(r"\{([\w,-]+)\}", program_help(*target))):
                target = [*target, command]
            assert set(options) <= set(re.findall(r"--\w[\w-]*", program_help(*target)))
        case [pip, "install", *_] if pip.endswith("pip"):
            project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
            named = {
                extra for word in words for group in re.findall(r"\[([\w,]+)\]", word) for extra in group.split(",")
            }
            assert named <= project["optional-dependencies"].keys()
        case ["git", "clone", *_] | ["cd", _] | ["source" | ".", _] | ["hf", *_] | ["export", *_]:
            pass
        case _:
            raise AssertionError(f"no rule for {words[0]!r}: give tests/test_readme.py one")


def cli_help(words: list[str]) -> str:
    """What `diffusers-ext <command> --help` prints; the options of `convert` are those of its kind."""
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), pytest.raises(SystemExit) as end:
        cli.main([*words[: 2 if words[0] == "convert" else 1], "--help"])
    assert end.value.code == 0, printed.getvalue()
    return printed.getvalue()


@pytest.mark.parametrize(("document", "line"), LINES, ids=[f"{d}: {line[:60]}" for d, line in LINES])
def test_shell_lines_work(document, line, program_help):
    check_line(shlex.split(line), program_help)


@pytest.mark.parametrize(
    "line",
    [
        "make no-such-target",
        "accelerate launch training/train_paella.py --no_such_option 1",
        "accelerate launch training/train_paella.py training/presets/no-such-preset.yaml",
        "diffusers-ext no-such-command",
        "diffusers-ext export-hub somewhere --no_such_option",
        "python no_such_file.py",
        "python benchmarks/claims_piti.py few --no_such_option",
        "python benchmarks/claims_piti.py probe --staged all=runs/a",
        "pip install .[no_such_extra]",
        "no-such-program --help",
    ],
)
def test_a_wrong_line_is_found(line, program_help):
    with pytest.raises((AssertionError, SystemExit, ValueError, OSError)):
        check_line(shlex.split(line), program_help)


@pytest.mark.parametrize("preset", PRESETS, ids=[path.name for path in PRESETS])
def test_presets_parse(preset):
    match = re.fullmatch(r"([a-z]+)-(paper-\w[\w-]*|scenes-\w[\w-]*|smoke|\w[\w-]*)\.yaml", preset.name)
    assert match and (ROOT / "training" / f"train_{match[1]}.py").exists(), (
        "<recipe>-<what>.yaml for train_<recipe>.py"
    )
    parsed = recipe(match[1]).parse_args([str(preset)])
    assert len(parsed) >= 3


def test_each_recipe_has_a_smoke_preset():
    recipes = {path.stem.removeprefix("train_") for path in (ROOT / "training").glob("train_*.py")}
    assert recipes and recipes <= {path.name.removesuffix("-smoke.yaml") for path in PRESETS}


def test_paper_presets_have_the_papers_size():
    assert {path.name for path in PRESETS if "-paper-" in path.name} == PAPER_PARAMETERS.keys()
    for name, counts in PAPER_PARAMETERS.items():
        module = recipe(name.split("-")[0])
        arguments = module.parse_args([str(ROOT / "training" / "presets" / name)])[0]
        for build, count in counts.items():
            with torch.device("meta"):
                network = builder(name.split("-")[0], build)(arguments)
            assert sum(parameter.numel() for parameter in network.parameters()) == count, (name, build)
            assert all(parameter.is_meta for parameter in network.parameters())
