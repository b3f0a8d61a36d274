"""A super-resolution stage of a cascade, alone: images at a higher resolution, of given ones and their class.

Ho et al., arXiv 2106.15282, section 3. Also for ADM's upsamplers (Dhariwal and Nichol, arXiv 2105.05233).
"""

from collections.abc import Mapping
from dataclasses import replace
from math import inf
from typing import Any

import torch
from diffusers.pipelines.pipeline_utils import ImagePipelineOutput
from torch import Tensor

from ...conditions.images import image_batch
from ...models.blocks.wrappers import unwrap
from ...models.unet_cascaded import CascadedUNet
from ...schedulers.gaussian import scheduler_attribute
from ...schedulers.scheduling_truncated_conditioning import TruncatedConditioningScheduler, check_level
from ..callbacks import Callback
from ..checks import check_choice, check_integer, check_one_or_each, check_parts
from ..listed_options import read_option, record_option
from .denoising import StageCondition
from .stage import CascadedStage, Generators, StopLevel

AUGMENTATIONS = ("none", "blur", "truncated")


class CascadedUpscalePipeline(CascadedStage):
    """Draws images that are larger than the given ones.

    Example:

        pipe(Image.open("small.png"), "red circle")
        pipe(Image.open("small.png"), "red circle", noise_level=251)   # takes less from the small image, adds more

    Args:
        unet: Predicts the noise from the noisy image and the small one.
        scheduler: Any scheduler of diffusers that denoises with betas.
        conditioning_scheduler: The noise that the small image was trained with: the schedule of the stage before. A
            `TruncatedConditioningScheduler`, or any scheduler of that schedule. None if there was no such noise.
        class_names: Names of the classes 0, 1, ... without the null class. A list, or a dict by number.
        low_res_size: Side of the small images in pixels, those of the stage before. None: any.
        augmentation: What was done to the small images in training: "none", "blur" or "truncated" (noise).
        truncation_level: The one level of noise s that the network was trained at, if it is not told the level.
        default_noise_level: Level of noise when a call names none.
        default_guidance_scale: Guidance scale when a call names none, in place of 1.
    """

    _pipeline_tag = "image-to-image"
    _card_tags = ("cascaded-diffusion", "super-resolution")
    _optional_components = ["conditioning_scheduler"]

    conditioning_scheduler: Any

    def __init__(
        self,
        unet: CascadedUNet,
        scheduler: Any,
        conditioning_scheduler: Any = None,
        class_names: list[str] | dict[str, str] | None = None,
        low_res_size: int | None = None,
        augmentation: str = "none",
        truncation_level: int | float | None = None,
        default_noise_level: int | float | None = None,
        default_guidance_scale: int | float | None = None,
    ):
        super().__init__(unet, scheduler)
        self.register_modules(conditioning_scheduler=conditioning_scheduler)
        check_choice("augmentation", augmentation, AUGMENTATIONS)
        if low_res_size is not None:
            check_integer("low_res_size", low_res_size, 1)
        self.register_to_config(
            class_names=record_option("class_names", class_names),
            low_res_size=low_res_size,
            augmentation=augmentation,
            truncation_level=truncation_level,
            default_noise_level=default_noise_level,
            default_guidance_scale=default_guidance_scale,
        )

    @classmethod
    def example_lines(cls, config: Mapping[str, Any], prompt: str | None = None) -> str:
        names = read_option(config.get("class_names"))
        label = f", {names[0]!r}" if names else ""
        lines = "from diffusers.utils import load_image\n\n"
        return f'{lines}larger = pipe(load_image("small.png"){label}).images[0]'

    def check_components(self) -> None:
        super().check_components()
        if not self.unet.config["low_res_channels"]:
            raise ValueError(
                "`unet` takes no low-resolution image (its `low_res_channels` is 0): it belongs into a"
                " CascadedBasePipeline."
            )
        scheduler = self.conditioning_scheduler
        if scheduler is not None and scheduler_attribute(scheduler, "alphas_cumprod") is None:
            raise ValueError(
                f"`conditioning_scheduler` is a {type(scheduler).__name__}, which has no `alphas_cumprod`: it must be"
                " one with the betas of the stage before, such as a DDPMScheduler."
            )

    @property
    def corrupter(self) -> TruncatedConditioningScheduler | None:
        """What noises the small image; None where no noise was trained."""
        scheduler = self.conditioning_scheduler
        if scheduler is None or scheduler_attribute(scheduler, "corrupt") is not None:
            return scheduler
        return TruncatedConditioningScheduler(scheduler)

    @property
    def tells_level(self) -> bool:
        """Whether the network is told how much noise the small image carries."""
        check_parts(self, "a level of noise", "unet")
        return self.unet.config["aug_cond_type"] is not None

    def resolve_noise_level(self, noise_level: float | None) -> float:
        """The level of noise of a call, else the checkpoint's, else the one that was trained, else 0.

        Raises:
            TypeError, ValueError: For a level that the network was not trained with, or that the schedule lacks.
        """
        fixed = self.config["truncation_level"]
        if noise_level is None:
            choices = (self.config["default_noise_level"], fixed, 0)
            noise_level = next(level for level in choices if level is not None)
        assert noise_level is not None
        corrupter = self.corrupter
        check_level("noise_level", noise_level, inf if corrupter is None else corrupter.num_levels)
        if fixed is not None and noise_level != fixed:
            raise ValueError(
                f"`noise_level` is {noise_level}, but this stage was trained at level {fixed} alone"
                f" (`truncation_level`) and is not told another: leave it out, or pass {fixed}."
            )
        if noise_level > 0 and fixed is None and not self.tells_level:
            raise ValueError(
                f"`noise_level` is {noise_level}, but this stage was not trained with noise (unet.config.aug_cond_type"
                f" and `truncation_level` are None; its augmentation is {self.config['augmentation']!r}): leave it at"
                " 0, or train it with `--augmentation truncated`."
            )
        if noise_level > 0:
            check_parts(self, f"`noise_level`={noise_level}", "conditioning_scheduler")
        return noise_level

    def upscaled_size(self, height: int, width: int) -> tuple[int, int]:
        """Height and width of the result for a small image of this size, in pixels.

        Raises:
            ValueError: If nothing says how much larger it is, or the small image is not smaller.
        """
        side, small = self.unet.config["sample_size"], self.config["low_res_size"]
        if side is None:
            raise ValueError("unet.config.sample_size is None: register the side of the images of its training.")
        if isinstance(side, (list, tuple)):
            return tuple(side)
        if small is not None and side % small == 0:
            return height * (side // small), width * (side // small)
        if max(height, width) >= side:
            raise ValueError(f"`image` is {width}x{height} pixels: this stage makes images of {side}x{side} of it.")
        return side, side

    @torch.no_grad()
    def __call__(
        self,
        image: Any,
        class_labels: int | str | list[int | str] | Tensor | None = None,
        num_inference_steps: int = 100,
        guidance_scale: float | None = None,
        noise_level: float | None = None,
        eta: float = 0.0,
        num_images_per_prompt: int = 1,
        generator: Generators = None,
        latents: Tensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: Callback | None = None,
        callback_on_step_end_tensor_inputs: list[str] | None = None,
        stop_level: StopLevel = None,
    ) -> ImagePipelineOutput | tuple:
        """Draws images that are larger than the given ones.

        Args:
            image: The small image, or several of one size (see `conditions.images.image_batch`).
            class_labels: The class of all images, or one for each, by number or by name. None for a network without
                classes.
            num_inference_steps: Number of sampling steps, at least 1.
            guidance_scale: s in u + s * (c - u), finite and at least 0. 1 is the plain conditional prediction at half
                the cost, a larger scale follows the class more closely, and 0 ignores it. The default is the
                checkpoint's scale, else 1. A scale other than 1 needs a network that was also trained without class.
            noise_level: How many steps of noise the small image is given, whole or not: s of the paper, the
                non-truncated form. 0 leaves it clean; the more there is, the less the result follows it, and the fewer
                of its faults it keeps. The default is the checkpoint's. A level above 0 needs a network that was
                trained with noise.
            eta: Noise of DDIM's steps in [0, 1]; 0 adds none. Schedulers without it ignore it.
            num_images_per_prompt: Number of images for each small image. The images of the first one come first.
            generator: One generator for the batch, or a list with one for each image. With a list, image k depends on
                generator k alone.
            latents: Standard normal noise (b, c, h, w) in place of a draw. The scheduler scales it.
            output_type: "pil"; "np" (b, H, W, 3) or "pt" (b, 3, H, W), both in [0, 1]; or "latent" for the samples
                (b, 3, H, W) as the next stage takes them, nominally in [-1, 1], neither clamped nor rounded.
            return_dict: Whether to return an `ImagePipelineOutput` instead of a tuple.
            callback_on_step_end: `callback(pipe, step, timestep, tensors) -> dict`, called after each step. Tensors
                that it returns replace those of the loop. `pipe._interrupt = True` skips the remaining steps.
                `pipe._guidance_scale` may be set; 1 turns guidance off, and so does 0, which diffusers' callbacks set.
            callback_on_step_end_tensor_inputs: Names of the tensors that the callback gets, by default `["latents"]`.
                `prompt_embeds` and `negative_prompt_embeds` are the numbers of the classes and of the null class.
                `pred_original_sample` holds the clean image that the step's prediction amounts to, for reading only.
            stop_level: Stops at this many steps of noise, s of the next stage, in place of 0, the clean image. With a
                list of levels `images` is a list with the result at each of them.

        Returns:
            `ImagePipelineOutput` with the `images`, or a tuple that holds them.

        Order of the draws of each generator: the initial noise, that of the small image if there is any, then those of
        `scheduler.step` in each step.
        """
        self.check_components()
        images = image_batch(image)
        check_integer("num_images_per_prompt", num_images_per_prompt, 1)
        labels = self.get_label_ids(class_labels)
        if labels is not None:
            check_one_or_each("class_labels", len(labels), len(images), "images")
            labels = labels * len(images) if len(labels) == 1 else labels
        level = self.resolve_noise_level(noise_level)
        low_res = (2 * images - 1).repeat_interleave(num_images_per_prompt, dim=0)
        samples = self.run(
            len(low_res),
            self.upscaled_size(*images.shape[2:]),
            lambda device: self.encode_low_res(
                low_res, labels, num_images_per_prompt, level=level, generator=generator, device=device
            ),
            num_inference_steps=num_inference_steps,
            guidance_scale=guidance_scale,
            eta=eta,
            generator=generator,
            latents=latents,
            stop_level=stop_level,
            output_type=output_type,
            callback_on_step_end=callback_on_step_end,
            callback_on_step_end_tensor_inputs=callback_on_step_end_tensor_inputs,
        )
        return self.finish_levels(samples, output_type, return_dict)

    def encode_low_res(
        self,
        low_res: Tensor,
        labels: list[int] | None = None,
        num_images_per_prompt: int = 1,
        *,
        level: float = 0,
        is_noisy: bool = False,
        generator: Generators = None,
        device: torch.device | str | None = None,
    ) -> StageCondition:
        """Small images and classes as the network takes them.

        Args:
            low_res: Images (b, 3, h, w) in [-1, 1].
            labels: Class numbers of b / `num_images_per_prompt` images.
            level: Steps of noise that they get, or have got.
            is_noisy: Whether they carry that noise already: the result of a truncated stage.
            generator: Of the noise.
        """
        device = torch.device(device if device is not None else self._execution_device)
        condition = self.encode_labels(labels, num_images_per_prompt, device=device)
        low_res = low_res.to(device=device, dtype=self.unet.dtype)
        corrupter = self.corrupter
        if not is_noisy and level > 0 and corrupter is not None:
            low_res = corrupter.corrupt(low_res, level, generator=generator)
        told = None
        if self.tells_level and corrupter is not None:
            abar = scheduler_attribute(corrupter, "alphas_cumprod")
            told = unwrap(self.unet).level_of_steps(float(level), abar).expand(len(low_res)).to(device)
        return replace(condition, low_res=low_res, level=told)
