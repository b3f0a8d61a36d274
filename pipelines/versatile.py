"""Versatile Diffusion (arXiv 2211.08332): the file to name in `custom_pipeline=`, and a runnable example.

As a custom pipeline. The package must be installed; a folder needs no import of it, a name on the Hub needs
`import diffusers_ext` first (diffusers looks at the components before it reads this file), or an export by
`diffusers-ext export-hub --no-import`, which needs neither this file nor the import:

    DiffusionPipeline.from_pretrained(
        "path/to/checkpoint", custom_pipeline="pipelines/versatile.py", trust_remote_code=True
    )

As a script, one command for each flow:

    python pipelines/versatile.py CHECKPOINT --prompt "a red circle" --output circles.png
    python pipelines/versatile.py CHECKPOINT --image photo.png --output variations.png
    python pipelines/versatile.py CHECKPOINT --image photo.png --prompt "at night" --text_ratio 0.7 --output night.png
    python pipelines/versatile.py CHECKPOINT --image photo.png --make text
    python pipelines/versatile.py CHECKPOINT --prompt "a red circle" --make text
"""

import argparse

# diffusers takes the one pipeline class that it finds here, so no other may be imported by name
try:
    from diffusers_ext.pipelines.versatile.pipeline_versatile import VersatilePipeline
except ModuleNotFoundError as error:
    if error.name is None or error.name.split(".")[0] != "diffusers_ext":
        raise
    raise ModuleNotFoundError(
        "pipelines/versatile.py needs the package diffusers_ext: pip install . in a checkout, or make venv.",
        name=error.name,
    ) from error


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description="Make pictures or texts from texts, pictures, or both.", allow_abbrev=False
    )
    parser.add_argument("checkpoint", help="pipeline folder or Hub id")
    parser.add_argument("--make", default="image", choices=("image", "text"))
    parser.add_argument("--prompt", nargs="+", help="several are read together")
    parser.add_argument("--image", nargs="+", help="picture files; several are read together")
    parser.add_argument("--image_weights", nargs="+", type=float, help="one a picture, 0 to 1")
    parser.add_argument("--text_ratio", type=float, default=0.5, help="share of the texts beside the pictures")
    parser.add_argument("--focus", type=float, default=0.5, help="0: what is on a picture, 1: its style")
    parser.add_argument("--strength", type=float, default=1.0, help="below 1: start from the picture")
    parser.add_argument("--color_adjust", choices=("simple", "histogram"))
    parser.add_argument("--negative_prompt")
    parser.add_argument("--temperature", type=float, default=1.0, help="of the words of texts; 0: the most probable")
    parser.add_argument("--max_text_length", type=int, help="of texts, in tokens; default: 30 or the decoder's")
    parser.add_argument("--num_images_per_prompt", type=int, default=4)
    parser.add_argument("--num_inference_steps", type=int, default=50)
    parser.add_argument("--guidance_scale", type=float, help="default: the checkpoint's")
    parser.add_argument("--height", type=int, help="pixels; default: the checkpoint's; so is --width")
    parser.add_argument("--width", type=int)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16", "float16"))
    parser.add_argument("--output", default="versatile.png", help="of pictures; texts are printed")
    args = parser.parse_args(arguments)

    import torch
    from diffusers.utils import load_image, make_image_grid

    contexts = [kind for kind, given in (("text", args.prompt), ("image", args.image)) if given]
    if not contexts:
        parser.error("pass --prompt, --image, or both")
    flows = [f"{kind}-to-{args.make}" for kind in contexts]  # only their layers are read
    pipe = VersatilePipeline.from_pretrained(args.checkpoint, flows=flows, dtype=getattr(torch, args.dtype))
    count = args.num_images_per_prompt
    result = pipe.to(args.device)(
        [args.prompt] if args.prompt else None,
        [[load_image(path) for path in args.image]] if args.image else None,
        data_type=args.make,
        image_weights=args.image_weights,
        text_ratio=args.text_ratio,
        focus=args.focus,
        strength=args.strength,
        color_adjust=args.color_adjust,
        negative_prompt=args.negative_prompt,
        temperature=args.temperature,
        max_text_length=args.max_text_length,
        num_images_per_prompt=count,
        num_inference_steps=args.num_inference_steps,
        guidance_scale=args.guidance_scale,
        height=args.height,
        width=args.width,
        generator=[torch.Generator(args.device).manual_seed(args.seed + i) for i in range(count)],
    )
    if args.make == "text":
        print("\n".join(result.texts))
        return
    make_image_grid(result.images, rows=1, cols=count).save(args.output)
    print(f"{count} pictures: {args.output}")


if __name__ == "__main__":
    main()
