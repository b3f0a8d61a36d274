"""How near do a Versatile Diffusion's pictures come to true ones, over guidance? The paper's FID, small.

    python benchmarks/quality_versatile_frechet.py checkpoints/versatile-scenes-64 --guidance_scales 1 2 4

Frechet distances between sets of `--num_cases` pictures over the class tokens of the checkpoint's own CLIP: no FID,
and comparable only within a table. The target are held-out scenes; texts and pictures to vary come from others. "CLIP
score" is the mean cosine of a picture and its caption, or the varied picture. Beside them the same of other true
pictures (what a perfect model would reach), of true pictures through the image autoencoder, and of noise.
"""

import argparse
import sys
from collections.abc import Callable, Sequence

import numpy as np
import torch
from parts.versatile_bench import Bench, add_options, check_options
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from diffusers_ext.data.scenes import full_caption
from diffusers_ext.evaluation.frechet import frechet_distance

FLOWS = ("text-to-image", "image-to-image")
NO_GUIDANCE = {"do_classifier_free_guidance": False}


def parse_args(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    add_options(parser)
    parser.add_argument("--guidance_scales", type=float, nargs="+", default=[1.0, 2.0, 4.0])
    parser.add_argument("--num_cases", type=int, default=256, help="pictures on each side")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(arguments)
    check_options(parser, args, num_cases=2)
    if wrong := [scale for scale in args.guidance_scales if scale < 0]:
        parser.error(f"--guidance_scales must be at least 0, received {wrong[0]:g}")
    if args.guidance_scale is not None:
        parser.error("--guidance_scale is one of many here: use --guidance_scales")
    return args


def features(bench: Bench, pictures: Sequence[Image.Image | np.ndarray]) -> Tensor:
    """CLIP's vectors of pictures, (n, d), of length 1."""
    tokens = bench.pipe.encode_image([Image.fromarray(np.asarray(p)) for p in pictures], **NO_GUIDANCE)[0]
    return F.normalize(tokens[:, 0].float(), dim=-1)


def text_features(bench: Bench, texts: Sequence[str]) -> Tensor:
    """CLIP's vectors of texts, (n, d), of length 1."""
    pipe = bench.pipe
    ids = pipe.tokenizer(list(texts), padding=True, truncation=True, return_tensors="pt").input_ids
    return F.normalize(pipe.text_encoder(ids.to(bench.args.device)).text_embeds.float(), dim=-1)


@torch.no_grad()
def main(arguments: list[str] | None = None) -> None:
    args = parse_args(arguments)
    bench = Bench(args)
    flows = bench.available(list(FLOWS), {})
    if not flows or bench.pipe.image_encoder is None:
        have = ", ".join(bench.pipe.unet.flows)
        sys.exit(
            f"Pictures are measured by the checkpoint's image encoder: it needs a flow of {FLOWS}, and has {have}."
        )
    scenes = bench.scenes(2 * args.num_cases)
    pictures = bench.render(scenes)
    target, others = pictures[0 : args.num_cases], pictures[args.num_cases :]
    captions = [full_caption(scene) for scene in scenes[args.num_cases :]]
    true = features(bench, target)
    print(f"{args.num_cases} pictures a side, seed {args.seed}, {args.num_inference_steps} steps\n")
    print("| pictures | guidance | Frechet distance | CLIP score |\n|---|---|---|---|")

    def show(label: str, scale: str, made: Sequence, wanted: Tensor | None) -> None:
        found = features(bench, made)
        score = "-" if wanted is None else f"{float((found * wanted).sum(-1).mean()):.3f}"
        print(f"| {label} | {scale} | {frechet_distance(found, true):.4f} | {score} |", flush=True)

    said = None if bench.pipe.text_encoder is None else text_features(bench, captions)
    wanted = {"text-to-image": said, "image-to-image": features(bench, others)}
    contexts: dict[str, dict] = {"text-to-image": {"prompt": captions}, "image-to-image": {"image": others}}
    for flow in flows:
        for scale in args.guidance_scales:
            bench.args.guidance_scale = scale
            show(flow, f"{scale:g}", bench.sample(args.seed, **contexts[flow]), wanted[flow])
    references: dict[str, Callable[[], Sequence]] = {
        "other true pictures": lambda: others,
        "other true pictures, encoded and decoded": lambda: decoded(bench, others),
        "noise": lambda: noise(bench, len(others)),
    }
    for label, make in references.items():
        show(label, "-", make(), said)


def noise(bench: Bench, count: int) -> list[np.ndarray]:
    random = np.random.default_rng(bench.args.seed)
    return list(random.integers(0, 256, (count, bench.side, bench.side, 3), dtype=np.uint8))


def decoded(bench: Bench, pictures: Sequence[Image.Image]) -> list[np.ndarray]:
    pixels = torch.from_numpy(np.stack([np.asarray(p) for p in pictures])).permute(0, 3, 1, 2) / 127.5 - 1
    vae, made = bench.pipe.vae, []
    for some in pixels.split(bench.args.batch_size):
        latents = vae.encode(some.to(bench.args.device)).latent_dist.mode() * vae.config.scaling_factor
        made.append(bench.pipe.decode_latents(latents))
    return list((torch.cat(made).permute(0, 2, 3, 1).cpu().numpy() * 255).round().astype(np.uint8))


if __name__ == "__main__":
    main()
