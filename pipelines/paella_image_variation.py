"""Paella, image variations (arXiv 2211.07292): the file to name in `custom_pipeline=`, and a runnable example.

As a custom pipeline. The package must be installed; a folder needs no import of it, a name on the Hub needs
`import diffusers_ext` first (diffusers looks at the components before it reads this file), or an export by
`diffusers-ext export-hub --no-import`, which needs neither this file nor the import:

    DiffusionPipeline.from_pretrained(
        "checkpoints/paella-scenes-64", custom_pipeline="pipelines/paella_image_variation.py", trust_remote_code=True
    )

As a script:

    python pipelines/paella_image_variation.py checkpoints/paella-scenes-64 picture.png --output variations.png
"""

import argparse

# diffusers takes the one pipeline class that it finds here, so no other may be imported by name
try:
    from diffusers_ext.pipelines.paella.pipeline_paella_image_variation import PaellaImageVariationPipeline
except ModuleNotFoundError as error:
    if error.name is None or error.name.split(".")[0] != "diffusers_ext":
        raise
    raise ModuleNotFoundError(
        "pipelines/paella_image_variation.py needs the package diffusers_ext: pip install . in a"
        " checkout, or make venv.",
        name=error.name,
    ) from error


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Draw other images of what a picture shows.", allow_abbrev=False)
    parser.add_argument("checkpoint", help="pipeline folder or Hub id")
    parser.add_argument("images", nargs="+", help="files or addresses of pictures")
    parser.add_argument("--height", type=int, help="pixels of the results; default: the checkpoint's; so is --width")
    parser.add_argument("--width", type=int)
    parser.add_argument("--num_images_per_prompt", type=int, default=4)
    parser.add_argument("--num_inference_steps", type=int, default=12)
    parser.add_argument("--guidance_scale", type=float, help="default: the checkpoint's")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16", "float16"))
    parser.add_argument("--output", default="paella_image_variation.png", help="one row a picture")
    args = parser.parse_args(arguments)

    import torch
    from diffusers.utils import load_image, make_image_grid

    pipe = PaellaImageVariationPipeline.from_pretrained(args.checkpoint, dtype=getattr(torch, args.dtype)).to(
        args.device
    )
    generators = [
        torch.Generator(args.device).manual_seed(args.seed + i)
        for i in range(len(args.images) * args.num_images_per_prompt)
    ]
    images = pipe(
        [load_image(image) for image in args.images],
        height=args.height,
        width=args.width,
        num_inference_steps=args.num_inference_steps,
        guidance_scale=args.guidance_scale,
        num_images_per_prompt=args.num_images_per_prompt,
        generator=generators,
    ).images
    make_image_grid(images, rows=len(args.images), cols=args.num_images_per_prompt).save(args.output)
    print(f"{len(images)} pictures, one row a given picture: {args.output}")


if __name__ == "__main__":
    main()
