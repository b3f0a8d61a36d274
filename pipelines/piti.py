"""PITI, label map or sketch to image (arXiv 2205.12952): the file for `custom_pipeline=`, and a runnable example.

As a custom pipeline. The package must be installed; a folder needs no import of it, a name on the Hub needs
`import diffusers_ext` first (diffusers looks at the components before it reads this file), or an export by
`diffusers-ext export-hub --no-import`, which needs neither this file nor the import:

    DiffusionPipeline.from_pretrained("folder/or/hub-id", custom_pipeline="pipelines/piti.py", trust_remote_code=True)

As a script:

    python pipelines/piti.py path/to/checkpoint --label_map labels.png
"""

import argparse

from PIL import Image

# diffusers takes the one pipeline class that it finds here, so no other may be imported by name
try:
    from diffusers_ext.pipelines.piti.pipeline_piti import PITIPipeline
except ModuleNotFoundError as error:
    if error.name is None or error.name.split(".")[0] != "diffusers_ext":
        raise
    raise ModuleNotFoundError(
        "pipelines/piti.py needs the package diffusers_ext: pip install . in a checkout, or make venv.",
        name=error.name,
    ) from error


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description="Sample images that follow a label map or a sketch.", allow_abbrev=False
    )
    parser.add_argument("checkpoint", help="pipeline folder or Hub id")
    parser.add_argument("--label_map", help="image of mode L or P: one label a pixel; RGB: colours of the palette")
    parser.add_argument("--sketch", help="image with white lines on black")
    parser.add_argument("--num_images_per_prompt", type=int, default=4)
    parser.add_argument("--num_inference_steps", type=int, help="default: the checkpoint's")
    parser.add_argument("--guidance_scale", type=float, help="default: the checkpoint's")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16", "float16"))
    parser.add_argument("--output", default="piti.png")
    args = parser.parse_args(arguments)

    import torch
    from diffusers.utils import make_image_grid

    pipe = PITIPipeline.from_pretrained(args.checkpoint, dtype=getattr(torch, args.dtype)).to(args.device)
    given = {"label_map": args.label_map, "sketch": args.sketch}
    conditions = {name: Image.open(path) for name, path in given.items() if path is not None}
    generators = [torch.Generator(args.device).manual_seed(args.seed + i) for i in range(args.num_images_per_prompt)]
    images = pipe(
        **conditions,
        num_images_per_prompt=args.num_images_per_prompt,
        num_inference_steps=args.num_inference_steps,
        guidance_scale=args.guidance_scale,
        generator=generators,
    ).images
    make_image_grid(images, rows=1, cols=len(images)).save(args.output)
    print(f"{len(images)} images: {args.output}")


if __name__ == "__main__":
    main()
