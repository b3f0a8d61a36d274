"""A later stage of Cascaded Diffusion (arXiv 2106.15282): the file for `custom_pipeline=`, and a runnable example.

As a custom pipeline. The package must be installed; a folder needs no import of it, a name on the Hub needs
`import diffusers_ext` first (diffusers looks at the components before it reads this file), or an export by
`diffusers-ext export-hub --no-import`, which needs neither this file nor the import:

    DiffusionPipeline.from_pretrained(
        "folder/or/hub-id", custom_pipeline="pipelines/cascaded_upscale.py", trust_remote_code=True
    )

As a script:

    python pipelines/cascaded_upscale.py path/to/checkpoint small.png --class_label "red circle"
"""

import argparse

# diffusers takes the one pipeline class that it finds here, so no other may be imported by name
try:
    from diffusers_ext.pipelines.cascaded.pipeline_cascaded_upscale import CascadedUpscalePipeline
except ModuleNotFoundError as error:
    if error.name is None or error.name.split(".")[0] != "diffusers_ext":
        raise
    raise ModuleNotFoundError(
        "pipelines/cascaded_upscale.py needs the package diffusers_ext: pip install . in a checkout, or make venv.",
        name=error.name,
    ) from error


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Enlarge a picture by one stage.", allow_abbrev=False)
    parser.add_argument("checkpoint", help="pipeline folder or Hub id")
    parser.add_argument("image")
    parser.add_argument("--num_images_per_prompt", type=int, default=4)
    parser.add_argument("--num_inference_steps", type=int, default=100)
    parser.add_argument("--guidance_scale", type=float, help="default: the checkpoint's")
    parser.add_argument("--eta", type=float, default=0.0, help="noise of DDIM's steps, 0 to 1")
    parser.add_argument("--class_label", help="name or number, for a network with classes")
    parser.add_argument("--noise_level", type=float, help="noise of the small picture; default: the checkpoint's")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16", "float16"))
    parser.add_argument("--output", default="cascaded_upscale.png")
    args = parser.parse_args(arguments)

    import torch
    from diffusers.utils import load_image, make_image_grid

    pipe = CascadedUpscalePipeline.from_pretrained(args.checkpoint, dtype=getattr(torch, args.dtype)).to(args.device)
    label = args.class_label
    generators = [torch.Generator(args.device).manual_seed(args.seed + i) for i in range(args.num_images_per_prompt)]
    images = pipe(
        load_image(args.image),
        int(label) if label is not None and label.isdigit() else label,
        num_images_per_prompt=args.num_images_per_prompt,
        num_inference_steps=args.num_inference_steps,
        guidance_scale=args.guidance_scale,
        eta=args.eta,
        noise_level=args.noise_level,
        generator=generators,
    ).images
    make_image_grid(images, rows=1, cols=len(images)).save(args.output)
    print(f"{len(images)} pictures: {args.output}")


if __name__ == "__main__":
    main()
