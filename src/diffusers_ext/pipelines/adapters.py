"""LoRA matrices in a pipeline (arXiv 2106.09685), under the names that diffusers' pipelines have for them.

They change one network, `unet`, which pipelines made by `from_pipe` share. A stock `UNet2DModel`, to which diffusers
gives no adapters, is an `LDMUNet` while it has some: the same network with the same weights and the methods for them.
"""

import re
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers.loaders.lora_base import LORA_WEIGHT_NAME_SAFE, LoraBaseMixin, _fetch_state_dict
from diffusers.models.unets.unet_2d import UNet2DModel
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from torch.nn import functional as F

from ..models.blocks.wrappers import unwrap
from ..models.unet_ldm import LDMUNet

NETWORK = "unet"
_PREFIXES = (f"{NETWORK}.", "base_model.model.")  # of diffusers' pipelines; of peft's own files
_MATRIX = re.compile(r"(.+)\.lora_(?:(?:embedding_)?([AB])|magnitude_vector)(?:\.weight|\.bias)?")
_LISTED = 5  # layers that a message names
# Options of `load_lora_weights` that say where a file is; all others are those of the network's `load_lora_adapter`.
_PLACE = (
    "cache_dir", "force_download", "proxies", "local_files_only", "token", "revision", "subfolder", "weight_name",
)  # fmt: skip


class AdapterMixin(LoraBaseMixin):
    """A pipeline whose network takes LoRA matrices: loads, mixes, fuses, saves and unloads them."""

    _lora_loadable_modules = [NETWORK]
    unet_name = NETWORK

    @property
    def _network(self) -> Any:
        return unwrap(getattr(self, NETWORK))

    @property
    def fused_loras(self) -> set[str]:
        """Names of the adapters that are added to the weights."""
        return {name for layer in adapted_layers(self._network) for name in layer.merged_adapters}

    @property
    def num_fused_loras(self) -> int:
        return len(self.fused_loras)

    def load_lora_weights(
        self,
        pretrained_model_name_or_path_or_dict: str | Path | Mapping[str, Tensor],
        adapter_name: str | None = None,
        hotswap: bool = False,
        **kwargs: Any,
    ) -> None:
        """Puts the matrices of a file beside the layers of the network, which computes them along from then on.

        Args:
            pretrained_model_name_or_path_or_dict: A folder or a name on the Hub (then `subfolder`, `weight_name`,
                `revision`, `token` ... say where in it), a file, or the matrices by name. Names may begin with
                `unet.`.
            adapter_name: Name for `set_adapters` and the like; `default_0`, `default_1`, ... if unset.
            hotswap: Replace the matrices of the adapter of that name in place.

        Raises:
            ValueError: For files that hold no LoRA matrices, or those of another network, listing the layers.
        """
        network = self._network
        if network is None:
            raise ValueError(f"The pipeline was built without {NETWORK}, which LoRA matrices change.")
        place = {name: kwargs.pop(name) for name in _PLACE if name in kwargs}
        matrices, metadata = _read_matrices(pretrained_model_name_or_path_or_dict, **place)
        pipe: Any = self
        _check_part(pipe.components, matrices, pretrained_model_name_or_path_or_dict)
        _check_matrices(network, matrices, pretrained_model_name_or_path_or_dict)
        if type(network) is UNet2DModel:
            network.__class__ = LDMUNet
        network.load_lora_adapter(
            matrices,
            prefix=None,
            adapter_name=adapter_name,
            hotswap=hotswap,
            **{"metadata": metadata, "_pipeline": pipe} | kwargs,
        )

    @classmethod
    def lora_state_dict(
        cls, pretrained_model_name_or_path_or_dict: str | Path | Mapping[str, Tensor], **kwargs: Any
    ) -> dict[str, Tensor]:
        """The matrices that `load_lora_weights` would read, named by the network's layers."""
        return _read_matrices(pretrained_model_name_or_path_or_dict, **kwargs)[0]

    @classmethod
    def save_lora_weights(
        cls,
        save_directory: str | Path,
        unet_lora_layers: Mapping[str, Tensor] | nn.Module | None = None,
        is_main_process: bool = True,
        weight_name: str | None = None,
        save_function: Any = None,
        safe_serialization: bool = True,
        unet_lora_adapter_metadata: dict | None = None,
    ) -> None:
        """Writes matrices to `save_directory/pytorch_lora_weights.safetensors`, for `load_lora_weights`.

        Args:
            save_directory: Folder, made if missing.
            unet_lora_layers: `peft.get_peft_model_state_dict(pipe.unet, adapter_name=...)`.

        The other arguments are those of diffusers' methods of this name.

        Raises:
            ValueError: There are no matrices, or one of them is not finite.
        """
        if not unet_lora_layers:
            raise ValueError(
                "`unet_lora_layers` is missing: pass `peft.get_peft_model_state_dict(pipe.unet, adapter_name=...)`, "
                "or call `pipe.unet.save_lora_adapter(folder, adapter_name=...)`."
            )
        named = unet_lora_layers.state_dict() if isinstance(unet_lora_layers, nn.Module) else unet_lora_layers
        if broken := [name for name, value in named.items() if not bool(value.isfinite().all())]:
            raise ValueError(
                f"`unet_lora_layers` holds matrices that are not finite ({', '.join(broken[:3])}): nobody could use"
                " them, so nothing is saved."
            )
        cls._save_lora_weights(
            save_directory=str(save_directory),
            lora_layers={NETWORK: unet_lora_layers},  # type: ignore[dict-item]
            lora_metadata={NETWORK: unet_lora_adapter_metadata},
            is_main_process=is_main_process,
            weight_name=weight_name,  # type: ignore[arg-type]
            save_function=save_function,
            safe_serialization=safe_serialization,
        )

    def unload_lora_weights(self) -> None:
        """Takes all matrices out again. What `fuse_lora` added to the weights stays there."""
        network = self._network
        if adapted_layers(network):
            network.unload_lora()
            if type(network) is LDMUNet and "num_attention_heads" not in network.config:
                network.__class__ = UNet2DModel  # pyright: ignore[reportAttributeAccessIssue]  # what it was before `load_lora_weights`

    def fuse_lora(
        self,
        components: Sequence[str] = (NETWORK,),
        lora_scale: float = 1.0,
        safe_fusing: bool = False,
        adapter_names: list[str] | None = None,
    ) -> None:
        """Adds the matrices to the weights, so that they cost no time; `unfuse_lora` takes them off again.

        Args:
            components: `["unet"]`.
            lora_scale: Factor of the matrices.
            safe_fusing: Whether to refuse weights that would not be finite.
            adapter_names: Which adapters; the active ones if unset.
        """
        _check_components(components)
        self._adapted().fuse_lora(lora_scale, safe_fusing=safe_fusing, adapter_names=adapter_names)

    def unfuse_lora(self, components: Sequence[str] = (NETWORK,)) -> None:
        """Takes off the weights what `fuse_lora` added."""
        _check_components(components)
        self._adapted().unfuse_lora()

    def set_adapters(self, adapter_names: str | list[str], adapter_weights: Any = None) -> None:
        """Chooses the adapters that count, and how much.

        Args:
            adapter_names: One or several; all others are left out.
            adapter_weights: Factors, one or one an adapter; 1 if unset.
        """
        network, names = self._adapted(), [adapter_names] if isinstance(adapter_names, str) else list(adapter_names)
        self._check_names(names)
        weights = adapter_weights if isinstance(adapter_weights, list) else [adapter_weights] * len(names)
        weights = [weight.get(NETWORK) if isinstance(weight, dict) else weight for weight in weights]
        network.set_adapters(names, weights)

    def delete_adapters(self, adapter_names: str | list[str]) -> None:
        """Takes single adapters out again."""
        network, names = self._adapted(), [adapter_names] if isinstance(adapter_names, str) else list(adapter_names)
        self._check_names(names)
        network.delete_adapters(names)
        if not network.peft_config:
            self.unload_lora_weights()

    def disable_lora(self) -> None:
        """Leaves all adapters out until `enable_lora`."""
        self._adapted().disable_lora()

    def enable_lora(self) -> None:
        """Takes the adapters up again that `disable_lora` left out."""
        self._adapted().enable_lora()

    def get_active_adapters(self) -> list[str]:
        """The adapters that count."""
        layers = adapted_layers(self._network)
        return list(layers[0].active_adapters) if layers else []

    def get_list_adapters(self) -> dict[str, list[str]]:
        """All adapters that the network holds, as `{"unet": [...]}`."""
        names = list(getattr(self._network, "peft_config", {}))
        return {NETWORK: names} if names else {}

    def _adapted(self) -> Any:
        if not adapted_layers(self._network):
            raise ValueError(f"The pipeline's {NETWORK} has no adapter: call `load_lora_weights` before.")
        return self._network

    def _check_names(self, names: list[str]) -> None:
        known = self.get_list_adapters().get(NETWORK, [])
        if missing := [name for name in names if name not in known]:
            raise ValueError(f"`adapter_names` holds {missing}; the pipeline's adapters are {known}.")


def adapted_layers(network: nn.Module | None) -> list[BaseTunerLayer]:
    """The layers that hold, or held, matrices beside their weights: they are saved under other names."""
    modules = () if network is None else network.modules()
    return [module for module in modules if isinstance(module, BaseTunerLayer)]


def low_rank_difference(tuned: nn.Module, base: nn.Module, rank: int) -> dict[str, Tensor]:
    """The matrices of this rank that come nearest to what a training changed, for `load_lora_weights` on `base`.

    Of each linear and convolutional layer they keep the largest singular values of the change (Eckart and Young).
    Biases and norms are left as `base` has them.

    Args:
        tuned: The network after the training.
        base: The same network before it.
        rank: Number of rows and columns of each layer's matrices, at least 1.

    Raises:
        ValueError: For networks of different layers, and weights that are not finite.
    """
    weights = {
        name: layer.weight
        for name, layer in tuned.named_modules()
        if isinstance(layer, (nn.Linear, nn.Conv2d)) and getattr(layer, "groups", 1) == 1
    }
    layers, matrices = dict(base.named_modules()), {}
    for name, weight in weights.items():
        before = getattr(layers.get(name), "weight", None)
        if before is None or before.shape != weight.shape:
            raise ValueError(
                f"`base` has no layer {name} with a weight {tuple(weight.shape)}: name the network that the training"
                " started from."
            )
        change = (weight.detach().float() - before.detach().to(weight.device).float()).flatten(1)
        if not bool(change.isfinite().all()):
            raise ValueError(f"Weights of the layer {name} are not finite: save a checkpoint from before they were.")
        left, values, right = torch.linalg.svd(change, full_matrices=False)
        kept = values[:rank].sqrt()
        down = F.pad(kept[:, None] * right[:rank], (0, 0, 0, rank - len(kept)))  # (rank, in * kh * kw)
        up = F.pad(left[:, :rank] * kept, (0, rank - len(kept)))  # (out, rank)
        matrices[f"{name}.lora_A.weight"] = down.reshape(rank, *weight.shape[1:])
        matrices[f"{name}.lora_B.weight"] = up.reshape(*up.shape, *(1 for _ in weight.shape[2:]))
    return {name: matrix.cpu().contiguous() for name, matrix in matrices.items()}


def _check_components(components: Sequence[str]) -> None:
    if list(components) != [NETWORK]:
        raise ValueError(f"`components` is {list(components)}: LoRA matrices are in [{NETWORK!r}] alone.")


def _read_matrices(source: str | Path | Mapping[str, Tensor], **place: Any) -> tuple[dict[str, Tensor], dict | None]:
    """The matrices of a file by the network's own names, and the settings that were saved with them."""
    if place.get("subfolder") and place.get("weight_name") is None:
        place["weight_name"] = LORA_WEIGHT_NAME_SAFE  # diffusers would look for a file beside the subfolder
    state_dict, metadata = _fetch_state_dict(
        dict(source) if isinstance(source, Mapping) else str(source),
        **{name: place.get(name) for name in _PLACE},  # pyright: ignore[reportArgumentType]  # takes None
        use_safetensors=True,
        user_agent={"file_type": "attn_procs_weights", "framework": "pytorch"},
        allow_pickle=False,
    )
    for prefix in _PREFIXES:
        if state_dict and all(name.startswith(prefix) for name in state_dict):
            state_dict = {name.removeprefix(prefix): value for name, value in state_dict.items()}
            metadata = metadata and {name.removeprefix(prefix): value for name, value in metadata.items()}
    return state_dict, metadata


def _check_part(components: Collection[str], matrices: Mapping[str, Tensor], source: Any) -> None:
    """Refuses matrices that name another part of the pipeline, such as an upsampler with layers of the same names."""
    part = next((name for name in components if matrices and all(k.startswith(f"{name}.") for k in matrices)), None)
    if part is not None:
        place = "the matrices" if isinstance(source, Mapping) else repr(str(source))
        raise ValueError(
            f"`load_lora_weights` found in {place} matrices of {part}, not of {NETWORK}: call "
            f"`pipe.{part}.load_lora_adapter({place}, prefix={part!r}, weight_name={LORA_WEIGHT_NAME_SAFE!r})`."
        )


def _check_matrices(network: nn.Module, matrices: Mapping[str, Tensor], source: Any) -> None:
    """Refuses what would be passed over, or break off with half of the matrices in place."""
    where = "the given matrices" if isinstance(source, Mapping) else repr(str(source))
    named = {name: _MATRIX.fullmatch(name) for name in matrices}
    if strange := [name for name, match in named.items() if match is None]:
        raise ValueError(
            f"`load_lora_weights` found in {where} {_listing(strange)}, which are no LoRA matrices of {NETWORK} "
            "(`<layer>.lora_A.weight` and `<layer>.lora_B.weight`, with or without `unet.` before them)."
        )
    if not named:
        raise ValueError(f"`load_lora_weights` found no matrices in {where}.")
    layers = dict(network.named_modules())
    wrong = []
    for name, match in named.items():
        assert match is not None
        layer = layers.get(match[1])
        layer = layer.get_base_layer() if isinstance(layer, BaseTunerLayer) else layer
        weight, matrix = getattr(layer, "weight", None), matrices[name]
        if weight is None:
            wrong.append(match[1])
            continue
        is_plain = match[2] and "lora_embedding" not in name and getattr(layer, "groups", 1) == 1
        axis = 0 if match[2] == "B" else 1
        if is_plain and matrix.ndim > 1 and matrix.shape[axis] != weight.shape[axis]:
            wrong.append(f"{name} {tuple(matrix.shape)} beside a weight {tuple(weight.shape)}")
    if wrong:
        raise ValueError(
            f"`load_lora_weights` found in {where} matrices of another network than this {type(network).__name__}: "
            f"{_listing(list(dict.fromkeys(wrong)))}."
        )


def _listing(names: list[str]) -> str:
    rest = f" and {len(names) - _LISTED} more" if len(names) > _LISTED else ""
    return ", ".join(names[:_LISTED]) + rest
