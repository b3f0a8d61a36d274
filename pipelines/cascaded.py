"""Cascaded Diffusion (arXiv 2106.15282): the file for `custom_pipeline=`, and a runnable example.

As a custom pipeline. The package must be installed; a folder needs no import of it, a name on the Hub needs
`import diffusers_ext` first (diffusers looks at the components before it reads this file), or an export by
`diffusers-ext export-hub --no-import`, which needs neither this file nor the import:

    DiffusionPipeline.from_pretrained(
        "folder/or/hub-id", custom_pipeline="pipelines/cascaded.py", trust_remote_code=True
    )

As a script:

    python pipelines/cascaded.py path/to/checkpoint "red circle" 3 --guidance_scale 3
"""

import argparse

# diffusers takes the one pipeline class that it finds here, so no other may be imported by name
try:
    from diffusers_ext.pipelines.cascaded.pipeline_cascaded import CascadedDiffusionPipeline
except ModuleNotFoundError as error:
    if error.name is None or error.name.split(".")[0] != "diffusers_ext":
        raise
    raise ModuleNotFoundError(
        "pipelines/cascaded.py needs the package diffusers_ext: pip install . in a checkout, or make venv.",
        name=error.name,
    ) from error


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Sample a grid of pictures.", allow_abbrev=False)
    parser.add_argument("checkpoint", help="pipeline folder or Hub id")
    parser.add_argument("classes", nargs="*", help="names or numbers; none for a network without classes")
    parser.add_argument("--num_images_per_prompt", type=int, default=4)
    parser.add_argument(
        "--num_inference_steps", type=int, nargs="+", default=[100], help="for all stages, or for each"
    )
    parser.add_argument("--guidance_scale", type=float, help="default: the checkpoint's")
    parser.add_argument("--eta", type=float, default=0.0, help="noise of DDIM's steps, 0 to 1")
    parser.add_argument("--noise_level", type=float, help="of what goes into the upscaling stages; default: their own")
    parser.add_argument("--conditioning_mode", choices=("truncated", "non_truncated", "none"))
    parser.add_argument("--stage_by_stage", action="store_true", help="no more than one stage in memory")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16", "float16"))
    parser.add_argument("--output", default="cascaded.png")
    args = parser.parse_args(arguments)

    import torch
    from diffusers.utils import make_image_grid

    pipe = CascadedDiffusionPipeline.from_pretrained(
        args.checkpoint, dtype=getattr(torch, args.dtype), stage_by_stage=args.stage_by_stage
    ).to(args.device)
    steps = args.num_inference_steps
    labels = [int(label) if label.isdigit() else label for label in args.classes]
    generators = [
        torch.Generator(args.device).manual_seed(args.seed + i)
        for i in range(max(len(labels), 1) * args.num_images_per_prompt)
    ]
    images = pipe(
        labels or None,
        num_images_per_prompt=args.num_images_per_prompt,
        num_inference_steps=steps[0] if len(steps) == 1 else steps,
        guidance_scale=args.guidance_scale,
        eta=args.eta,
        noise_level=args.noise_level,
        conditioning_mode=args.conditioning_mode,
        generator=generators,
    ).images
    make_image_grid(images, rows=max(len(labels), 1), cols=args.num_images_per_prompt).save(args.output)
    print(f"{len(images)} pictures, one row a class: {args.output}")


if __name__ == "__main__":
    main()
