"""What all converters share: reading original files, renaming keys by a table, loading without leftovers.

A table is a sequence of `(source, target)` patterns. In a source `{}` stands for one index and a final `*` for the
rest of the key; the target takes them over in the same order:

    ("down.{}.block.{}.*", "down_blocks.{}.resnets.{}.*")

Nothing is passed over in silence: a key that no pattern knows, a weight that is missing, misshaped or not finite is an
error that lists the keys.

The autoencoders of taming-transformers, which several families build on, are here too.
"""

import argparse
import collections
import pickle
import re
import zipfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from accelerate import init_empty_weights
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

Rules = Sequence[tuple[str, str]]
ModuleType = TypeVar("ModuleType", bound=nn.Module)

_LISTED = 20  # keys that an error message names before it counts the rest

# Encoder and decoder of CompVis/taming-transformers@3ba01b2:taming/modules/diffusionmodules/model.py (MIT)
_TAMING_RESNET: Rules = [
    ("norm1.*", "norm1.*"),
    ("conv1.*", "conv1.*"),
    ("norm2.*", "norm2.*"),
    ("conv2.*", "conv2.*"),
    ("nin_shortcut.*", "conv_shortcut.*"),
]
_TAMING_ATTENTION: Rules = [
    ("norm.*", "group_norm.*"),
    ("q.*", "to_q.*"),
    ("k.*", "to_k.*"),
    ("v.*", "to_v.*"),
    ("proj_out.*", "to_out.0.*"),
]


class _Placeholder:
    """Stands for a class of a library that is not needed to read weights."""


# What research checkpoints hold beside tensors. None of these runs code of the file's choosing.
_HARMLESS_GLOBALS = [
    argparse.Namespace,
    collections.defaultdict,
    dict,
    list,
    int,
    np.dtype,
    np.ndarray,
    np._core.multiarray.scalar,  # type: ignore[attr-defined]
    (np._core.multiarray.scalar, "numpy.core.multiarray.scalar"),  # type: ignore[attr-defined] # before numpy 2
    np._core.multiarray._reconstruct,  # type: ignore[attr-defined]
    (np._core.multiarray._reconstruct, "numpy.core.multiarray._reconstruct"),  # type: ignore[attr-defined]
    (_Placeholder, "pytorch_lightning.callbacks.model_checkpoint.ModelCheckpoint"),  # a dict key of Lightning 1.x
    *{type(np.dtype(name)) for name in ("bool", "int32", "int64", "uint8", "float16", "float32", "float64")},
]


def load_original(path: str | Path, *, allow_pickle: bool = False) -> dict[str, Any]:
    """Reads a checkpoint of an original repository onto the CPU; weights stay in the file until they are used.

    Args:
        path: a `.safetensors` file, or a `.pt`, `.pth`, `.ckpt` or `.bin` file as written by `torch.save`.
        allow_pickle: read files that hold other Python objects than tensors, plain containers, numpy values and
            namespaces. Such a file can run any code on this computer: pass it for files of trusted origin only.

    Returns:
        What the file holds, usually a state dict or a dict around one; the converters take both.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if the file needs `allow_pickle`, is damaged, or holds no dict.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"`path` is {str(path)!r}: there is no such file.")
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        mmap = zipfile.is_zipfile(path)  # files from before torch 1.6 are none, and have to be read whole
        if allow_pickle:
            content = torch.load(path, map_location="cpu", weights_only=False, mmap=mmap)
        else:
            with torch.serialization.safe_globals(_HARMLESS_GLOBALS):
                content = torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
    except (pickle.UnpicklingError, SafetensorError, RuntimeError, EOFError) as error:
        if refused := re.search(r"GLOBAL (\S+)", str(error)):
            raise ValueError(
                f"`path` is {str(path)!r}: the file holds more than weights ({refused[1]}). If you trust whoever "
                "wrote it, pass allow_pickle=True: that runs the code in the file."
            ) from error
        raise ValueError(
            f"`path` is {str(path)!r}: the file is damaged, or of another format than its name."
        ) from error
    if not isinstance(content, dict):
        raise ValueError(f"`path` is {str(path)!r}: the file holds a {type(content).__name__}, expected a state dict.")
    return content


def unwrap_state_dict(state_dict: Mapping[str, Any]) -> dict[str, Tensor]:
    """The weights of a state dict that is flat, lies under `"state_dict"`, or comes from a DDP module (`module.`)."""
    weights = state_dict.get("state_dict", state_dict)
    if weights and all(key.startswith("module.") for key in weights):
        weights = {key.removeprefix("module."): value for key, value in weights.items()}
    strangers = [key for key, value in weights.items() if not isinstance(value, Tensor)]
    if strangers or not weights:
        raise ValueError(
            f"`state_dict` holds {_listing(strangers) if strangers else 'nothing'}: expected tensors by name, or a "
            "dict with them under 'state_dict'."
        )
    return dict(weights)


def under(source: str, target: str, rules: Rules) -> list[tuple[str, str]]:
    """The same rules below a prefix, which may hold indices itself."""
    return [(source + left, target + right) for left, right in rules]


def require(weights: Mapping[str, Tensor], what: str, *keys: str) -> None:
    """Refuses weights of another model: `what`, with its article, has all of `keys`."""
    missing = [key for key in keys if key not in weights]
    if missing:
        raise ValueError(
            f"`state_dict` is not {what}: it lacks {', '.join(missing)}. It starts with {list(weights)[:3]}."
        )


def count_keys(weights: Mapping[str, Tensor], prefix: str, suffix: str) -> int:
    """Number of keys `prefix<index>suffix`."""
    pattern = re.compile(re.escape(prefix) + r"\d+" + re.escape(suffix))
    return sum(pattern.fullmatch(key) is not None for key in weights)


def rename_keys(state_dict: Mapping[str, Tensor], rules: Rules, *, ignore: Iterable[str] = ()) -> dict[str, Tensor]:
    """Renames every key by the first rule that fits it.

    Args:
        state_dict: original weights.
        rules: `(source, target)` patterns, see above.
        ignore: source patterns of keys to leave out, such as losses saved along with a model.

    Raises:
        ValueError: for keys that no pattern fits, or two keys that get one name.
    """
    compiled = [(_compile(source), target) for source, target in rules]
    ignored = [_compile(pattern) for pattern in ignore]
    renamed: dict[str, Tensor] = {}
    unknown, clashes = [], []
    for key, value in state_dict.items():
        for pattern, target in compiled:
            if match := pattern.fullmatch(key):
                new_key = target.replace("*", "{}").format(*match.groups())
                if new_key in renamed:
                    clashes.append(key)
                renamed[new_key] = value
                break
        else:
            if not any(pattern.fullmatch(key) for pattern in ignored):
                unknown.append(key)
    if unknown:
        raise ValueError(f"The checkpoint holds keys that this converter does not know: {_listing(unknown)}.")
    if clashes:
        raise ValueError(f"Keys of the checkpoint would overwrite others: {_listing(clashes)}.")
    return renamed


def taming_autoencoder(weights: Mapping[str, Tensor]) -> tuple[dict[str, Any], list[tuple[str, str]]]:
    """Sizes and key names of a taming-transformers encoder and decoder, as diffusers' `VQModel` has them.

    Args:
        weights: original ones, flat; all sizes are read off their shapes.

    Returns:
        What the config of a `VQModel` or `AutoencoderKL` says about both, and the rules for their keys; those of the
        bottleneck between the two 1x1 convolutions are the caller's.

    Raises:
        ValueError: for a first level that is wider than the first convolution, which diffusers cannot express.
    """
    num_levels = 1 + max(int(key.split(".")[2]) for key in weights if key.startswith("encoder.down."))
    widths = [weights[f"encoder.down.{level}.block.0.conv1.weight"].shape[0] for level in range(num_levels)]
    if weights["encoder.conv_in.weight"].shape[0] != widths[0]:
        raise ValueError(
            f"The encoder starts with {weights['encoder.conv_in.weight'].shape[0]} channels and its first level has "
            f"{widths[0]}: diffusers needs the same, that is a `ch_mult` that starts with 1."
        )
    has_attention = [f"encoder.down.{level}.attn.0.q.weight" in weights for level in range(num_levels)]
    config = {
        "in_channels": weights["encoder.conv_in.weight"].shape[1],
        "out_channels": weights["decoder.conv_out.weight"].shape[0],
        "down_block_types": tuple("AttnDownEncoderBlock2D" if a else "DownEncoderBlock2D" for a in has_attention),
        "up_block_types": tuple("AttnUpDecoderBlock2D" if a else "UpDecoderBlock2D" for a in reversed(has_attention)),
        "block_out_channels": tuple(widths),
        "layers_per_block": count_keys(weights, "encoder.down.0.block.", ".conv1.weight"),
        "mid_block_add_attention": "encoder.mid.attn_1.q.weight" in weights,
    }
    rules = [("quant_conv.*", "quant_conv.*"), ("post_quant_conv.*", "post_quant_conv.*")]
    for half in ("encoder.", "decoder."):
        rules += [(half + f"{name}.*", half + f"{name}.*") for name in ("conv_in", "conv_out")]
        rules += [(half + "norm_out.*", half + "conv_norm_out.*")]
        rules += under(half + "mid.block_1.", half + "mid_block.resnets.0.", _TAMING_RESNET)
        rules += under(half + "mid.attn_1.", half + "mid_block.attentions.0.", _TAMING_ATTENTION)
        rules += under(half + "mid.block_2.", half + "mid_block.resnets.1.", _TAMING_RESNET)
    rules += _taming_level("encoder.down.{}.", "encoder.down_blocks.{}.", "downsample")
    for level in range(num_levels):  # the original counts upward levels from the finest, diffusers from the deepest
        source, target = f"decoder.up.{level}.", f"decoder.up_blocks.{num_levels - 1 - level}."
        rules += _taming_level(source, target, "upsample")
    return config, rules


def build_empty(model_class: type[ModuleType], **config: Any) -> ModuleType:
    """A model without memory for its weights, to be filled by `load_strict`; buffers are real."""
    with init_empty_weights(include_buffers=False):
        return model_class(**config)


def load_strict(model: ModuleType, state_dict: Mapping[str, Tensor]) -> ModuleType:
    """Gives `model` all its weights, in the dtype of `state_dict`, and returns it in eval mode.

    A tensor that has its memory for itself is taken over without a copy (files of these systems have up to 10 GB): the
    model and `state_dict` then share it.

    Axes of length 1 may be placed otherwise than in the model: a 1x1 convolution fills a linear layer.

    Raises:
        ValueError: listing keys that are missing, unknown, misshaped or not finite.
    """
    wanted = model.state_dict()
    misshaped = [
        f"{key} {tuple(value.shape)} instead of {tuple(wanted[key].shape)}"
        for key, value in state_dict.items()
        if key in wanted and _without_ones(value) != _without_ones(wanted[key])
    ]
    not_finite = [k for k, value in state_dict.items() if value.is_floating_point() and not value.isfinite().all()]
    problems = {
        "missing": sorted(wanted.keys() - state_dict.keys()),
        "unknown": sorted(state_dict.keys() - wanted.keys()),
        "misshaped": misshaped,
        "not finite": not_finite,
    }
    if any(problems.values()):
        lists = "; ".join(f"{name}: {_listing(keys)}" for name, keys in problems.items() if keys)
        raise ValueError(f"The checkpoint does not fit {type(model).__name__}. {lists}.")
    uses = collections.Counter(value.untyped_storage().data_ptr() for value in state_dict.values())

    def own(value: Tensor) -> Tensor:
        storage = value.untyped_storage()
        is_view = uses[storage.data_ptr()] > 1 or storage.nbytes() != value.nbytes or not value.is_contiguous()
        return value.clone(memory_format=torch.contiguous_format) if is_view else value

    fitted = {key: own(value.detach()).reshape(wanted[key].shape) for key, value in state_dict.items()}
    model.load_state_dict(fitted, assign=True)
    return model.eval()


def _taming_level(source: str, target: str, resample: str) -> Rules:
    """One level (or all, with an index in both prefixes): residual blocks, attention and resampling."""
    return [
        *under(source + "block.{}.", target + "resnets.{}.", _TAMING_RESNET),
        *under(source + "attn.{}.", target + "attentions.{}.", _TAMING_ATTENTION),
        (source + f"{resample}.conv.*", target + f"{resample}rs.0.conv.*"),
    ]


def _compile(pattern: str) -> re.Pattern[str]:
    escaped = re.escape(pattern).replace(r"\{\}", r"(\d+)")
    if escaped.endswith(r"\*"):
        escaped = escaped[:-2] + "(.+)"
    return re.compile(escaped)


def _without_ones(tensor: Tensor) -> list[int]:
    return [size for size in tensor.shape if size != 1]


def _listing(keys: Sequence[str]) -> str:
    rest = f" and {len(keys) - _LISTED} more" if len(keys) > _LISTED else ""
    return ", ".join(keys[:_LISTED]) + rest
