"""Latent diffusion without a condition (arXiv 2112.10752): the file for `custom_pipeline=`, and a runnable example.

As a custom pipeline. The package must be installed; a folder needs no import of it, a name on the Hub needs
`import diffusers_ext` first (diffusers looks at the components before it reads this file), or an export by
`diffusers-ext export-hub --no-import`, which needs neither this file nor the import:

    DiffusionPipeline.from_pretrained(
        "folder/or/hub-id", custom_pipeline="pipelines/ldm_unconditional.py", trust_remote_code=True
    )

As a script:

    python pipelines/ldm_unconditional.py CompVis/ldm-celebahq-256 --batch_size 4 --eta 1
"""

import argparse

# diffusers takes the one pipeline class that it finds here, so no other may be imported by name
try:
    from diffusers_ext.pipelines.ldm.picture_guidance import low_resolution_guidance
    from diffusers_ext.pipelines.ldm.pipeline_ldm_unconditional import LDMUnconditionalPipeline
except ModuleNotFoundError as error:
    if error.name is None or error.name.split(".")[0] != "diffusers_ext":
        raise
    raise ModuleNotFoundError(
        "pipelines/ldm_unconditional.py needs the package diffusers_ext: pip install . in a checkout, or make venv.",
        name=error.name,
    ) from error


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description="Sample a row of pictures, fill a hole, or follow a small picture.", allow_abbrev=False
    )
    parser.add_argument("checkpoint", help="pipeline folder or Hub id")
    parser.add_argument("--image", help="a picture of which a part is known; with --mask_image")
    parser.add_argument("--mask_image", help="of its size, white where to draw")
    parser.add_argument("--low_resolution", help="a small picture that guides the sampling")
    parser.add_argument("--guidance_fn_scale", type=float, default=1.0)
    parser.add_argument("--batch_size", type=int, default=4)
    parser.add_argument("--num_inference_steps", type=int, default=50)
    parser.add_argument("--eta", type=float, default=0.0, help="noise of DDIM's steps, 0 to 1")
    parser.add_argument("--height", type=int, help="pixels; default: the checkpoint's; so is --width")
    parser.add_argument("--width", type=int)
    parser.add_argument("--tile_size", type=int, help="pixels: sample in tiles, for large pictures")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16", "float16"))
    parser.add_argument("--output", default="ldm_unconditional.png")
    args = parser.parse_args(arguments)

    import torch
    from diffusers.utils import load_image, make_image_grid

    pipe = LDMUnconditionalPipeline.from_pretrained(args.checkpoint, dtype=getattr(torch, args.dtype)).to(args.device)
    guidance = None if args.low_resolution is None else low_resolution_guidance(load_image(args.low_resolution))
    generators = [torch.Generator(args.device).manual_seed(args.seed + i) for i in range(args.batch_size)]
    images = pipe(
        batch_size=args.batch_size,
        height=args.height,
        width=args.width,
        image=None if args.image is None else load_image(args.image),
        mask_image=None if args.mask_image is None else load_image(args.mask_image),
        guidance_fn=guidance,
        guidance_fn_scale=args.guidance_fn_scale,
        num_inference_steps=args.num_inference_steps,
        eta=args.eta,
        tile_size=args.tile_size,
        generator=generators,
    ).images
    make_image_grid(images, rows=1, cols=len(images)).save(args.output)
    print(f"{len(images)} pictures: {args.output}")


if __name__ == "__main__":
    main()
