"""What train_piti.py learns: the noise in a stage's images, given what the stage is told of them.

Nichol et al., arXiv 2112.10741; Wang et al., arXiv 2205.12952, section 3; the hybrid loss is that of Nichol and
Dhariwal, arXiv 2102.09672.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator
from diffusers.models.modeling_utils import ModelMixin
from diffusers.utils.torch_utils import randn_tensor
from torch import Generator, Tensor

from diffusers_ext.pipelines.glide.base import call_unet
from diffusers_ext.pipelines.glide.pipeline_glide import GlidePipeline
from diffusers_ext.pipelines.piti.pipeline_piti import PITIPipeline
from diffusers_ext.training.piti.args import PITIArgs
from diffusers_ext.training_utils.noise_prediction import NoiseLoss
from diffusers_ext.training_utils.objective import Objective, check_predicts_noise, keep_condition
from diffusers_ext.training_utils.timesteps import TIMESTEP_SAMPLERS


@dataclass(frozen=True)
class Prediction:
    """A micro-batch, noised, and what the network makes of it.

    Args:
        images, noise, noisy: (b, 3, h, w).
        timesteps: (b,).
        weights: Of the samples (b,).
        output: Of the network, (b, 3 or 6, h, w).
    """

    images: Tensor
    noise: Tensor
    noisy: Tensor
    timesteps: Tensor
    weights: Tensor
    output: Tensor


class DiffusionObjective(Objective):
    """The loss of a stage; a subclass knows what the stage is told.

    Args:
        pipe: The pipeline of the stage.
        args: The options.
        scheduler: The noise levels of the stage; those of the pipeline's first stage when unset.
    """

    def __init__(self, pipe: Any, args: PITIArgs, scheduler: Any = None):
        super().__init__()
        self.pipe, self.args = pipe, args
        self.scheduler = pipe.scheduler if scheduler is None else scheduler
        check_predicts_noise(self.scheduler)
        self.dropout_prob = args.dropout_of_condition
        levels = int(self.scheduler.config["num_train_timesteps"])
        self.timesteps = TIMESTEP_SAMPLERS[args.timestep_sampler](levels)
        self.noise_loss = NoiseLoss(self.scheduler, args)

    def embeds(self, batch: dict[str, Any], keep: Tensor | None) -> Tensor:
        """Tokens of the conditions and the vector behind them, (b, l + 1, d).

        Args:
            keep: Which samples (b,) keep their condition; all when None.
        """
        raise NotImplementedError

    @property
    def denoiser(self) -> Any:
        """The U-Net of the stage, whether it is trained or not."""
        return self.pipe.unet

    def maps(self, batch: dict[str, Any]) -> Tensor | None:
        """Images (b, c, h, w) that the network sees behind the noisy ones, if any."""
        return None

    def losses(self, batch: dict[str, Any], generators: list[Generator], step: int) -> dict[str, Tensor]:
        """Draws per sample, in this order: dropping (where conditions are dropped), timestep, noise."""
        found = self.predict(batch, generators)
        return self.mean(found, self.terms(found))

    def predict(self, batch: dict[str, Any], generators: list[Generator]) -> Prediction:
        """Noises the images and asks the network; the draws are those of `losses`."""
        images = batch["image"]
        device = images.device
        keep = keep_condition(generators, self.dropout_prob).to(device) if self.dropout_prob else None
        timesteps, weights = self.timesteps.draw(generators, device)
        noise = randn_tensor(images.shape, generator=generators, device=device)
        noisy = self.scheduler.add_noise(images, noise, timesteps)
        output = call_unet(self.denoiser, timesteps, noisy, self.maps(batch), self.embeds(batch, keep))
        return Prediction(images, noise, noisy, timesteps, weights, output)

    def terms(self, found: Prediction) -> dict[str, Tensor]:
        """The loss and what it is the sum of, one value a sample (b,)."""
        return self.noise_loss(found.output, found.noise, found.images, found.noisy, found.timesteps)

    def mean(self, found: Prediction, terms: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The weighted means of the terms, and what `observe` wants to see."""
        observed = {"timesteps": found.timesteps, "sample_losses": terms["loss"].detach()}
        return {name: (found.weights * value).mean() for name, value in terms.items()} | observed

    def checkpoint_gradients(self) -> None:
        """Trades compute for memory, in every network that is trained."""
        for network in self.children():
            if isinstance(network, ModelMixin):
                network.enable_gradient_checkpointing()

    def before_step(self, batch: Any, own: int, step: int, accelerator: Accelerator) -> None:
        self.timesteps.refresh()

    def observe(self, found: Mapping[str, Tensor], weight: float, accelerator: Accelerator) -> None:
        self.timesteps.observe(found["timesteps"], found["sample_losses"], weight, accelerator)


class PriorObjective(DiffusionObjective):
    """Base U-Net and text encoder of GLIDE. A dropped caption becomes the empty text.

    Args:
        null_tokens: Those of the empty text, (l,).
    """

    null_tokens: Tensor

    def __init__(self, pipe: GlidePipeline, args: PITIArgs, null_tokens: Tensor):
        super().__init__(pipe, args)
        self.unet, self.text_encoder = pipe.unet, pipe.text_encoder
        self.pad_token_id = pipe.tokenizer.pad_token_id
        self.register_buffer("null_tokens", null_tokens, persistent=False)

    def embeds(self, batch: dict[str, Any], keep: Tensor | None) -> Tensor:
        tokens = batch["tokens"]
        if keep is not None:
            tokens = torch.where(keep[:, None], tokens, self.null_tokens)
        states, vector = self.text_encoder(tokens, tokens != self.pad_token_id, return_dict=False)
        return torch.cat([states, vector[:, None]], dim=1)


class PITIObjective(DiffusionObjective):
    """PITI's encoder, and with `--stage joint` the U-Net behind it. A dropped condition becomes an image of ones.

    An encoder alone learns through a U-Net that is not registered: no checkpoint holds it, no weight of it gets a
    gradient, and its dropout is off (the authors leave it on).
    """

    def __init__(self, pipe: PITIPipeline, args: PITIArgs, device: torch.device):
        super().__init__(pipe, args)
        self.encoder = pipe.encoder
        if args.stage == "encoder":
            pipe.unet.requires_grad_(False).eval().to(device)
        else:
            self.unet = pipe.unet

    def embeds(self, batch: dict[str, Any], keep: Tensor | None) -> Tensor:
        conditions = batch["condition"]
        if keep is not None:
            conditions = torch.where(keep.view(-1, 1, 1, 1), conditions, torch.ones_like(conditions))
        tokens, vector = self.encoder(conditions, return_dict=False)
        return torch.cat([tokens, vector[:, None]], dim=1)
