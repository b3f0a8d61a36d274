"""The image regression that super-resolution is held against: the same U-Net, trained to predict the pixels.

    python benchmarks/quality_ldm_regression.py runs/ldm-scenes-64-super_resolution --output_dir runs/ldm-regression

The paper compares with such a network (arXiv 2112.10752, table 5: higher PSNR and SSIM, but blurred). Here it is the
U-Net of a trained super-resolution pipeline with new weights, from the small picture to 3 x 4 x 4 channels on its grid
(the 4 x 4 block of pixels that replaces each), what bicubic enlargement misses, squared error, AdamW.
"""

import argparse
import sys
import time

import torch
from diffusers import UNet2DModel
from parts.pixel_regression import FACTOR, Regression
from torch import Tensor, nn

from diffusers_ext.data.scenes import render, sample_scene
from diffusers_ext.degradations.bsr import degrade_bicubic


def draw_batch(step: int, size: int, resolution: int) -> tuple[Tensor, Tensor]:
    """Training scenes and what bicubic reduction leaves of them."""
    true = torch.stack(
        [
            torch.from_numpy(render(sample_scene(0, step * size + i), resolution)).permute(2, 0, 1) / 127.5 - 1
            for i in range(size)
        ]
    )
    return true, torch.stack([degrade_bicubic(picture, FACTOR) for picture in true])


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("checkpoint", help="pipeline folder of super-resolution, whose U-Net's config is used")
    parser.add_argument("--output_dir", required=True)
    parser.add_argument("--max_train_steps", type=int, default=2000)
    parser.add_argument("--train_batch_size", type=int, default=32)
    parser.add_argument("--learning_rate", type=float, default=2e-3)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(arguments)
    torch.manual_seed(args.seed)
    config = dict(UNet2DModel.load_config(args.checkpoint, subfolder="unet"))
    for name in ("_class_name", "num_attention_heads"):  # of an LDMUNet: the same sizes, with the stock heads
        config.pop(name, None)
    resolution = config["sample_size"] * FACTOR
    # the weights are new: only widths and depths are taken over
    unet = UNet2DModel.from_config({**config, "in_channels": 3, "out_channels": 3 * FACTOR**2})
    nn.init.zeros_(unet.conv_out.weight)  # so that it starts from bicubic enlargement
    model = Regression(unet).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.learning_rate)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, args.learning_rate, total_steps=args.max_train_steps, pct_start=0.05
    )
    started = time.perf_counter()
    for step in range(args.max_train_steps):
        true, low = draw_batch(step, args.train_batch_size, resolution)
        loss = (model(low) - true).square().mean()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad(set_to_none=True)
        if (step + 1) % 100 == 0 or step + 1 == args.max_train_steps:
            seconds = time.perf_counter() - started
            print(f"step {step + 1}: squared error {loss.item():.5f}, {seconds:.0f} s", file=sys.stderr, flush=True)
    model.unet.save_pretrained(args.output_dir)


if __name__ == "__main__":
    main()
