"""The house rules of CONTRIBUTING.md, enforced: imports, public names, recorded names, sizes, no machine paths."""

import ast
import importlib.util
import re
import subprocess
import tomllib
from functools import cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import diffusers
import pytest
import transformers
from diffusers import DiffusionPipeline, ModelMixin, SchedulerMixin
from diffusers.utils.dynamic_modules_utils import find_pipeline_class

import diffusers_ext

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "src" / "diffusers_ext"

PUBLIC = [
    "AutoencoderOptimus",
    "CascadedBasePipeline",
    "CascadedDiffusionPipeline",
    "CascadedUNet",
    "CascadedUpscalePipeline",
    "DiscreteRenoisingScheduler",
    "GlidePipeline",
    "GlideTextEncoder",
    "GumbelVQModel",
    "LDMClassConditionalPipeline",
    "LDMClassEmbedder",
    "LDMInpaintPipeline",
    "LDMLayoutEncoder",
    "LDMLayoutPipeline",
    "LDMSemanticPipeline",
    "LDMSpatialRescaler",
    "LDMTextPipeline",
    "LDMUNet",
    "LDMUnconditionalPipeline",
    "LDMUpscalePipeline",
    "NormalizedCFGScheduler",
    "NormalizedClassifierFreeGuidance",
    "PITIEncoder",
    "PITIPipeline",
    "PaellaImageVariationPipeline",
    "PaellaImg2ImgPipeline",
    "PaellaInpaintPipeline",
    "PaellaPipeline",
    "PaellaUNet",
    "PaellaVQModel",
    "PatchDiscriminator",
    "RespacedScheduler",
    "TruncatedConditioningScheduler",
    "VersatileEditPipeline",
    "VersatilePipeline",
    "VersatileUNet",
    "classifier_free_guidance",
    "normalized_guidance",
]

# unit -> the units that it may import; its own folder is always allowed, except in models and conversion (see below).
LAW = {
    "guidance": set(),
    "conditions": set(),
    "losses": set(),
    "degradations": set(),
    "evaluation": set(),
    "training_utils": {"losses", "data"},
    "schedulers": {"guidance"},
    "data": {"conditions", "degradations"},
    "models": set(),
    "pipelines": {"models", "schedulers", "guidance", "conditions", "degradations"},
    "conversion": {"models", "schedulers", "pipelines"},
    "registration": set(),
    "places": set(),
}
FOR_ALL = {"places"}  # a leaf of the standard library alone
CONTAINS = {
    ("cascaded", "adm_releases"),
    *(("ldm_pipeline", part) for part in ("ldm", "ldm_autoencoder", "ldm_encoders", "ldm_releases", "ldm_unet")),
    ("piti", "glide"),  # its decoder is GLIDE's U-Net
}  # (module of a system, module of a part of it), both of conversion/
BUILDS_ON = {("piti", "glide")}  # (family, the one that its paper builds on), folders of pipelines/
FAMILIES = {path.name for path in (PACKAGE / "pipelines").iterdir() if (path / "__init__.py").is_file()}
PARENTS = {
    *(("token_codec", tokenizer) for tokenizer in ("vq_gumbel", "vq_paella")),
}  # (derived model, its parent) or (what serves several models, one of them), all modules of models/
OPTIONAL = {"datasets", "lpips", "matplotlib", "open_clip", "skimage", "tensorboard", "torchmetrics", "torchvision"}
TOP_LEVEL = {"benchmarks", "pipelines", "tests", "training"}  # nothing in the package imports these

FILES = sorted(PACKAGE.rglob("*.py"))


def module_name(path: Path) -> str:
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


@cache
def imports(path: Path) -> list[tuple[str, bool]]:
    """Every imported module as (absolute name, at module level), wherever the statement stands."""
    tree = ast.parse(path.read_text())
    inside = {id(child) for node in ast.walk(tree) if isinstance(node, ast.FunctionDef) for child in ast.walk(node)}
    typing_only = {
        id(child)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
        for child in ast.walk(node)
    }
    package = module_name(path).split(".")
    if path.name != "__init__.py":
        package = package[:-1]
    found = []
    for node in ast.walk(tree):
        at_top = id(node) not in inside | typing_only
        if isinstance(node, ast.Import):
            found += [(alias.name, at_top) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(package[: len(package) + 1 - node.level]) if node.level else ""
            base = ".".join(part for part in (base, node.module) if part)
            # `from ..models import unet_paella` names a module; `from ..models.unet_paella import X` a class.
            found += [
                (f"{base}.{alias.name}", at_top) for alias in node.names if is_house_module(f"{base}.{alias.name}")
            ]
            found.append((base, at_top))
    return found


def is_house_module(name: str) -> bool:
    path = PACKAGE.parent / Path(*name.split("."))
    return name.startswith("diffusers_ext.") and (path.with_suffix(".py").is_file() or path.is_dir())


def breaches(path: Path) -> list[str]:
    """What this file imports against the law."""
    unit, *inner = module_name(path).split(".")[1:] or ["__init__"]
    if unit in ("__init__", "cli"):
        return []
    wrong = []
    for name, _ in imports(path):
        if name.split(".")[0] != "diffusers_ext":
            continue
        target, *rest = name.split(".")[1:] or ["__init__"]
        if target != unit:
            allowed = target in LAW[unit] | FOR_ALL
        elif unit == "models":
            allowed = not rest or rest[0] == "blocks" or (inner[0], rest[0]) in PARENTS
        elif unit == "conversion":
            # the module of a system may use that of a system which it contains, the catalogue all of them
            shared = {"keys", "adm", "taming"}
            allowed = not rest or rest[0] in shared or inner == ["catalogue"] or (inner[0], rest[0]) in CONTAINS
        elif unit == "pipelines" and rest and rest[0] in FAMILIES:
            # a family uses what all share, and another family's folder only where its paper builds on it
            allowed = inner[0] == rest[0] or (inner[0], rest[0]) in BUILDS_ON
        else:
            allowed = True
        if not allowed:
            wrong.append(f"{module_name(path)} imports {name}")
    return wrong


@pytest.mark.parametrize("path", FILES, ids=[module_name(path) for path in FILES])
def test_import_law(path):
    unit = (module_name(path).split(".") + ["__init__"])[1]
    assert unit in LAW or unit in ("__init__", "cli"), f"{unit} has no line in the import law"
    assert not breaches(path)
    roots = {name.split(".")[0] for name, _ in imports(path)}
    assert not roots & TOP_LEVEL, f"{path} imports from a top-level folder"
    assert not {name for name, _ in imports(path) if name.startswith("diffusers.pipelines.deprecated")}
    heavy = {name.split(".")[0] for name, at_top in imports(path) if at_top} & OPTIONAL
    assert not heavy, f"{path}: import {heavy} inside the function that needs it"
    assert path.name not in ("utils.py", "helpers.py", "misc.py", "common.py"), "give it a noun"


@pytest.mark.parametrize("name", [name for name in PUBLIC if name.endswith("Pipeline")])
def test_help_of_a_pipeline_shows_a_call_and_names_no_class_that_nobody_imports(name):
    pipeline = getattr(diffusers_ext, name)
    told = f"{pipeline.__doc__}\n{pipeline.__init__.__doc__}\n{pipeline.__call__.__doc__}"
    assert re.search(r"Example:\n\n( {8}.*\n)* {8}.*pipe\(", pipeline.__doc__), "an example with a call of `pipe`"
    inner = {base.__name__ for base in pipeline.__mro__ if base.__module__.startswith("diffusers_ext.")} - {*PUBLIC}
    assert not {one for one in inner if re.search(rf"\b{one}\b", told)}


def test_import_law_sees_a_breach(tmp_path, monkeypatch):
    path = tmp_path / "diffusers_ext" / "schedulers" / "scheduling_x.py"
    path.parent.mkdir(parents=True)
    monkeypatch.setitem(globals(), "PACKAGE", tmp_path / "diffusers_ext")
    path.write_text("def f():\n    from ..models.unet_paella import PaellaUNet\n")
    assert breaches(path) == ["diffusers_ext.schedulers.scheduling_x imports diffusers_ext.models.unet_paella"]
    other = path.with_name("scheduling_y.py")
    other.write_text(
        "import diffusers_ext.pipelines.paella.pipeline_paella\nfrom ..guidance import classifier_free_guidance\n"
    )
    assert breaches(other) == [
        "diffusers_ext.schedulers.scheduling_y imports diffusers_ext.pipelines.paella.pipeline_paella"
    ]
    family = tmp_path / "diffusers_ext" / "pipelines" / "paella" / "base.py"
    family.parent.mkdir(parents=True)
    family.write_text("from ..ldm.tiling import Tiles\nfrom ..checks import check_integer\nfrom .checks import x\n")
    assert breaches(family) == ["diffusers_ext.pipelines.paella.base imports diffusers_ext.pipelines.ldm.tiling"]


TRAINING = ROOT / "training"
FLAT = set(TRAINING.glob("ldm_*.py"))  # the last recipe that is no package yet
RECIPE_FILES = sorted(set(TRAINING.rglob("*.py")) - FLAT - ({TRAINING / "train_ldm.py"} if FLAT else set()))


def training_imports(path: Path) -> set[str]:
    """The modules of `training/` that this file imports, by their names in the package or as files beside it."""
    beside = {found.stem for found in TRAINING.glob("*.py")} - {"__init__"}
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.level:
            names = ["." * node.level + (node.module or "")]
        elif isinstance(node, ast.ImportFrom):
            names = [node.module or "", *(f"{node.module}.{alias.name}" for alias in node.names)]
        else:
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        for name in names:
            inner = name.removeprefix("diffusers_ext.training.")
            place = TRAINING / Path(*inner.split("."))
            if inner != name and (place.with_suffix(".py").is_file() or place.is_dir()):
                found.add(inner)
            elif name.startswith(".") or name.split(".")[0] in beside:
                found.add(name if name.startswith(".") else name.split(".")[0])
    return found


def recipe_breaches(path: Path) -> list[str]:
    """What a file of `training/` imports against the law: a recipe its own folder alone, `args` not even that."""
    parts = path.relative_to(TRAINING).with_suffix("").parts
    recipe = parts[0].removeprefix("train_")
    leaf = len(parts) > 1 and parts[-1] == "args"
    return sorted(name for name in training_imports(path) if leaf or name.split(".")[0] != recipe)


@pytest.mark.parametrize("path", RECIPE_FILES, ids=[str(path.relative_to(TRAINING)) for path in RECIPE_FILES])
def test_import_law_of_recipes(path):
    assert not recipe_breaches(path), f"{path} imports another recipe or a script, or is no leaf"


def test_import_law_of_recipes_sees_a_breach(tmp_path, monkeypatch):
    monkeypatch.setitem(globals(), "TRAINING", tmp_path)
    for folder in ("one", "two"):
        (tmp_path / folder).mkdir()
        for name in ("args", "data"):
            (tmp_path / folder / f"{name}.py").write_text("from diffusers_ext.training_utils import loop\n")
    (tmp_path / "train_one.py").write_text("from diffusers_ext.training.one.args import A\n")
    (tmp_path / "train_two.py").write_text("from train_one import main\nfrom diffusers_ext.training.one import data\n")
    assert not recipe_breaches(tmp_path / "train_one.py") and not recipe_breaches(tmp_path / "one" / "args.py")
    assert recipe_breaches(tmp_path / "train_two.py") == ["one", "one.data", "train_one"]
    path = tmp_path / "one" / "args.py"
    path.write_text("def f():\n    from diffusers_ext.training.one.data import read\n")
    assert recipe_breaches(path) == ["one.data"]  # no leaf
    path.write_text("from .data import read\n")
    assert recipe_breaches(path) == [".data"]


def test_no_circle_among_recipes():
    graph = {
        ".".join(path.relative_to(TRAINING).with_suffix("").parts): training_imports(path) for path in RECIPE_FILES
    }
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(f"imports go round: {' -> '.join(error.args[1])}")


def test_no_circle():
    graph = {
        module_name(p): {name for name, _ in imports(p) if is_house_module(name)} - {module_name(p)} for p in FILES
    }
    # A package's (empty) __init__ is no dependency of what lies in it.
    graph = {name: {t for t in targets if not name.startswith(f"{t}.")} for name, targets in graph.items()}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(f"imports go round: {' -> '.join(error.args[1])}")


def test_public_names():
    assert sorted(diffusers_ext.__all__) == sorted(PUBLIC) and len(set(PUBLIC)) == len(PUBLIC)
    for name in PUBLIC:
        assert getattr(diffusers_ext, name).__module__.startswith("diffusers_ext."), name
    # The loader takes the base classes from the namespace that `model_index.json` names.
    for name in ("ModelMixin", "SchedulerMixin", "DiffusionPipeline", "BaseGuidance", "PreTrainedModel"):
        assert isinstance(getattr(diffusers_ext, name), type), name


def test_no_public_class_takes_a_stock_name():
    stock = {name for values in diffusers._import_structure.values() for name in values} | set(dir(transformers))
    assert "VQModel" in stock and "CLIPTextModelWithProjection" in stock  # the two lists are what they should be
    assert not stock & set(PUBLIC)


def test_public_classes_are_documented_and_annotated():
    for name in PUBLIC:
        public = getattr(diffusers_ext, name)
        assert public.__doc__ and len(public.__doc__) > 40, f"{name} has no docstring"


def test_import_time_and_offline(run_python):
    """CPU time, so that a busy machine changes nothing; no socket may be opened."""
    code = """
import socket, time, diffusers
diffusers.DiffusionPipeline
def refuse(*args, **kwargs): raise RuntimeError("network")
socket.socket.connect = socket.getaddrinfo = refuse
start = time.process_time()
import diffusers_ext
print(time.process_time() - start)
"""
    seconds = float(run_python(code, cold=True).stdout.split()[-1])
    assert seconds < 1.5, f"import diffusers_ext adds {seconds:.2f} s"


def pipelines() -> list[str]:
    return [n for n in PUBLIC if isinstance(getattr(diffusers_ext, n), type) and is_kind(n, DiffusionPipeline)]


def is_kind(name: str, *bases: type) -> bool:
    return isinstance(getattr(diffusers_ext, name), type) and issubclass(getattr(diffusers_ext, name), bases)


ENTRY_FILES = sorted((ROOT / "pipelines").glob("*.py"))


@pytest.mark.parametrize("path", ENTRY_FILES, ids=[path.name for path in ENTRY_FILES])
def test_entry_file_holds_exactly_one_pipeline(path):
    spec = importlib.util.spec_from_file_location(f"entry_{path.stem}", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    found = find_pipeline_class(module)  # diffusers' own search; raises when there are two
    assert found is not None and found.__name__ in pipelines()
    assert len(path.read_text().splitlines()) <= 120


def test_each_pipeline_has_its_entry_file():
    text = "".join(path.read_text() for path in ENTRY_FILES)
    assert pipelines() and not [name for name in pipelines() if name not in text]


def test_model_and_scheduler_names_that_checkpoints_record():
    """The name in `model_index.json` comes from the module path: no folder may be called like a diffusers pipeline."""
    from diffusers.pipelines.pipeline_loading_utils import _fetch_class_library_tuple

    for name in PUBLIC:
        if is_kind(name, ModelMixin, SchedulerMixin, DiffusionPipeline):
            public = getattr(diffusers_ext, name)
            assert _fetch_class_library_tuple(public.__new__(public)) == ("diffusers_ext", name)


def test_changelog_and_status_name_everything_public():
    changelog, status = (ROOT / "CHANGELOG.md").read_text(), (ROOT / "docs" / "status.md").read_text()
    assert not [name for name in PUBLIC if f"`{name}`" not in changelog]
    rows = [line for line in status.splitlines() if line.startswith("|")]
    wanted = [name for name in PUBLIC if is_kind(name, DiffusionPipeline, ModelMixin)]
    assert not [name for name in wanted if not any(f"`{name}`" in row for row in rows)]
    assert f"## {diffusers_ext.__version__}" in changelog or "## Unreleased" in changelog


def float64_on_devices(tree: ast.AST) -> list[int]:
    """Lines that may make a float64 tensor on a device: MPS, for one, has none.

    Allowed are `x.cpu().double()`, tensors that torch makes on the CPU: `torch.arange(3, dtype=torch.float64)`, and
    lists of dtypes to compare with.
    """
    listed = [node for node in ast.walk(tree) if isinstance(node, (ast.Tuple, ast.List, ast.Set, ast.Compare))]
    allowed, lines = {id(child) for node in listed for child in ast.iter_child_nodes(node)}, []
    for call in (node for node in ast.walk(tree) if isinstance(node, ast.Call)):
        if not isinstance(call.func, ast.Attribute):
            continue
        on_cpu = any(
            isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "cpu"
            for node in ast.walk(call.func.value)
        )
        made_here = ast.unparse(call.func.value) == "torch" and "device" not in {word.arg for word in call.keywords}
        if call.func.attr == "double" and not on_cpu:
            lines.append(call.lineno)
        if on_cpu or made_here:
            allowed |= {id(value) for value in [*call.args, *(word.value for word in call.keywords)]}
    names = [node for node in ast.walk(tree) if isinstance(node, ast.Attribute) and id(node) not in allowed]
    return sorted(lines + [node.lineno for node in names if ast.unparse(node) in ("torch.float64", "torch.double")])


@pytest.mark.parametrize("folder", ["src", "training"])
def test_no_float64_on_a_device(folder):
    found = {path: float64_on_devices(ast.parse(path.read_text())) for path in sorted((ROOT / folder).rglob("*.py"))}
    assert found and not {str(path): lines for path, lines in found.items() if lines}


@pytest.mark.parametrize(
    "line",
    [  # the first four stood here once
        "F.interpolate(labels[:, None].double(), size=(height, width))",
        "abar = scheduler.alphas_cumprod.double().cpu()",
        "features = features.double().cpu()",
        "std = float(latents.double().std())",
        "x.to(torch.float64)",
        "x.sum(dtype=torch.float64)",
        "torch.zeros(3, dtype=torch.float64, device=x.device)",
        "kind = torch.double",
    ],
)
def test_float64_on_a_device_is_seen(line):
    assert float64_on_devices(ast.parse(line)) == [1]
    for fine in (
        "x.cpu().double()",
        "torch.rand(3, dtype=torch.float64)",
        "x.cpu().to(torch.float64)",
        "x in (torch.float64,)",
    ):
        assert not float64_on_devices(ast.parse(fine))


@cache
def tracked() -> list[Path]:
    """Files that git tracks or would add."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if result.returncode != 0:
        pytest.skip("not a git checkout: there is no list of tracked files")
    return [ROOT / name for name in result.stdout.split("\0") if name and (ROOT / name).is_file()]


def test_no_machine_paths_or_index_addresses():
    place = re.compile(r"(?<![\w./:{}])/(?:home|root|work|Users|opt|mnt|srv)/\w")
    address = re.compile("index" + r"-url|find" + r"-links|file" + r":///")
    bad = []
    for path in tracked():
        if path.suffix in (".safetensors", ".pt", ".png", ".jpg", ".parquet", ".tar", ".npz") or path == Path(
            __file__
        ):
            continue
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
            if place.search(line) or address.search(line):
                bad.append(f"{path.relative_to(ROOT)}:{number}: {line.strip()[:100]}")
    assert not bad, "\n".join(bad)


def test_nobody_is_told_to_install_a_name_that_is_not_published():
    """Anybody could register it. A checkout or a wheel is what there is: `pip install .`."""
    told = re.compile(r"pip install[^\n]{0,20}\bdiffusers[-_]ext(?![-_*\d]*\.whl|-\*)")
    bad = [
        f"{path.relative_to(ROOT)}: {match[0]}"
        for path in tracked()
        if path.suffix in (".py", ".md", ".yaml", ".toml") and path != Path(__file__)
        for match in told.finditer(path.read_text(encoding="utf-8"))
        if "whl" not in match.string[match.start() : match.start() + 100]
    ]
    assert not bad, "\n".join(bad)


def test_clone_stays_small():
    sizes = {path: path.lstat().st_size for path in tracked()}  # fixtures that are alike are links
    checkpoints: dict[str, int] = {}
    for path, size in sizes.items():
        parts = path.relative_to(ROOT).parts
        if parts[0] == "checkpoints" and len(parts) > 2:
            checkpoints[parts[1]] = checkpoints.get(parts[1], 0) + size
    assert all(size <= 12e6 for size in checkpoints.values()), checkpoints
    assert sum(checkpoints.values()) <= 50e6
    # of what a clone fetches: counting the files of .git would count twice what lies in two packs, or loose and packed
    history = int(
        subprocess.run(
            ["git", "rev-list", "--disk-usage", "--objects", "HEAD"],
            cwd=ROOT, capture_output=True, text=True, check=True,
        ).stdout
    )  # fmt: skip
    assert sum(sizes.values()) + history <= 200e6, (sum(sizes.values()), history)


def test_versions_are_pinned_by_name_and_version_only():
    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if not line.startswith("#")]
    assert all(re.fullmatch(r"[A-Za-z0-9_.-]+==[0-9][0-9a-z.]*", line) for line in lines)
    names = {line.split("==")[0].lower().replace("_", "-") for line in lines}
    assert not [name for name in names if name.startswith("nvidia") or name == "triton"]
    project = (ROOT / "pyproject.toml").read_text()
    asked = {name.lower().replace("_", "-") for name in re.findall(r'"([A-Za-z_-]+)>=[0-9]', project)} - {"setuptools"}
    assert asked <= names, f"constraints.txt does not pin {asked - names}"


def test_every_package_is_in_the_wheel():
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    roots = {"diffusers_ext": PACKAGE, "diffusers_ext.training": ROOT / "training"}
    found = [
        ".".join([name, *path.parent.relative_to(root).parts])
        for name, root in roots.items()
        for path in root.rglob("__init__.py")
    ]
    assert sorted(listed) == sorted(found)
