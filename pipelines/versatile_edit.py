"""Editing with Versatile Diffusion (arXiv 2211.08332): the file to name in `custom_pipeline=`, and a runnable example.

As a custom pipeline. The package must be installed; a folder needs no import of it, a name on the Hub needs
`import diffusers_ext` first (diffusers looks at the components before it reads this file), or an export by
`diffusers-ext export-hub --no-import`, which needs neither this file nor the import:

    DiffusionPipeline.from_pretrained(
        "path/to/checkpoint", custom_pipeline="pipelines/versatile_edit.py", trust_remote_code=True
    )

As a script, on any checkpoint of Versatile Diffusion that has all components and flows:

    python pipelines/versatile_edit.py CHECKPOINT --image photo.png --prompt "a dog" --negative_prompt "a cat"
"""

import argparse

# diffusers takes the one pipeline class that it finds here, so no other may be imported by name
try:
    from diffusers_ext.pipelines.versatile.pipeline_versatile_edit import VersatileEditPipeline
except ModuleNotFoundError as error:
    if error.name is None or error.name.split(".")[0] != "diffusers_ext":
        raise
    raise ModuleNotFoundError(
        "pipelines/versatile_edit.py needs the package diffusers_ext: pip install . in a checkout, or make venv.",
        name=error.name,
    ) from error


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Edit an image by way of its caption.", allow_abbrev=False)
    parser.add_argument("checkpoint", help="pipeline folder or Hub id")
    parser.add_argument("--image", required=True, help="image file")
    parser.add_argument("--prompt", required=True, help="the text to add")
    parser.add_argument("--negative_prompt", required=True, help="the text to take away")
    parser.add_argument("--text_ratio", type=float, default=0.67, help="share of the texts beside the image's style")
    parser.add_argument("--temperature", type=float, default=1.0, help="of the caption's words; 0: the most probable")
    parser.add_argument("--max_text_length", type=int, help="of the caption, in tokens; default: 30 or the decoder's")
    parser.add_argument("--num_images_per_prompt", type=int, default=4)
    parser.add_argument("--num_inference_steps", type=int, default=50, help="of each half")
    parser.add_argument("--guidance_scale", type=float, help="default: the checkpoint's")
    parser.add_argument("--height", type=int, help="pixels; default: the checkpoint's")
    parser.add_argument("--width", type=int, help="pixels; default: the checkpoint's")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16", "float16"))
    parser.add_argument("--output", default="versatile_edit.png", help="the images; the captions are printed")
    args = parser.parse_args(arguments)

    import torch
    from diffusers.utils import load_image, make_image_grid

    pipe = VersatileEditPipeline.from_pretrained(args.checkpoint, dtype=getattr(torch, args.dtype)).to(args.device)
    count = args.num_images_per_prompt
    result = pipe(
        load_image(args.image),
        args.prompt,
        args.negative_prompt,
        text_ratio=args.text_ratio,
        temperature=args.temperature,
        max_text_length=args.max_text_length,
        num_images_per_prompt=count,
        num_inference_steps=args.num_inference_steps,
        guidance_scale=args.guidance_scale,
        height=args.height,
        width=args.width,
        generator=[torch.Generator(args.device).manual_seed(args.seed + i) for i in range(count)],
    )
    print("\n".join(result.texts))
    make_image_grid(result.images, rows=1, cols=count).save(args.output)
    print(f"{count} images: {args.output}")


if __name__ == "__main__":
    main()
