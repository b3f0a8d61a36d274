"""The sheet of sampled images that a run shows now and then."""

from dataclasses import dataclass
from typing import Any

import torch

from diffusers_ext.evaluation.image_quality import picture_grid
from diffusers_ext.pipelines.paella.pipeline_paella import PaellaPipeline
from diffusers_ext.training.paella.args import PaellaArgs
from diffusers_ext.training.paella.conditions import Condition, Encoders
from diffusers_ext.training_utils.args import TrainArgs
from diffusers_ext.training_utils.validation import first_rows, save_sheet


@dataclass
class Sheet:
    """Called with a step, draws `validation-<step>.png`: the prompts, or the conditions of the first held-out rows."""

    pipe: PaellaPipeline
    condition: Condition
    encoders: Encoders
    rows: Any
    args: PaellaArgs
    train: TrainArgs

    def __call__(self, step: int) -> dict[str, float]:
        args, side = self.args, self.condition.data.resolution
        self.pipe.to(self.encoders.device)
        condition = self.shown()
        count = len(next(iter(condition.values())))
        pictures = self.pipe(
            **condition, height=side, width=side, guidance_scale=args.guidance_scale,
            num_inference_steps=args.num_inference_steps, output_type="pt",
            generator=[torch.Generator().manual_seed(i) for i in range(count)],
        ).images  # fmt: skip
        sheet = picture_grid(pictures * 2 - 1, columns=8)
        save_sheet(sheet, self.train, step)
        return {}

    def shown(self) -> dict[str, Any]:
        if self.args.validation_prompts:
            return {"prompt": self.args.validation_prompts}
        kind = self.condition.when_sampling()
        rows = first_rows(self.rows, 16, kind.read, self.train.seed, collate=kind.collate, device=self.encoders.device)
        batch, _ = next(rows)
        return {"prompt_embeds": kind.tensor(batch, self.encoders)}
