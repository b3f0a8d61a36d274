"""Perceptual distances; each names the network whose features it compares, and figures carry that name."""

import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

_VGG16 = ((64, 2), (128, 2), (256, 3), (512, 3), (512, 3))  # width and number of the convolutions before each pooling
_VGG_KEY = re.compile(r"(?:[a-z_.]+\.)?(\d+\.(?:weight|bias))")
_LPIPS_KEY = re.compile(r"(?:net\.slice(\d)\.(\d+)|lin(\d)\.model\.[01])\.(weight|bias)")


class LPIPSDistance(nn.Module):
    """LPIPS (arXiv 1801.03924) on VGG-16 features, with the weights of its authors' package.

    Features after the last ReLU before each pooling, of unit length over the channels; their squared differences,
    weighted by a learned 1x1 head and averaged over the picture; the sum of the five.

    The package brings the linear heads only; the VGG-16 weights are looked up in torchvision's cache and downloaded
    by it when they are missing. `from_state_dict` needs neither.

    Args:
        use_dropout: Dropout on the squared differences before the heads, as in the package's default; off here. It
            acts only while the module is in training mode: latent diffusion's autoencoders were trained so, unawares.
        pretrained_features: `False` builds the same network with random features, for tests.
    """

    def __init__(self, use_dropout: bool = False, pretrained_features: bool = True):
        super().__init__()
        try:
            import lpips
        except ImportError as error:
            raise ImportError("LPIPS needs the package lpips: pip install lpips (extra 'train').") from error
        try:
            weights = lpips.LPIPS(net="vgg", pnet_rand=not pretrained_features, verbose=False).state_dict()
        except OSError as error:
            raise OSError(
                "The VGG-16 weights of LPIPS are neither in torchvision's cache nor could they be downloaded. Put "
                "vgg16-397923af.pth into <TORCH_HOME>/hub/checkpoints, or choose another --perceptual_model: a folder "
                "with a CLIP image tower, or `none`."
            ) from error
        self._build("lpips-vgg16" if pretrained_features else "lpips-random-features", weights, use_dropout)

    @classmethod
    def from_state_dict(cls, state_dict: Mapping[str, Tensor], use_dropout: bool = False) -> "LPIPSDistance":
        """Builds the network from weights under the keys of the package or of taming-transformers; any widths.

        Raises:
            ValueError: keys are missing or unknown.
        """
        model = cls.__new__(cls)
        nn.Module.__init__(model)
        model._build("lpips", state_dict, use_dropout)
        return model

    def _build(self, name: str, state_dict: Mapping[str, Tensor], use_dropout: bool) -> None:
        self.name = name
        self.dropout = nn.Dropout(0.5 if use_dropout else 0.0)
        self.slices, self.heads = nn.ModuleList(), nn.ModuleList()
        self.mean: Tensor
        self.std: Tensor
        self.register_buffer("mean", torch.tensor([-0.030, -0.088, -0.188]).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor([0.458, 0.448, 0.450]).view(1, 3, 1, 1), persistent=False)
        renamed, unknown = {}, []
        for key, value in state_dict.items():
            if found := _LPIPS_KEY.fullmatch(key):
                level, index, head, kind = found.groups()
                renamed[f"heads.{head}.{kind}" if head else f"slices.{int(level) - 1}.{index}.{kind}"] = value
            elif not key.startswith(("scaling_layer.", "lins.")):  # constants, and the heads a second time
                unknown.append(key)
        index, channels = 0, 3
        for level, (width, count) in enumerate(_VGG16):  # torchvision's numbering of the layers
            layers = nn.Sequential()
            if level > 0:
                layers.add_module(str(index), nn.MaxPool2d(2))
                index += 1
            for _ in range(count):
                weight = renamed.get(f"slices.{level}.{index}.weight")
                width = width if weight is None else weight.shape[0]
                layers.add_module(str(index), nn.Conv2d(channels, width, 3, padding=1))
                layers.add_module(str(index + 1), nn.ReLU())
                index, channels = index + 2, width
            self.slices.append(layers)
            self.heads.append(nn.Conv2d(channels, 1, 1, bias=False))
        missing = sorted(self.state_dict().keys() - renamed.keys())
        unknown += sorted(renamed.keys() - self.state_dict().keys())
        if missing or unknown:
            raise ValueError(f"The weights are not those of LPIPS on VGG-16: missing {missing}, unknown {unknown}.")
        self.load_state_dict(renamed)
        self.requires_grad_(False).eval()

    def _features(self, image: Tensor) -> list[Tensor]:
        hidden, features = (image - self.mean) / self.std, []
        for layers in self.slices:
            hidden = layers(hidden)
            norm = hidden.square().sum(1, keepdim=True).sqrt()
            features.append(hidden / (norm + 1e-10))
        return features

    def forward(self, image: Tensor, target: Tensor) -> Tensor:
        """Distance of images (b, 3, h, w) in [-1, 1], one value a sample (b,)."""
        pairs = zip(self._features(image), self._features(target), self.heads, strict=True)
        levels = [head(self.dropout((a - b).square())).mean((1, 2, 3)) for a, b, head in pairs]
        return torch.stack(levels).sum(0)


class VGGDistance(nn.Module):
    """Mean squared difference of VGG-19 features before their ReLU, summed over levels.

    PITI's upsampler is trained with it. Its released code compares one level, the second convolution of the second
    block (PITI-Synthesis/PITI@d9f7481:pretrained_diffusion/vgg.py); its paper (arXiv 2205.12952, section 3.2) compares
    several, without saying which.

    Args:
        levels: torchvision's numbers of the convolutions: `RELEASED` or `MULTI_LEVEL`, or others.
        weights: file of a state dict under torchvision's keys. Unset, torchvision looks into its cache and downloads
            what is missing.

    Raises:
        OSError: if torchvision can neither find nor download the weights.
    """

    RELEASED = (7,)
    MULTI_LEVEL = (2, 7, 12, 21, 30)  # the second convolution of each block

    def __init__(self, levels: Sequence[int] = RELEASED, weights: str | Path | None = None):
        super().__init__()
        if weights is not None:
            state_dict = torch.load(weights, map_location="cpu", weights_only=True)
        else:
            from torchvision.models import VGG19_Weights

            try:
                state_dict = VGG19_Weights.IMAGENET1K_V1.get_state_dict(progress=False)
            except OSError as error:
                raise OSError(
                    "The VGG-19 weights are neither in torchvision's cache nor could they be downloaded. Put "
                    "vgg19-dcbb9e9d.pth into <TORCH_HOME>/hub/checkpoints, or pass the file itself."
                ) from error
        self._build("vgg19", state_dict, levels)

    @classmethod
    def from_state_dict(cls, state_dict: Mapping[str, Tensor], levels: Sequence[int] = RELEASED) -> "VGGDistance":
        """Builds the network from convolutions named `<number>.weight` and `<number>.bias` behind any prefix.

        Raises:
            ValueError: a convolution up to the last level is missing, or a level is none.
        """
        model = cls.__new__(cls)
        nn.Module.__init__(model)
        model._build("vgg", state_dict, levels)
        return model

    def _build(self, name: str, state_dict: Mapping[str, Tensor], levels: Sequence[int]) -> None:
        self.name, self.levels = name, tuple(levels)
        self.mean: Tensor
        self.std: Tensor
        self.register_buffer("mean", torch.tensor([0.485, 0.456, 0.406]).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor([0.229, 0.224, 0.225]).view(1, 3, 1, 1), persistent=False)
        weights = {
            match[1]: value for key, value in state_dict.items() if (match := _VGG_KEY.fullmatch(key)) is not None
        }
        self.layers = nn.Sequential()
        index, convolutions = 0, set[int]()
        for block, count in enumerate((2, 2, 4, 4, 4)):  # convolutions of each block, as torchvision numbers them
            if block > 0:
                self.layers.add_module(str(index), nn.MaxPool2d(2))
                index += 1
            for _ in range(count):
                convolutions.add(index)
                if index <= max(self.levels):
                    try:
                        weight, bias = weights[f"{index}.weight"], weights[f"{index}.bias"]
                    except KeyError as error:
                        raise ValueError(f"The weights are not those of VGG-19: {error} is missing.") from error
                    layer = nn.Conv2d(weight.shape[1], weight.shape[0], 3, padding=1)
                    layer.load_state_dict({"weight": weight, "bias": bias})
                    self.layers.add_module(str(index), layer)
                    self.layers.add_module(str(index + 1), nn.ReLU())
                index += 2
        if strangers := sorted(set(self.levels) - convolutions):
            raise ValueError(f"`levels` holds {strangers}, but VGG-19's convolutions are {sorted(convolutions)}.")
        self.requires_grad_(False).eval()

    def features(self, image: Tensor) -> list[Tensor]:
        """The features of images (b, 3, h, w) in [-1, 1], one (b, c, h', w') a level."""
        hidden, found = ((image + 1) / 2 - self.mean) / self.std, []
        for name, layer in self.layers.named_children():
            hidden = layer(hidden)
            if int(name) in self.levels:
                found.append(hidden)
            if int(name) == max(self.levels):
                break
        return found

    def forward(self, image: Tensor, target: Tensor) -> Tensor:
        """Distance of images (b, 3, h, w) in [-1, 1], one value a sample (b,)."""
        pairs = zip(self.features(image), self.features(target), strict=True)
        return torch.stack([(a - b).square().flatten(1).mean(1) for a, b in pairs]).sum(0)


class CLIPDistance(nn.Module):
    """Mean squared difference of unit-length patch features over all layers of a CLIP image tower.

    Args:
        folder: Holds a transformers CLIP model or its image tower with its image processor, or is the folder of a
            pipeline that has both; nothing is downloaded.
        option: The option that named the folder, for the message.
        load: `(class, folder) -> network`; `from_pretrained` of the class when unset.

    Raises:
        ValueError: there is no such folder.
    """

    def __init__(self, folder: str, option: str = "--perceptual_model", load: Callable[..., Any] | None = None):
        super().__init__()
        from transformers import CLIPImageProcessor, CLIPVisionModelWithProjection

        tower = processor_folder = Path(folder)
        if (tower / "model_index.json").is_file():
            tower, processor_folder = tower / "image_encoder", tower / "feature_extractor"
        for path in (tower / "config.json", processor_folder / "preprocessor_config.json"):
            if not path.is_file():
                raise ValueError(
                    f"{option}={folder!r} is not a folder with a CLIP model ({path} is missing); allowed are "
                    f"{'`none`, `lpips`, or ' if option == '--perceptual_model' else ''}such a folder, written by "
                    "training/train_clip.py for example."
                )
        self.name = f"clip-{Path(folder).name}"
        if load is None:
            self.network = CLIPVisionModelWithProjection.from_pretrained(tower)
        else:
            self.network = load(CLIPVisionModelWithProjection, tower)
        self.network.float()  # small checkpoints hold half precision, which autocast does not mix with its own
        processor = CLIPImageProcessor.from_pretrained(processor_folder)
        self.mean: Tensor
        self.std: Tensor
        self.register_buffer("mean", torch.tensor(processor.image_mean).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(processor.image_std).view(1, 3, 1, 1), persistent=False)
        self.requires_grad_(False).eval()

    def embed(self, image: Tensor) -> Tensor:
        """The tower's own vectors (b, d) of images (b, 3, h, w) in [-1, 1], not normalised."""
        return self.network(self._pixels(image)).image_embeds

    def _pixels(self, image: Tensor) -> Tensor:
        side = int(self.network.config.image_size)  # type: ignore[arg-type]  # transformers allows a pair; CLIP has none
        if image.shape[-2:] != (side, side):
            image = F.interpolate(image, (side, side), mode="bilinear", antialias=True)
        return ((image + 1) / 2 - self.mean) / self.std

    def _features(self, image: Tensor) -> list[Tensor]:
        states = self.network.vision_model(self._pixels(image), output_hidden_states=True).hidden_states
        return [F.normalize(state[:, 1:], dim=-1) for state in states]  # (b, patches, d), the class token left out

    def forward(self, image: Tensor, target: Tensor) -> Tensor:
        """Distance of images (b, 3, h, w) in [-1, 1], one value a sample (b,)."""
        pairs = zip(self._features(image), self._features(target), strict=True)
        return torch.stack([(a - b).square().sum(-1).mean(-1) for a, b in pairs]).mean(0)


def perceptual_distance(
    model: str | None, *, lpips_dropout: bool = False, load: Callable[..., Any] | None = None
) -> LPIPSDistance | CLIPDistance | None:
    """The distance that `--perceptual_model` asks for: `none`, `lpips`, or the folder of a CLIP model (see there)."""
    if model is None or model == "none":
        return None
    return LPIPSDistance(lpips_dropout) if model == "lpips" else CLIPDistance(model, load=load)
