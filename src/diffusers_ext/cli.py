"""`diffusers-ext`: the command line. Thin: parse, call, print.

Nothing is imported at the top that loads torch, so that help, version and wrong words answer at once. `main` imports
the package itself, which takes seconds, when a command begins to work.
"""

import argparse
import importlib.metadata
import itertools
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .conversion.catalogue import KINDS
from .places import did_you_mean


class Parser(argparse.ArgumentParser):
    """Takes no shortened options, and reports an error in one line."""

    def __init__(self, **options: Any):
        super().__init__(**{"allow_abbrev": False, **options})

    def error(self, message: str) -> Any:
        self.exit(2, f"{self.prog}: {message}\n")


class PrintVersion(argparse.Action):
    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> None:
        print(f"{parser.prog} {importlib.metadata.version('diffusers-ext')}")
        parser.exit()


def build_parser() -> Parser:
    parser = Parser(
        prog="diffusers-ext",
        description="Sample from pipelines, describe, convert and share them, and prepare data.",
    )
    parser.add_argument("--version", action=PrintVersion, nargs=0, help="print the version and exit")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    convert = commands.add_parser(
        "convert",
        help="turn a checkpoint of the original authors into a model or pipeline folder",
        description="Strict: a key that is unknown or missing is an error that lists it. "
        "`diffusers-ext convert KIND --help` lists the options of a kind.",
    )
    kinds = convert.add_subparsers(dest="kind", required=True, metavar="KIND")
    for name, kind in KINDS.items():
        one = kinds.add_parser(name, help=kind.help, description=f"Convert {kind.help}.")
        one.add_argument("checkpoint", type=Path, help="the original's .pt, .ckpt or .safetensors file")
        one.add_argument("output_dir", type=Path, help="new folder for the result and its card")
        one.add_argument("--license", required=True, help="licence of the weights, for the card: mit, other, ...")
        for option, keywords in kind.options.items():
            one.add_argument(f"--{option}", **keywords)
        one.add_argument(
            "--allow_pickle", action="store_true", help="run the code in an old pickle; only if you trust it"
        )
    convert.set_defaults(run=run_convert)

    export = commands.add_parser(
        "export-hub",
        help="make a saved pipeline or model ready to share, and upload it",
        description="Checks a saved pipeline or model; --no-import makes a copy that loads without an import line.",
    )
    export.add_argument("folder", type=Path, help="a pipeline or model saved by diffusers_ext")
    export.add_argument(
        "--no-import",
        "--self-contained",
        action="store_true",
        help="loads without `import diffusers_ext`, with trust_remote_code=True; the package must still be installed "
        "(formerly --self-contained)",
    )
    export.add_argument("--output_dir", type=Path, help="new folder for that copy")
    export.add_argument("--push", action="store_true", help="upload the result")
    export.add_argument("--hub_model_id", help="repository to upload to, `user/name`")
    export.add_argument("--private", action="store_true", help="make the repository private if it is new")
    export.set_defaults(run=run_export_hub)

    sample = commands.add_parser(
        "sample",
        help="draw with a saved pipeline: images as PNG files, or texts",
        description="Reads the class of the pipeline from its index and takes the checkpoint's own defaults. "
        "Result k is drawn from seed + k. The settings are in each PNG's metadata.",
    )
    sample.add_argument("folder", help="a saved pipeline, or its name on the Hub")
    sample.add_argument("prompt", nargs="?", help="what to draw, for pipelines that take a text")
    sample.add_argument("--negative_prompt", help="what to move away from")
    sample.add_argument("--image", help="file of the image to edit, vary, enlarge or describe")
    sample.add_argument(
        "--mask", help="file of a mask: white is drawn; of Versatile Diffusion, white is what is read of the image"
    )
    sample.add_argument("--map", help="file of a label map")
    sample.add_argument("--sketch", help="file of a sketch")
    sample.add_argument("--normals", help="file of a map of normals")
    sample.add_argument("--depth", help="file of a depth map")
    sample.add_argument("--boxes", nargs="+", metavar="BOX", help='each "name x0 y0 x1 y1", corners from 0 to 1')
    sample.add_argument("--class_label", help="number or name of a class")
    sample.add_argument("--caption", action="store_const", const=True, help="make texts instead of images")
    sample.add_argument("--lora", help="folder, file or Hub name of an adapter (user/repo[/folder])")
    sample.add_argument("--seed", type=int, default=0, help="of the first result (default 0)")
    sample.add_argument("--num", type=int, help="how many results (default 1)")
    sample.add_argument("--steps", type=int, help="sampling steps")
    sample.add_argument("--guidance", type=float, help="guidance scale")
    sample.add_argument("--eta", type=float, help="noise of DDIM's steps, 0 to 1")
    sample.add_argument("--strength", type=float, help="how much of an image is drawn anew, 0 to 1")
    sample.add_argument("--noise_level", type=float, help="steps of noise between the stages of a cascade")
    sample.add_argument("--height", type=int, help="height of the images in pixels")
    sample.add_argument("--width", type=int, help="width of the images in pixels")
    sample.add_argument("--device", help="where to compute (default: a GPU where there is one)")
    sample.add_argument("--dtype", default="float32", choices=("float32", "bfloat16", "float16"))
    sample.add_argument("--out", type=Path, default=Path("samples"), help="folder, or a .png for one image")
    sample.set_defaults(run=run_sample)

    info = commands.add_parser("info", help="what a saved pipeline is, takes and weighs")
    info.add_argument("folder", help="a saved pipeline, or its name on the Hub")
    info.set_defaults(run=run_info)

    search = commands.add_parser(
        "search-truncation",
        help="measure a cascade over levels of noise between its stages, and draw the curve",
        description="Draws the same images at each level, truncated and non-truncated, and measures them. The clean "
        "low-resolution images are drawn once for all levels of the second form.",
    )
    search.add_argument("folder", help="a saved cascade, or its name on the Hub")
    search.add_argument("--levels", type=float, nargs="+", help="s, 0 is clean; default: 0 and, of T steps of noise, "
                        "the first after a tenth, a quarter, a half and three quarters")  # fmt: skip
    search.add_argument("--modes", nargs="+", default=["truncated", "non_truncated"], help="one form, or both")
    search.add_argument("--stage", default="upscale_1", help="the stage whose level is varied (default upscale_1)")
    search.add_argument("--metric", default="frechet", choices=("frechet", "scenes"), help="Frechet distance to "
                        "real images, or share of images that show their class of the built-in data set")  # fmt: skip
    search.add_argument("--real", default="scenes", help="folder of real images, those in folders of their class "
                        "limited to the classes that are drawn; default: held-out scenes")  # fmt: skip
    search.add_argument("--features", help="saved pipeline whose CLIP sees for the distance; default: 8 x 8 pixels")
    search.add_argument("--class_labels", nargs="+", help="classes to draw in turn; default: all that the base knows")
    search.add_argument("--num", type=int, default=64, help="images a level (default 64)")
    search.add_argument("--batch_size", type=int, default=32)
    search.add_argument("--steps", type=int, nargs="+", default=[50], help="of all stages, or of each")
    search.add_argument("--guidance", type=float, help="guidance scale of the varied stage")
    search.add_argument("--from_real", action="store_true", help="enlarge real images instead of generated ones, each "
                        "of the class that its folder is named as")  # fmt: skip
    search.add_argument("--seed", type=int, default=0)
    search.add_argument("--device", help="where to compute (default: a GPU where there is one)")
    search.add_argument("--out", type=Path, default=Path("search-truncation"), help="folder of table and curve")
    search.set_defaults(run=run_search_truncation)

    prepare = commands.add_parser(
        "prepare",
        help="make an image folder with conditions of a public data set, or sketches of own pictures",
        description="Reads the original layout and writes pictures, conditions in subfolders, and metadata.jsonl.",
    )
    prepare.add_argument("data", choices=("sketch", "coco-stuff", "ade20k", "diode"), help="what is read")
    prepare.add_argument("input_dir", type=Path, help="the unpacked data set, or for sketches a folder of pictures")
    prepare.add_argument("output_dir", type=Path, help="new folder")
    prepare.add_argument(
        "--edges",
        type=Path,
        help="sketch: folder of edge maps named as the pictures, such as HED's, white lines; default: Canny edges of "
        "scikit-image where it is installed, else thinned Sobel edges",
    )
    prepare.set_defaults(run=run_prepare)

    commands.add_parser("scenes", help="write pictures of the built-in data set as an image folder", add_help=False)
    return parser


def run_convert(options: argparse.Namespace) -> int:
    from torch import nn

    from .conversion.keys import load_original
    from .training_utils import hub

    kind = KINDS[options.kind]
    if options.output_dir.exists():
        raise ValueError(f"{str(options.output_dir)!r} exists: name a new folder.")
    chosen = {name: value for name in kind.options if (value := getattr(options, name)) is not None}
    parts = kind.convert(load_original(options.checkpoint, allow_pickle=options.allow_pickle), **chosen)
    for subfolder, part in parts:
        part.save_pretrained(options.output_dir / subfolder)
    if kind.hint and len(parts) == 1:
        print(kind.hint)
    model: Any = parts[0][1]
    name, library = type(model).__name__, type(model).__module__.split(".")[0]
    load = f"{library}.{name}.from_pretrained({str(options.output_dir)!r})"
    hub.write_model_card(
        options.output_dir,
        title=options.output_dir.name,
        description=f"`{name}`, converted from `{options.checkpoint.name}` by `diffusers-ext convert {options.kind}`. "
        f"It loads with `{load}`.",
        license=options.license,
        usage=f"import {library}\n\nmodel = {load}" if library == hub.LIBRARY else None,
    )
    networks = [model] if isinstance(model, nn.Module) else model.components.values()
    count = sum(weight.numel() for part in networks if isinstance(part, nn.Module) for weight in part.parameters())
    print(f"Wrote {options.output_dir}: {name} with {count:,} parameters.")
    return 0


def run_export_hub(options: argparse.Namespace) -> int:
    from .training_utils import hub
    from .training_utils.saved_folders import LIBRARY, read_saved

    if options.no_import != (options.output_dir is not None):
        raise ValueError("--no-import and --output_dir go together: the export writes a changed copy.")
    if options.push != (options.hub_model_id is not None):
        raise ValueError("--push and --hub_model_id go together.")
    folder, saved = options.folder, read_saved(options.folder)
    if options.no_import:
        folder = hub.export_self_contained(folder, options.output_dir, hub_model_id=options.hub_model_id)
        print(f"Wrote {folder}. Where {LIBRARY} is installed, it loads like this:")
        print(saved.usage(str(folder), without_import=True))
    else:
        print(f"{folder} holds a {saved.class_name}; it loads after `import {saved.loader.split('.')[0]}`.")
    if options.push:
        url = hub.push_folder(folder, options.hub_model_id, private=options.private)
        if url is None:
            return 1
        print(f"Uploaded: {url}")
    return 0


def run_sample(options: argparse.Namespace) -> int:
    import torch

    from .pipelines import drawing

    if options.num is not None and options.num < 1:
        raise ValueError(f"--num must be at least 1, received {options.num}.")
    check_trained(options.folder)
    paths = drawing.result_paths(options.out, options.num or 1, options.seed)
    chosen = {name: getattr(options, name) for name in drawing.ARGUMENTS}
    drawn, settings = drawing.draw(
        options.folder,
        chosen,
        seed=options.seed,
        lora=options.lora,
        device=options.device,
        dtype=getattr(torch, options.dtype),
    )
    if options.caption:
        print("\n".join(drawn))
        return 0
    drawing.save_images(drawn, settings, paths)
    print("\n".join(map(str, paths)))
    return 0


def run_info(options: argparse.Namespace) -> int:
    from .pipelines import drawing

    check_trained(options.folder)
    print(drawing.describe(options.folder))
    return 0


def run_search_truncation(options: argparse.Namespace) -> int:
    from torch.nn.functional import interpolate

    from .pipelines.cascaded.search import TruncationSearch, check_stage, draw_curve, load_cascade, usual_levels

    if options.num < 1:
        raise ValueError(f"--num is {options.num}: draw at least 1 image a level.")
    pipe = load_cascade(options.folder, options.device)
    check_stage(pipe, options.stage)
    side = getattr(pipe, options.stage).unet.config["sample_size"]
    known = pipe.base.config.get("class_names")
    names = list(known.values()) if known else list(range(getattr(pipe.base, "num_classes", None) or 0))
    chosen = [int(label) if label.isdecimal() else label for label in options.class_labels or []] or names
    chosen = [names[label] if isinstance(label, int) and label < len(names) else label for label in chosen]
    real, kinds = real_images(options.real, options.num, side, chosen)
    count = len(real) if options.from_real else options.num
    labels = [chosen[k % len(chosen)] for k in range(count)] if chosen else None
    if labels and options.from_real and len(chosen) > 1:
        if not set(kinds) <= set(chosen):
            raise ValueError(
                f"--from_real: nothing says of which class each image in --real {options.real!r} is. Put them in "
                f"folders named as the classes ({', '.join(map(str, chosen[:3]))} ...), or name with --class_labels "
                "the one class that they all have."
            )
        labels = kinds
    name, metric = truncation_metric(options, real, labels)
    search = TruncationSearch(
        pipe,
        labels,
        count=count,
        stage=options.stage,
        num_inference_steps=options.steps[0] if len(options.steps) == 1 else options.steps,
        guidance_scale=options.guidance,
        batch_size=options.batch_size,
        seed=options.seed,
    )
    low = getattr(pipe, options.stage).config["low_res_size"]
    points = search.run(
        usual_levels(getattr(pipe, options.stage)) if options.levels is None else options.levels,
        metric,
        conditioning_modes=["non_truncated"] if options.from_real else options.modes,
        image=interpolate(real, (low, low), mode="area") if options.from_real else None,
    )
    lines = [f"| conditioning | s | {name} |", "|---|---|---|"]
    lines += [f"| {point.conditioning_mode} | {point.noise_level:g} | {point.value:.4f} |" for point in points]
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "table.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    print("\n".join(lines))
    draw_curve(points, options.out / "curve.png", name=name)
    print(options.out / "curve.png")
    return 0


def run_prepare(options: argparse.Namespace) -> int:
    from .data.prepare import prepare

    count = prepare(options.data, options.input_dir, options.output_dir, edges=options.edges)
    print(f"Wrote {options.output_dir}: {count} pictures with conditions.")
    return 0


def real_images(source: str, count: int, side: int, classes: list) -> tuple[Any, list]:
    """Real images (n, 3, side, side) in [0, 1], cut to squares, and of which class each is, as far as folders tell.

    Args:
        source: `scenes`, of which held-out ones are taken, or a folder, of which at most `count` are, evenly spread.
        classes: Names or numbers. Other images are left out, where there are some of these.
    """
    import torch

    from .conditions.images import image_batch, resize_images
    from .data import scenes
    from .data.image_folder import decode_image

    if source == "scenes":
        is_known = bool(classes) and set(classes) <= set(scenes.CLASS_NAMES)
        held_out = (scenes.sample_scene(0, index, split="validation") for index in itertools.count())
        drawn = (scene for scene in held_out if not is_known or scenes.CLASS_NAMES[scenes.label(scene)] in classes)
        found = list(itertools.islice(drawn, count))
        names = [scenes.CLASS_NAMES[scenes.label(scene)] for scene in found]
        return image_batch([scenes.render(scene, side) for scene in found]), names
    paths = sorted(
        path for path in Path(source).rglob("*") if path.suffix.lower() in (".png", ".jpg", ".jpeg", ".webp")
    )
    if not paths:
        hint = "" if Path(source).exists() else did_you_mean(source)
        raise ValueError(f"--real {source!r} holds no images: name a folder of them, or scenes.{hint}")
    folders = [int(path.parent.name) if path.parent.name.isdecimal() else path.parent.name for path in paths]
    if any(folder in classes for folder in folders):
        kept = [k for k, folder in enumerate(folders) if folder in classes]
        paths, folders = [paths[k] for k in kept], [folders[k] for k in kept]
    chosen = [k * len(paths) // min(count, len(paths)) for k in range(min(count, len(paths)))]
    images = []
    for path in [paths[k] for k in chosen]:
        picture = decode_image(str(path))
        edge = min(picture.size)
        left, top = (picture.width - edge) // 2, (picture.height - edge) // 2
        square = image_batch(picture.crop((left, top, left + edge, top + edge)))
        images.append(resize_images(square, side, side))
    return torch.cat(images), [folders[k] for k in chosen]


def truncation_metric(options: argparse.Namespace, real: Any, labels: list | None) -> tuple[str, Any]:
    """The name of the measure, and the measure of images (n, 3, H, W) in [0, 1]."""
    from .data import scenes, scenes_verifier
    from .evaluation.frechet import frechet_distance
    from .evaluation.picture_features import clip_features, pixel_features

    if options.metric == "frechet":
        see = pixel_features if options.features is None else clip_features(options.features)
        seen, seer = see(real), "8 x 8 pixels" if options.features is None else Path(options.features).name
        where = "held-out scenes" if options.real == "scenes" else options.real
        return f"Frechet distance to {where}, {seer}", lambda images: frechet_distance(see(images), seen)
    if labels is None or not all(label in scenes.CLASS_NAMES for label in labels):
        raise ValueError("--metric scenes reads the classes of the built-in data set, such as 'red circle'.")
    wanted = [scenes.parse_caption(f"a {label}") for label in labels]

    def share(images: Any) -> float:
        pictures = (255 * images).round().byte().permute(0, 2, 3, 1).numpy()
        verdicts = [
            scenes_verifier.check(scenes_verifier.read_picture(picture), objects).shape_and_color
            for picture, objects in zip(pictures, wanted, strict=True)
        ]
        return sum(verdicts) / len(verdicts)

    return "share that shows its class", share


def check_trained(folder: str) -> None:
    """Refuses a folder that a preset's training would have made, and names its command.

    Raises:
        ValueError: if there is no such folder and a preset has this output_dir.
    """
    if Path(folder).exists():
        return
    from .training_utils.presets import installed_presets

    for preset in installed_presets().values():
        if re.search(
            rf"^output_dir: {re.escape(folder.rstrip('/'))}$", preset.read_text(encoding="utf-8"), flags=re.M
        ):
            script = f"training/train_{preset.stem.split('-')[0]}.py"
            raise ValueError(
                f"There is no folder {folder!r}: `accelerate launch {script} training/presets/{preset.name}` makes it."
            )


def import_package() -> None:
    """Runs the package's `__init__`, which registers it with diffusers, if the console script has put that off."""
    package = sys.modules["diffusers_ext"]
    if not hasattr(package, "__version__"):
        package.__spec__.loader.exec_module(package)  # type: ignore[union-attr]


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """The options of a command line.

    Raises:
        ValueError: naming options that the command, or the kind of `convert`, does not have.
    """
    words = list(argv)
    kind = next((word for word in words if word in KINDS), None)
    if words[:1] == ["convert"] and kind is not None:  # may stand behind options
        words.remove(kind)
        words.insert(1, kind)
    options, unknown = build_parser().parse_known_args(words)
    if unknown:
        owner = getattr(options, "kind", options.command)
        refused = [word for word in unknown if word.startswith("-")] or unknown
        raise ValueError(f"{owner} takes no {' '.join(refused)}. Its --help lists what it takes.")
    return options


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command; returns the exit status. What the user can mend is one line on stderr and status 2."""
    argv = list(sys.argv[1:] if argv is None else argv)
    try:
        if argv[:1] == ["scenes"]:  # has a parser of its own
            from .data import scenes

            scenes.main(argv[1:], prog="diffusers-ext scenes")
            return 0
        options = parse(argv)
        import_package()
        return options.run(options)
    except (ValueError, OSError, ImportError) as error:
        print(f"diffusers-ext {argv[0]}: {' '.join(str(error).splitlines())}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
