"""Paella, in- and outpainting (arXiv 2211.07292): the file to name in `custom_pipeline=`, and a runnable example.

As a custom pipeline. The package must be installed; a folder needs no import of it, a name on the Hub needs
`import diffusers_ext` first (diffusers looks at the components before it reads this file), or an export by
`diffusers-ext export-hub --no-import`, which needs neither this file nor the import:

    DiffusionPipeline.from_pretrained(
        "checkpoints/paella-scenes-64", custom_pipeline="pipelines/paella_inpaint.py", trust_remote_code=True
    )

As a script, to repaint what is white in a mask, or to draw what lies around a picture:

    python pipelines/paella_inpaint.py checkpoints/paella-scenes-64 "a large red circle on the left" \
        --image picture.png --mask_image mask.png
    python pipelines/paella_inpaint.py checkpoints/paella-scenes-64 "a large red circle on the left" \
        --image picture.png --width 128 --position 0 0
"""

import argparse

# diffusers takes the one pipeline class that it finds here, so no other may be imported by name
try:
    from diffusers_ext.pipelines.paella.pipeline_paella_inpaint import PaellaInpaintPipeline
except ModuleNotFoundError as error:
    if error.name is None or error.name.split(".")[0] != "diffusers_ext":
        raise
    raise ModuleNotFoundError(
        "pipelines/paella_inpaint.py needs the package diffusers_ext: pip install . in a checkout, or make venv.",
        name=error.name,
    ) from error


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description="Repaint a part of a picture, or what lies around it.", allow_abbrev=False
    )
    parser.add_argument("checkpoint", help="pipeline folder or Hub id")
    parser.add_argument("prompts", nargs="+")
    parser.add_argument("--image", required=True, help="file or address of the picture")
    parser.add_argument("--mask_image", help="of its size; white is repainted. Default: the picture is kept whole")
    parser.add_argument("--height", type=int, help="pixels of the canvas; default: the picture's; so is --width")
    parser.add_argument("--width", type=int)
    parser.add_argument("--position", type=int, nargs=2, metavar=("LEFT", "TOP"), help="of the picture on the canvas")
    parser.add_argument("--strength", type=float, default=1.0)
    parser.add_argument("--apply_overlay", action="store_true", help="put the kept pixels back")
    parser.add_argument("--num_images_per_prompt", type=int, default=4)
    parser.add_argument("--num_inference_steps", type=int, default=12)
    parser.add_argument("--guidance_scale", type=float, help="default: the checkpoint's")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16", "float16"))
    parser.add_argument("--output", default="paella_inpaint.png", help="one row a prompt")
    args = parser.parse_args(arguments)

    import torch
    from diffusers.utils import load_image, make_image_grid

    pipe = PaellaInpaintPipeline.from_pretrained(args.checkpoint, dtype=getattr(torch, args.dtype)).to(args.device)
    generators = [
        torch.Generator(args.device).manual_seed(args.seed + i)
        for i in range(len(args.prompts) * args.num_images_per_prompt)
    ]
    images = pipe(
        args.prompts,
        image=load_image(args.image),
        mask_image=None if args.mask_image is None else load_image(args.mask_image),
        height=args.height,
        width=args.width,
        position="center" if args.position is None else tuple(args.position),
        strength=args.strength,
        apply_overlay=args.apply_overlay,
        num_inference_steps=args.num_inference_steps,
        guidance_scale=args.guidance_scale,
        num_images_per_prompt=args.num_images_per_prompt,
        generator=generators,
    ).images
    make_image_grid(images, rows=len(args.prompts), cols=args.num_images_per_prompt).save(args.output)
    print(f"{len(images)} pictures, one row a prompt: {args.output}")


if __name__ == "__main__":
    main()
