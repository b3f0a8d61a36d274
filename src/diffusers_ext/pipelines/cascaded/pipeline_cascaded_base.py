"""The first stage of a cascade, alone: images of a class, or of none, at a low resolution.

Ho et al., arXiv 2106.15282. Also for ADM's own networks (Dhariwal and Nichol, arXiv 2105.05233).
"""

from collections.abc import Mapping
from typing import Any

import torch
from diffusers.pipelines.pipeline_utils import ImagePipelineOutput
from torch import Tensor

from ...models.unet_cascaded import CascadedUNet
from ..callbacks import Callback
from ..checks import check_integer
from ..listed_options import read_option, record_option
from .stage import CascadedStage, Generators, StopLevel


class CascadedBasePipeline(CascadedStage):
    """Draws images at the resolution of the first stage.

    Example:

        pipe("red circle", num_images_per_prompt=4)

    Args:
        unet: Predicts the noise. It takes no low-resolution image.
        scheduler: Any scheduler of diffusers that denoises with betas. A `TruncatedConditioningScheduler` around one
            tells a `CascadedDiffusionPipeline` to stop this stage at the level of the next one.
        class_names: Names of the classes 0, 1, ... without the null class, so that classes may be asked for by name. A
            list, or a dict by number, which is how the config holds them.
        min_timestep: The network was trained at this timestep and above, so runs stop there: s of the paper.
        default_guidance_scale: Guidance scale when a call names none, in place of 1.
    """

    _card_tags = ("cascaded-diffusion",)
    _needs_condition = False  # a network without classes draws anything

    def __init__(
        self,
        unet: CascadedUNet,
        scheduler: Any,
        class_names: list[str] | dict[str, str] | None = None,
        min_timestep: int = 0,
        default_guidance_scale: int | float | None = None,
    ):
        super().__init__(unet, scheduler)
        check_integer("min_timestep", min_timestep, 0)
        self.register_to_config(
            class_names=record_option("class_names", class_names),
            min_timestep=min_timestep,
            default_guidance_scale=default_guidance_scale,
        )

    @classmethod
    def example_lines(cls, config: Mapping[str, Any], prompt: str | None = None) -> str:
        names = read_option(config.get("class_names"))
        return f"image = pipe({names[0]!r}).images[0]" if names else "image = pipe().images[0]"

    def check_components(self) -> None:
        super().check_components()
        if self.unet.config["low_res_channels"]:
            raise ValueError(
                "`unet` takes a low-resolution image (its `low_res_channels` is"
                f" {self.unet.config['low_res_channels']}): it belongs into a CascadedUpscalePipeline."
            )

    @torch.no_grad()
    def __call__(
        self,
        class_labels: int | str | list[int | str] | Tensor | None = None,
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int = 100,
        guidance_scale: float | None = None,
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
        """Draws images.

        Args:
            class_labels: One class or several, by number or, if the checkpoint has `class_names`, by name. None for a
                network without classes.
            height: Height of the image in pixels. The default is that of `latents`, else that of the network.
            width: Width of the image in pixels. The default is that of `latents`, else that of the network.
            num_inference_steps: Number of sampling steps, at least 1.
            guidance_scale: s in u + s * (c - u), finite and at least 0. 1 is the plain conditional prediction at half
                the cost, a larger scale follows the class more closely, and 0 ignores it. The default is the
                checkpoint's scale, else 1. A scale other than 1 needs a network that was also trained without class.
            eta: Noise of DDIM's steps in [0, 1]; 0 adds none. Schedulers without it ignore it.
            num_images_per_prompt: Number of images for each class, or of all images where there are no classes. The
                images of the first class come first.
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
            stop_level: Stops at this many steps of noise, s of the paper, in place of 0, the clean image: the result
                carries noise. With a list of levels `images` is a list with the result at each of them.

        Returns:
            `ImagePipelineOutput` with the `images`, or a tuple that holds them.

        Order of the draws of each generator: the initial noise, then those of `scheduler.step` in each step.
        """
        self.check_components()
        labels = self.get_label_ids(class_labels)
        check_integer("num_images_per_prompt", num_images_per_prompt, 1)
        samples = self.run(
            num_images_per_prompt * (1 if labels is None else len(labels)),
            self.resolve_size(height, width, latents),
            lambda device: self.encode_labels(labels, num_images_per_prompt, device=device),
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
