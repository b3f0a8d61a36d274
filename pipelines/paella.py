"""Paella, text to image (arXiv 2211.07292): the file to name in `custom_pipeline=`, and a runnable example.

As a custom pipeline. The package must be installed; a folder needs no import of it, a name on the Hub needs
`import diffusers_ext` first (diffusers looks at the components before it reads this file), or an export by
`diffusers-ext export-hub --no-import`, which needs neither this file nor the import:

    DiffusionPipeline.from_pretrained(
        "checkpoints/paella-scenes-64", custom_pipeline="pipelines/paella.py", trust_remote_code=True
    )

As a script:

    python pipelines/paella.py checkpoints/paella-scenes-64 "a large red circle on the left" --output paella.png
"""

import argparse

# diffusers takes the one pipeline class that it finds here, so no other may be imported by name
try:
    from diffusers_ext.pipelines.paella.pipeline_paella import PaellaPipeline
except ModuleNotFoundError as error:
    if error.name is None or error.name.split(".")[0] != "diffusers_ext":
        raise
    raise ModuleNotFoundError(
        "pipelines/paella.py needs the package diffusers_ext: pip install . in a checkout, or make venv.",
        name=error.name,
    ) from error


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Sample a grid of pictures.", allow_abbrev=False)
    parser.add_argument("checkpoint", help="pipeline folder or Hub id")
    parser.add_argument("prompts", nargs="+", help="of a network that was trained on classes: their names or numbers")
    parser.add_argument("--negative_prompt")
    parser.add_argument("--num_images_per_prompt", type=int, default=4)
    parser.add_argument("--num_inference_steps", type=int, default=12)
    parser.add_argument("--guidance_scale", type=float, help="default: the checkpoint's")
    parser.add_argument("--height", type=int, help="pixels; default: the checkpoint's; so is --width")
    parser.add_argument("--width", type=int)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16", "float16"))
    parser.add_argument("--output", default="paella.png", help="one row a prompt")
    args = parser.parse_args(arguments)

    import torch
    from diffusers.utils import make_image_grid

    pipe = PaellaPipeline.from_pretrained(args.checkpoint, dtype=getattr(torch, args.dtype)).to(args.device)
    generators = [
        torch.Generator(args.device).manual_seed(args.seed + i)
        for i in range(len(args.prompts) * args.num_images_per_prompt)
    ]
    if pipe.text_encoder is None:
        condition = {"class_labels": [int(label) if label.isdecimal() else label for label in args.prompts]}
    else:
        condition = {"prompt": args.prompts}
    images = pipe(
        **condition,
        height=args.height,
        width=args.width,
        num_inference_steps=args.num_inference_steps,
        guidance_scale=args.guidance_scale,
        negative_prompt=args.negative_prompt,
        num_images_per_prompt=args.num_images_per_prompt,
        generator=generators,
    ).images
    make_image_grid(images, rows=len(args.prompts), cols=args.num_images_per_prompt).save(args.output)
    print(f"{len(images)} pictures, one row a prompt: {args.output}")


if __name__ == "__main__":
    main()
