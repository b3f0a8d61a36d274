"""Which level of noise a super-resolution stage samples best at: a sweep after training, with a measure of choice.

Ho et al., arXiv 2106.15282, section 3.3: a stage is trained once with random s, and s is then searched for.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ...conditions.images import image_batch
from ..checks import check_choice, check_integer
from .chain import STAGES
from .pipeline_cascaded import CascadedDiffusionPipeline
from .pipeline_cascaded_upscale import CascadedUpscalePipeline
from .stage import CascadedStage

Metric = Callable[[Tensor], float]  # of images (n, 3, H, W) in [0, 1], in the order of their classes


@dataclass(frozen=True)
class SearchPoint:
    """What the measure says at a level.

    Args:
        conditioning_mode: "truncated" or "non_truncated".
        noise_level: s.
        value: Of the measure.
    """

    conditioning_mode: str
    noise_level: float
    value: float


@dataclass
class TruncationSearch:
    """A sweep over levels of noise of one stage.

    The stages before it are run once for the non-truncated form, whose clean images are kept and noised anew at each
    level, and once for the truncated form, which gives the images of all levels in one pass. Image k is drawn from
    seed + k, and its noise is the same at all levels, so that they differ by the level alone.

    Args:
        pipe: The cascade, its stages in memory.
        class_labels: A class for each image; None for stages without classes.
        count: Number of images, where there are no classes.
        stage: The stage whose level is varied and whose images are measured.
        num_inference_steps: Of every stage, or a list with one for each.
        guidance_scale: Of the varied stage.
        batch_size: Images that are drawn together.
        seed: Of the first image.
    """

    pipe: CascadedDiffusionPipeline
    class_labels: Sequence[int | str] | None = None
    count: int = 64
    stage: str = "upscale_1"
    num_inference_steps: int | Sequence[int] = 100
    guidance_scale: float | None = None
    batch_size: int = 32
    seed: int = 0
    _clean: list[Tensor] = field(default_factory=list)  # z_0 of each batch

    def __post_init__(self) -> None:
        check_stage(self.pipe, self.stage)
        check_integer("batch_size", self.batch_size, 1)
        check_integer("count", self.count, 1)
        if getattr(self.pipe, self.stage) is None:
            raise ValueError(f"{self.stage} is not in memory: call `load_stages()`.")
        self.count = self.count if self.class_labels is None else len(self.class_labels)

    @torch.no_grad()
    def run(
        self,
        levels: Sequence[float],
        metric: Metric,
        *,
        conditioning_modes: Sequence[str] = ("truncated", "non_truncated"),
        image: Any = None,
    ) -> list[SearchPoint]:
        """Measures the images at each level, in each form.

        Args:
            levels: Of noise, in [0, T].
            metric: The measure, of the images (n, 3, H, W) in [0, 1] of a level.
            conditioning_modes: "truncated", "non_truncated" or both.
            image: True low-resolution images in place of generated ones, one for each image. Only non-truncated.
        """
        for mode in conditioning_modes:
            check_choice("conditioning_modes", mode, ("truncated", "non_truncated"))
        if image is not None and list(conditioning_modes) != ["non_truncated"]:
            raise ValueError("`image` holds finished images, which cannot be truncated: use only 'non_truncated'.")
        if not levels:
            raise ValueError("`levels` is empty: pass levels of noise such as [0, 101, 251, 501].")
        stage = getattr(self.pipe, self.stage)
        levels = sorted({stage.resolve_noise_level(level) for level in levels})
        points = []
        for mode in conditioning_modes:
            if mode == "truncated":
                low = self._truncated(levels)
            else:
                clean = self._finished() if image is None else self._given(image)
                low = {level: clean for level in levels}
            for level in levels:
                images = torch.cat(
                    [
                        self._upscale(batch, samples, level, mode == "truncated")
                        for batch, samples in zip(self._batches(), low[level], strict=True)
                    ]
                )
                points.append(SearchPoint(mode, level, float(metric(images))))
        return points

    def _batches(self) -> Iterator[range]:
        for start in range(0, self.count, self.batch_size):
            yield range(start, min(start + self.batch_size, self.count))

    def _classes(self, batch: range) -> list[int | str] | None:
        return None if self.class_labels is None else [self.class_labels[k] for k in batch]

    def _generators(self, batch: range, offset: int = 0) -> list[torch.Generator]:
        return [torch.Generator().manual_seed(self.seed + k + offset) for k in batch]

    def _before(self, batch: range, generator: list[torch.Generator], stop_stage: str) -> Tensor:
        """What a stage before the varied one finished, (b, 3, h, w) in [-1, 1]."""
        samples: Any = self.pipe(
            self._classes(batch),
            num_images_per_prompt=1 if self.class_labels is not None else len(batch),
            num_inference_steps=self.num_inference_steps,
            generator=generator,
            stop_stage=stop_stage,
            output_type="latent",
            return_dict=False,
        )[0]
        return samples.clamp(-1, 1)

    def _finished(self) -> list[Tensor]:
        """z_0 of each batch, drawn once."""
        if not self._clean:
            last = STAGES[STAGES.index(self.stage) - 1]
            self._clean = [self._before(batch, self._generators(batch), last) for batch in self._batches()]
        return self._clean

    def _given(self, image: Any) -> list[Tensor]:
        images = 2 * image_batch(image) - 1
        if len(images) != self.count:
            raise ValueError(f"`image` holds {len(images)} images for {self.count} to draw: pass one for each.")
        return [images[batch.start : batch.stop] for batch in self._batches()]

    def _truncated(self, levels: Sequence[float]) -> dict[float, list[Tensor]]:
        """z_s of each level and batch, from one pass."""
        name = STAGES[STAGES.index(self.stage) - 1]
        before = getattr(self.pipe, name)
        if not isinstance(before, CascadedStage):
            raise ValueError(f"{name} is a {type(before).__name__}, which runs to its end: use only 'non_truncated'.")
        found: dict[float, list[Tensor]] = {level: [] for level in levels}
        for batch in self._batches():
            generator = self._generators(batch)
            labels = None if before.num_classes is None else before.get_label_ids(self._classes(batch))
            if name == "base":
                samples, size, level = None, before.resolve_size(None, None), 0.0
            else:
                samples = self._before(batch, generator, STAGES[STAGES.index(name) - 1])
                size, level = before.upscaled_size(*samples.shape[2:]), before.resolve_noise_level(None)
            encode = self._encoder(before, samples, labels, level, False, generator, len(batch))
            stops = before.run(
                len(batch),
                size,
                encode,
                num_inference_steps=self._steps(name),
                generator=generator,
                stop_level=list(levels),
            )
            for level, sample in zip(levels, stops, strict=True):
                found[level].append(sample if level > 0 else sample.clamp(-1, 1))
        return found

    def _upscale(self, batch: range, samples: Tensor, level: float, is_noisy: bool) -> Tensor:
        """The images of a batch (b, 3, H, W) in [0, 1]."""
        stage, generator = getattr(self.pipe, self.stage), self._generators(batch, 2**31)
        labels = None if stage.num_classes is None else stage.get_label_ids(self._classes(batch))
        images = stage.run(
            len(batch),
            stage.upscaled_size(*samples.shape[2:]),
            self._encoder(stage, samples, labels, level, is_noisy and level > 0, generator, len(batch)),
            num_inference_steps=self._steps(self.stage),
            guidance_scale=self.guidance_scale,
            generator=generator,
        )
        return (images.float().cpu() / 2 + 0.5).clamp(0, 1)

    def _steps(self, name: str) -> int:
        if isinstance(self.num_inference_steps, (list, tuple)):
            return self.num_inference_steps[self.pipe.stage_names.index(name)]
        return self.num_inference_steps  # type: ignore[return-value]

    @staticmethod
    def _encoder(
        stage: Any,
        samples: Tensor | None,
        labels: list[int] | None,
        level: float,
        is_noisy: bool,
        generator: list[torch.Generator],
        count: int,
    ) -> Callable[[torch.device], Any]:
        if samples is None:
            return lambda device: stage.encode_labels(labels, device=device)
        return lambda device: stage.encode_low_res(
            samples, labels, level=level, is_noisy=is_noisy, generator=generator, device=device
        )


def load_cascade(folder: str, device: str | None = None) -> CascadedDiffusionPipeline:
    """A saved cascade, all stages in memory and without progress bars.

    Args:
        folder: Or its name on the Hub.
        device: By default a GPU where there is one.
    """
    pipe = CascadedDiffusionPipeline.from_pretrained(folder)
    for name in pipe.stage_names:
        getattr(pipe, name).set_progress_bar_config(disable=True)
    pipe.set_progress_bar_config(disable=True)
    return pipe.to(device or ("cuda" if torch.cuda.is_available() else "cpu"))


def draw_curve(points: Sequence[SearchPoint], path: Any, *, name: str) -> None:
    """The values over the levels as a PNG, a line for each form.

    Args:
        points: Of a search.
        path: Of the file.
        name: Of the measure, with the network that it is of.

    Raises:
        ImportError: Without matplotlib.
    """
    try:
        import matplotlib
    except ImportError as error:
        raise ImportError("A curve needs matplotlib: pip install '.[eval]' in a checkout.") from error
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(6, 4))
    for mode in dict.fromkeys(point.conditioning_mode for point in points):
        line = [(point.noise_level, point.value) for point in points if point.conditioning_mode == mode]
        axes.plot(*zip(*line, strict=True), marker="o", label=mode.replace("_", "-"))
    axes.set_xlabel("steps of noise s")
    axes.set_ylabel(name)
    axes.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


def check_stage(pipe: Any, stage: str) -> None:
    """The stage is one of the cascade's that enlarge images."""
    check_choice("stage", stage, [name for name in pipe.stage_names if name != "base"])


def usual_levels(stage: CascadedUpscalePipeline) -> list[float]:
    """Levels to begin a search with: clean, and four of its T steps of noise. The last ones leave nothing to see."""
    last = 1000 if stage.corrupter is None else stage.corrupter.num_levels
    return [0, *(last * percent // 100 + 1 for percent in (10, 25, 50, 75))]
