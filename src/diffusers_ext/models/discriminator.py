"""The patch discriminator that image autoencoders are trained against.

Isola, Zhu, Zhou, Efros, "Image-to-Image Translation with Conditional Adversarial Networks" (pix2pix), arXiv
1611.07004, in the form of taming-transformers (arXiv 2012.09841, MIT) and latent diffusion (arXiv 2112.10752):
unconditional, batch normalisation, logits without a sigmoid. The module names are theirs, so that their weights load
as they are. Difference: the option of activation normalisation is left out. With `norm_type="instance"` it is the
discriminator of PITI's upsampler (arXiv 2205.12952; PITI-Synthesis/PITI@d9f7481:pretrained_diffusion/adv.py, MIT).
"""

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor, nn

from .blocks.outputs import SampleOutput, as_output


class PatchDiscriminator(ModelMixin, ConfigMixin):
    """Judges overlapping patches of a picture: large logits for real ones.

    A strided 4x4 convolution, `num_layers - 1` strided ones with batch normalisation, one more with stride 1, and a
    last one to a single channel; widths double up to eight times the first. Three layers see 70x70 pixels a patch.

    In training mode the statistics are those of the batch at hand, so real and reconstructed pictures go through
    separate passes. Under DDP convert it with `torch.nn.SyncBatchNorm.convert_sync_batchnorm` if batches are small.

    Args:
        in_channels: channels of the picture.
        base_channels: width of the first layer.
        num_layers: number of strided layers, at least 1.
        norm_type: "batch", or "instance": statistics of each image, without learned scales, and biases in all
            convolutions.

    Raises:
        ValueError: for fewer than one layer, or an unknown normalisation.
    """

    @register_to_config
    def __init__(self, in_channels: int = 3, base_channels: int = 64, num_layers: int = 3, norm_type: str = "batch"):
        super().__init__()
        if norm_type not in ("batch", "instance"):
            raise ValueError(f"`norm_type` is {norm_type!r}: it must be 'batch' or 'instance'.")
        if num_layers < 1:
            raise ValueError(f"`num_layers` is {num_layers}: the discriminator needs at least one strided layer.")
        self.in_channels = in_channels
        self.min_size = 3 * 2**num_layers  # the two last convolutions take one position each, one remains
        layers: list[nn.Module] = [nn.Conv2d(in_channels, base_channels, 4, stride=2, padding=1), nn.LeakyReLU(0.2)]
        channels = base_channels
        for index in range(1, num_layers + 1):
            out_channels = base_channels * min(2**index, 8)
            stride = 2 if index < num_layers else 1
            shifts = norm_type == "batch"  # batch normalisation shifts anyway: no bias
            layers.append(nn.Conv2d(channels, out_channels, 4, stride=stride, padding=1, bias=not shifts))
            layers.append(nn.BatchNorm2d(out_channels) if shifts else nn.InstanceNorm2d(out_channels))
            layers.append(nn.LeakyReLU(0.2))
            channels = out_channels
        layers.append(nn.Conv2d(channels, 1, 4, stride=1, padding=1))
        self.main = nn.Sequential(*layers)
        if norm_type == "batch":  # PITI leaves PyTorch's own
            self.main.apply(_init_weights)

    def forward(self, sample: Tensor, return_dict: bool | None = None) -> Tensor | SampleOutput | tuple[Tensor]:
        """Pictures (batch, in_channels, height, width) in [-1, 1] to patch logits (batch, 1, h, w).

        Args:
            return_dict: None for the tensor, True for a `SampleOutput`, False for a tuple.

        Raises:
            ValueError: for another number of channels or a picture too small for the layers.
        """
        if sample.ndim != 4 or sample.shape[1] != self.in_channels:
            raise ValueError(
                f"`sample` has shape {tuple(sample.shape)}, the discriminator takes (batch, {self.in_channels}, "
                "height, width)."
            )
        if min(sample.shape[2:]) < self.min_size:
            raise ValueError(
                f"`sample` is {sample.shape[2]}x{sample.shape[3]} pixels, this discriminator needs at least "
                f"{self.min_size} a side: use larger pictures or fewer `num_layers`."
            )
        return as_output(self.main(sample), return_dict)


@torch.no_grad()
def _init_weights(module: nn.Module) -> None:
    """Weights ~ N(0, 0.02), normalisation scales ~ N(1, 0.02): pix2pix, section 6.2."""
    if isinstance(module, nn.Conv2d):
        nn.init.normal_(module.weight, 0.0, 0.02)
    elif isinstance(module, nn.BatchNorm2d):
        nn.init.normal_(module.weight, 1.0, 0.02)
        nn.init.zeros_(module.bias)
