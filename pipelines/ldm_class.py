"""Latent diffusion, class-conditional (arXiv 2112.10752): the file for `custom_pipeline=`, and a runnable example.

As a custom pipeline. The package must be installed; a folder needs no import of it, a name on the Hub needs
`import diffusers_ext` first (diffusers looks at the components before it reads this file), or an export by
`diffusers-ext export-hub --no-import`, which needs neither this file nor the import:

    DiffusionPipeline.from_pretrained(
        "folder/or/hub-id", custom_pipeline="pipelines/ldm_class.py", trust_remote_code=True
    )

As a script:

    python pipelines/ldm_class.py path/to/checkpoint "red circle" 3 --guidance_scale 3
"""

import argparse

# diffusers takes the one pipeline class that it finds here, so no other may be imported by name
try:
    from diffusers_ext.pipelines.ldm.pipeline_ldm_class import LDMClassConditionalPipeline
except ModuleNotFoundError as error:
    if error.name is None or error.name.split(".")[0] != "diffusers_ext":
        raise
    raise ModuleNotFoundError(
        "pipelines/ldm_class.py needs the package diffusers_ext: pip install . in a checkout, or make venv.",
        name=error.name,
    ) from error


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Sample a grid of pictures.", allow_abbrev=False)
    parser.add_argument("checkpoint", help="pipeline folder or Hub id")
    parser.add_argument("classes", nargs="+", help="names or numbers")
    parser.add_argument("--num_images_per_prompt", type=int, default=4)
    parser.add_argument("--num_inference_steps", type=int, default=50)
    parser.add_argument("--guidance_scale", type=float, help="default: the checkpoint's")
    parser.add_argument("--eta", type=float, default=0.0, help="noise of DDIM's steps, 0 to 1")
    parser.add_argument("--height", type=int, help="pixels; default: the checkpoint's; so is --width")
    parser.add_argument("--width", type=int)
    parser.add_argument("--tile_size", type=int, help="pixels: sample in tiles, for large pictures")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16", "float16"))
    parser.add_argument("--output", default="ldm_class.png")
    args = parser.parse_args(arguments)

    import torch
    from diffusers.utils import make_image_grid

    pipe = LDMClassConditionalPipeline.from_pretrained(args.checkpoint, dtype=getattr(torch, args.dtype)).to(
        args.device
    )
    labels = [int(label) if label.isdigit() else label for label in args.classes]
    generators = [
        torch.Generator(args.device).manual_seed(args.seed + i)
        for i in range(len(labels) * args.num_images_per_prompt)
    ]
    images = pipe(
        labels,
        height=args.height,
        width=args.width,
        num_images_per_prompt=args.num_images_per_prompt,
        num_inference_steps=args.num_inference_steps,
        guidance_scale=args.guidance_scale,
        eta=args.eta,
        tile_size=args.tile_size,
        generator=generators,
    ).images
    make_image_grid(images, rows=len(labels), cols=args.num_images_per_prompt).save(args.output)
    print(f"{len(images)} pictures, one row a class: {args.output}")


if __name__ == "__main__":
    main()
