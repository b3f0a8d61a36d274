"""`diffusers-ext`: the command line. Thin: parse, call, print."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from diffusers.pipelines.pipeline_utils import DiffusionPipeline
from torch import nn

from .conversion.keys import load_original
from .conversion.ldm_pipeline import convert_ldm_pipeline, take_ldm_first_stage
from .conversion.ldm_releases import RELEASES, TASKS
from .conversion.open_clip import build_open_clip_processors, convert_open_clip
from .conversion.optimus import build_optimus_tokenizers, convert_optimus
from .conversion.paella import convert_paella_unet, convert_paella_vqgan, convert_paella_vqgan_gumbel
from .conversion.versatile import convert_stable_diffusion_unet, convert_versatile_unet
from .data import scenes
from .models.unet_versatile import CONTEXT_TYPES
from .training_utils import hub

LDM_OPTIONS = ("num_heads", "num_head_channels", "resolution", "scale_factor", "null_class", "num_classes")


def clip_processors(model: Any) -> list[tuple[str, Any]]:
    return [("", part) for part in build_open_clip_processors(model)]


def optimus_tokenizers(
    model: Any, *, encoder_tokenizer: str | None = None, decoder_tokenizer: str | None = None
) -> list[tuple[str, Any]]:
    if (encoder_tokenizer is None) != (decoder_tokenizer is None):
        raise ValueError("--encoder_tokenizer and --decoder_tokenizer go together: name both or none.")
    if encoder_tokenizer is None or decoder_tokenizer is None:
        print("No tokenizers are written: trainings ask for both, --encoder_tokenizer and --decoder_tokenizer.")
        return []
    found = build_optimus_tokenizers(
        model, encoder_name_or_path=encoder_tokenizer, decoder_name_or_path=decoder_tokenizer
    )
    return list(zip(("encoder_tokenizer", "decoder_tokenizer"), found, strict=True))


# kind -> its converter and the options of `convert` that it takes
CONVERTERS = {
    "paella-unet": (convert_paella_unet, ("time_embed_dim",)),
    "paella-vqgan": (convert_paella_vqgan_gumbel, ("ignore",)),
    "paella-vqgan-f4": (convert_paella_vqgan, ()),
    "open-clip": (convert_open_clip, ("vision_heads", "text_heads", "quick_gelu")),
    "ldm": (convert_ldm_pipeline, ("task", "release", "tokenizer", "use_ema", *LDM_OPTIONS)),
    "ldm-first-stage": (take_ldm_first_stage, ("resolution", "scale_factor", "use_ema")),
    "versatile-unet": (convert_versatile_unet, ("num_heads", "attention_levels")),
    "versatile-start": (convert_stable_diffusion_unet, ("num_heads", "context_type")),
    "optimus": (convert_optimus, ("encoder_heads", "decoder_heads")),
}
# kind -> what makes the tokenizers and the like that belong to the model, by their subfolders, and its options
PROCESSORS = {
    "open-clip": (clip_processors, ()),
    "optimus": (optimus_tokenizers, ("encoder_tokenizer", "decoder_tokenizer")),
}


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="diffusers-ext",
        description="Convert original checkpoints, share pipelines, write the built-in data set.",
        allow_abbrev=False,
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    convert = commands.add_parser(
        "convert",
        help="turn a checkpoint of the original authors into a model or pipeline folder",
        description="Strict: a key that is unknown or missing is an error that lists it.",
        allow_abbrev=False,
    )
    convert.add_argument("kind", choices=CONVERTERS)
    convert.add_argument("checkpoint", type=Path, help="the original's .pt, .ckpt or .safetensors file")
    convert.add_argument("output_dir", type=Path, help="new folder for the result and its card")
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
    convert.add_argument("--release", choices=RELEASES, metavar="NAME", help=f"ldm: {', '.join(RELEASES)}")
    convert.add_argument("--task", choices=TASKS, help="ldm: of a model that is no released one")
    convert.add_argument(
        "--num_heads", type=int, help="ldm: of the U-Net's config; this ...; versatile-unet, versatile-start: if not 8"
    )
    convert.add_argument(
        "--context_type", choices=CONTEXT_TYPES, help="versatile-start: what Stable Diffusion's attention will read"
    )
    convert.add_argument(
        "--attention_levels",
        nargs="+",
        type=int,
        choices=(0, 1),
        help="versatile-unet: for each level, finest first, whether it has context layers, if not 1 1 ... 0",
    )
    convert.add_argument("--num_head_channels", type=int, help="ldm: ... or this")
    convert.add_argument("--resolution", type=int, help="ldm, ldm-first-stage: side of the pictures, if not 256")
    convert.add_argument("--scale_factor", type=float, help="ldm, ldm-first-stage: of the latents, if not in the file")
    convert.add_argument("--encoder_heads", type=int, help="optimus: of BERT, if not its width / 64")
    convert.add_argument("--decoder_heads", type=int, help="optimus: of GPT-2, if not its width / 64")
    for part, network in (("encoder", "BERT"), ("decoder", "GPT-2")):
        convert.add_argument(f"--{part}_tokenizer", help=f"optimus: folder or name of {network}'s, to be written too")
    convert.add_argument("--null_class", type=int, help="ldm: the class that stands for none, if there is one")
    convert.add_argument("--num_classes", type=int, help="ldm: categories of a layout model")
    convert.add_argument("--tokenizer", help="ldm: folder or name of the text model's, if not bert-base-uncased")
    convert.add_argument(
        "--use_ema", action=argparse.BooleanOptionalAction, help="ldm, ldm-first-stage: averaged weights, if there are"
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
    build_processors, own = PROCESSORS.get(options.kind, (lambda model: [], ()))
    names = {name for _, names in (*CONVERTERS.values(), *PROCESSORS.values()) for name in names}
    chosen = {name: value for name in sorted(names) if (value := getattr(options, name)) is not None}
    if refused := [name for name in chosen if name not in (*accepted, *own)]:
        raise ValueError(f"{options.kind} takes no --{' --'.join(refused)}.")
    if options.output_dir.exists():
        raise ValueError(f"{str(options.output_dir)!r} exists: name a new folder.")
    own_options = {name: chosen.pop(name) for name in own if name in chosen}
    model = converter(load_original(options.checkpoint, allow_pickle=options.allow_pickle), **chosen)
    for subfolder, part in [("", model), *build_processors(model, **own_options)]:
        part.save_pretrained(options.output_dir / subfolder)
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
    parts = model.components.values() if isinstance(model, DiffusionPipeline) else [model]
    count = sum(weight.numel() for part in parts if isinstance(part, nn.Module) for weight in part.parameters())
    print(f"Wrote {options.output_dir}: {name} with {count:,} parameters.")
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
