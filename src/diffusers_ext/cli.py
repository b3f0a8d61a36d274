"""`diffusers-ext`: the command line. Thin: parse, call, print."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from .conversion.keys import load_original
from .conversion.open_clip import build_open_clip_processors, convert_open_clip
from .conversion.paella import convert_paella_unet, convert_paella_vqgan_gumbel
from .data import scenes
from .training_utils import hub

# kind -> its converter and the options of `convert` that it takes
CONVERTERS = {
    "paella-unet": (convert_paella_unet, ("time_embed_dim",)),
    "paella-vqgan": (convert_paella_vqgan_gumbel, ("ignore",)),
    "open-clip": (convert_open_clip, ("vision_heads", "text_heads", "quick_gelu")),
}
# kind -> what makes the tokenizer and the like that belong into the model's folder
PROCESSORS = {"open-clip": build_open_clip_processors}


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="diffusers-ext",
        description="Convert original checkpoints, share pipelines, write the built-in data set.",
        allow_abbrev=False,
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    convert = commands.add_parser(
        "convert",
        help="turn a checkpoint of the original authors into a model folder",
        description="Strict: a key that is unknown or missing is an error that lists it.",
        allow_abbrev=False,
    )
    convert.add_argument("kind", choices=CONVERTERS)
    convert.add_argument("checkpoint", type=Path, help="the original's .pt, .ckpt or .safetensors file")
    convert.add_argument("output_dir", type=Path, help="new folder for the model and its card")
    convert.add_argument("--license", required=True, help="licence of the weights, for the card: mit, other, ...")
    convert.add_argument("--time_embed_dim", type=int, help="paella-unet: the original's c_r, if it is not 64")
    convert.add_argument(
        "--ignore", nargs="+", metavar="KEYS", help="paella-vqgan: patterns of keys to leave out instead of 'loss.*'"
    )
    convert.add_argument("--vision_heads", type=int, help="open-clip: attention heads, if not told by the width")
    convert.add_argument("--text_heads", type=int, help="open-clip: attention heads, if not the width / 64")
    convert.add_argument(
        "--quick_gelu", action="store_true", default=None, help="open-clip: for OpenAI's weights and ...-quickgelu"
    )
    convert.add_argument(
        "--allow_pickle", action="store_true", help="run the code in an old pickle; only if you trust it"
    )
    convert.set_defaults(run=run_convert)

    export = commands.add_parser(
        "export-hub",
        help="make a saved pipeline ready to share, and upload it",
        description="Checks a saved pipeline; with --self-contained makes a copy that loads without an import line.",
        allow_abbrev=False,
    )
    export.add_argument("folder", type=Path, help="a pipeline saved by diffusers_ext")
    export.add_argument(
        "--self-contained", action="store_true", help="loads without `import diffusers_ext`, with trust"
    )
    export.add_argument("--output_dir", type=Path, help="new folder for the self-contained copy")
    export.add_argument("--push", action="store_true", help="upload the result")
    export.add_argument("--hub_model_id", help="repository to upload to, `user/name`")
    export.add_argument("--private", action="store_true", help="make the repository private if it is new")
    export.set_defaults(run=run_export_hub)

    commands.add_parser("scenes", help="write pictures of the built-in data set as an image folder", add_help=False)
    return parser


def run_convert(options: argparse.Namespace) -> int:
    converter, accepted = CONVERTERS[options.kind]
    names = {name for _, names in CONVERTERS.values() for name in names}
    chosen = {name: value for name in sorted(names) if (value := getattr(options, name)) is not None}
    if refused := [name for name in chosen if name not in accepted]:
        raise ValueError(f"{options.kind} takes no --{' --'.join(refused)}.")
    if options.output_dir.exists():
        raise ValueError(f"{str(options.output_dir)!r} exists: name a new folder.")
    model = converter(load_original(options.checkpoint, allow_pickle=options.allow_pickle), **chosen)
    processors = PROCESSORS[options.kind](model) if options.kind in PROCESSORS else ()
    for part in (model, *processors):
        part.save_pretrained(options.output_dir)
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
    print(f"Wrote {options.output_dir}: {name} with {model.num_parameters():,} parameters.")
    return 0


def run_export_hub(options: argparse.Namespace) -> int:
    if options.self_contained != (options.output_dir is not None):
        raise ValueError("--self-contained and --output_dir go together: the export writes a changed copy.")
    if options.push != (options.hub_model_id is not None):
        raise ValueError("--push and --hub_model_id go together.")
    folder = options.folder
    if options.self_contained:
        folder = hub.export_self_contained(folder, options.output_dir)
        print(f"Wrote {folder}: DiffusionPipeline.from_pretrained({str(folder)!r}, trust_remote_code=True)")
    else:
        index = hub.read_index(folder)
        print(f"{folder} holds a {index['_class_name']}; it loads after `import diffusers_ext`.")
    if options.push:
        url = hub.push_folder(folder, options.hub_model_id, private=options.private)
        if url is None:
            return 1
        print(f"Uploaded: {url}")
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command; returns the exit status. What the user can mend is one line on stderr and status 2."""
    argv = list(sys.argv[1:] if argv is None else argv)
    if argv[:1] == ["scenes"]:  # has a parser of its own
        scenes.main(argv[1:])
        return 0
    options = build_parser().parse_args(argv)
    try:
        return options.run(options)
    except (ValueError, OSError, ImportError) as error:
        print(f"diffusers-ext {options.command}: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
