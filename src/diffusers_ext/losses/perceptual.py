"""Perceptual distances; each names the network whose features it compares, and figures carry that name."""

from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class LPIPSDistance(nn.Module):
    """LPIPS (arXiv 1801.03924) on VGG-16 features, from the package of its authors.

    The package brings the linear heads only; the VGG-16 weights are looked up in torchvision's cache and downloaded
    by it when they are missing.

    Args:
        use_dropout: Dropout on the features before the heads, as in the package's default; off here.
        pretrained_features: `False` builds the same network with random features, for tests.
    """

    def __init__(self, use_dropout: bool = False, pretrained_features: bool = True):
        super().__init__()
        try:
            import lpips
        except ImportError as error:
            raise ImportError("LPIPS needs the package lpips: pip install 'diffusers_ext[train]'.") from error
        self.name = "lpips-vgg16" if pretrained_features else "lpips-random-features"
        try:
            self.network = lpips.LPIPS(
                net="vgg", use_dropout=use_dropout, pnet_rand=not pretrained_features, verbose=False
            )
        except OSError as error:
            raise OSError(
                "The VGG-16 weights of LPIPS are neither in torchvision's cache nor could they be downloaded. Put "
                "vgg16-397923af.pth into <TORCH_HOME>/hub/checkpoints, or choose another --perceptual_model: a folder "
                "with a CLIP image tower, or `none`."
            ) from error
        self.requires_grad_(False).eval()

    def forward(self, image: Tensor, target: Tensor) -> Tensor:
        """Distance of images (b, 3, h, w) in [-1, 1], one value a sample (b,)."""
        return self.network(image, target).flatten()


class CLIPDistance(nn.Module):
    """Mean squared difference of unit-length patch features over all layers of a CLIP image tower.

    Args:
        folder: Holds a transformers CLIP model or its image tower with its image processor, or is the folder of a
            pipeline that has both; nothing is downloaded.

    Raises:
        ValueError: there is no such folder.
    """

    def __init__(self, folder: str):
        super().__init__()
        from transformers import CLIPImageProcessor, CLIPVisionModelWithProjection

        tower = processor_folder = Path(folder)
        if (tower / "model_index.json").is_file():
            tower, processor_folder = tower / "image_encoder", tower / "feature_extractor"
        for path in (tower / "config.json", processor_folder / "preprocessor_config.json"):
            if not path.is_file():
                raise ValueError(
                    f"--perceptual_model={folder!r} is not a folder with a CLIP model ({path} is missing); allowed "
                    "are `none`, `lpips`, or such a folder, written by training/train_clip.py for example."
                )
        self.name = f"clip-{Path(folder).name}"
        self.network = CLIPVisionModelWithProjection.from_pretrained(tower)
        processor = CLIPImageProcessor.from_pretrained(processor_folder)
        self.mean: Tensor
        self.std: Tensor
        self.register_buffer("mean", torch.tensor(processor.image_mean).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(processor.image_std).view(1, 3, 1, 1), persistent=False)
        self.requires_grad_(False).eval()

    def _features(self, image: Tensor) -> list[Tensor]:
        side = int(self.network.config.image_size)  # type: ignore[arg-type]  # transformers allows a pair; CLIP has none
        if image.shape[-2:] != (side, side):
            image = F.interpolate(image, (side, side), mode="bilinear", antialias=True)
        pixels = ((image + 1) / 2 - self.mean) / self.std
        states = self.network.vision_model(pixels, output_hidden_states=True).hidden_states
        return [F.normalize(state[:, 1:], dim=-1) for state in states]  # (b, patches, d), the class token left out

    def forward(self, image: Tensor, target: Tensor) -> Tensor:
        """Distance of images (b, 3, h, w) in [-1, 1], one value a sample (b,)."""
        pairs = zip(self._features(image), self._features(target), strict=True)
        return torch.stack([(a - b).square().sum(-1).mean(-1) for a, b in pairs]).mean(0)


def perceptual_distance(model: str | None) -> LPIPSDistance | CLIPDistance | None:
    """The distance that `--perceptual_model` asks for: `none`, `lpips`, or the folder of a CLIP model."""
    if model is None or model == "none":
        return None
    return LPIPSDistance() if model == "lpips" else CLIPDistance(model)
