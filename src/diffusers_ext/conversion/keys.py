"""What all converters share: reading original files, renaming keys by a table, loading without leftovers.

A table is a sequence of `(source, target)` patterns. In a source `{}` stands for one index and a final `*` for the
rest of the key; the target takes them over in the same order:

    ("down.{}.block.{}.*", "down_blocks.{}.resnets.{}.*")

Nothing is passed over in silence: a key that no pattern knows, a weight that is missing, misshaped or not finite is an
error that lists the keys.
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

from ..places import did_you_mean

Rules = Sequence[tuple[str, str]]
ModuleType = TypeVar("ModuleType", bound=nn.Module)

_LISTED = 20  # keys that an error message names before it counts the rest

# The attention of Ho's DDPM code, from which taming-transformers and (once its `qkv` is split) ADM have theirs.
ATTENTION: Rules = [
    ("norm.*", "group_norm.*"),
    ("q.*", "to_q.*"),
    ("k.*", "to_k.*"),
    ("v.*", "to_v.*"),
    ("proj_out.*", "to_out.0.*"),
]
# Tables of a noise schedule that lie beside the weights of a whole model.
SCHEDULE_BUFFERS = re.compile(
    r"betas|alphas_cumprod(_prev)?|sqrt_(one_minus_)?alphas_cumprod|log_one_minus_alphas_cumprod|"
    r"sqrt_recip(m1)?_alphas_cumprod|posterior_(variance|log_variance_clipped|mean_coef[12])|lvlb_weights|logvar"
)


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
        raise FileNotFoundError(f"`path` is {str(path)!r}: there is no such file.{did_you_mean(path)}")
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


class Weights(dict[str, Tensor]):
    """Weights by name. Asking for one that is not there is an error of the checkpoint, which names it."""

    def __missing__(self, key: str) -> Tensor:
        raise ValueError(f"The checkpoint lacks {key}, which tells a size. It starts with {list(self)[:3]}.")


def unwrap_state_dict(state_dict: Mapping[str, Any]) -> Weights:
    """The weights of a state dict that is flat, lies under `"state_dict"`, or comes from a DDP module (`module.`)."""
    weights = state_dict.get("state_dict", state_dict)
    if weights and all(key.startswith("module.") for key in weights):
        weights = {key.removeprefix("module."): value for key, value in weights.items()}
    strangers = [key for key, value in weights.items() if not isinstance(value, Tensor)]
    if strangers or not weights:
        raise ValueError(
            f"`state_dict` holds {listing(strangers) if strangers else 'nothing'}: expected tensors by name, or a "
            "dict with them under 'state_dict'."
        )
    return Weights(weights)


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


def count_keys(keys: Iterable[str], prefix: str, suffix: str) -> int:
    """Number of keys `prefix<index>suffix`."""
    pattern = re.compile(re.escape(prefix) + r"\d+" + re.escape(suffix))
    return sum(pattern.fullmatch(key) is not None for key in keys)


def count_heads(name: str, width: int, heads: int | None, head_width: int = 64) -> int:
    """The number of heads of an attention, which no shape tells.

    Args:
        name: of the argument that a user gives it by.
        width: of all heads together.
        heads: the user's number. When it is None, each head is `head_width` wide.

    Raises:
        ValueError: if the heads do not divide the width.
    """
    if heads is None and width % head_width == 0:
        return width // head_width
    if heads is None or heads < 1 or width % heads:
        unfit = f", which is no multiple of {head_width}" if heads is None else ""
        raise ValueError(
            f"`{name}` is {heads}, but the attention is {width} wide{unfit}: pass a divisor of the width, as the "
            "original's config has it."
        )
    return heads


def rename_keys(state_dict: Mapping[str, Tensor], rules: Rules, *, ignore: Iterable[str] = ()) -> Weights:
    """Renames every key that is not left out by the first rule that fits it.

    Args:
        state_dict: original weights.
        rules: `(source, target)` patterns, see above.
        ignore: source patterns of keys to leave out, such as losses saved along with a model.

    Raises:
        ValueError: for keys that no pattern fits, or two keys that get one name.
    """
    compiled = [(_compile(source), target) for source, target in rules]
    ignored = [_compile(pattern) for pattern in ignore]
    renamed = Weights()
    unknown, clashes = [], []
    for key, value in state_dict.items():
        if any(pattern.fullmatch(key) for pattern in ignored):
            continue
        for pattern, target in compiled:
            if match := pattern.fullmatch(key):
                new_key = target.replace("*", "{}").format(*match.groups())
                if new_key in renamed:
                    clashes.append(key)
                renamed[new_key] = value
                break
        else:
            unknown.append(key)
    if unknown:
        raise ValueError(f"The checkpoint holds keys that this converter does not know: {listing(unknown)}.")
    if clashes:
        raise ValueError(f"Keys of the checkpoint would overwrite others: {listing(clashes)}.")
    return renamed


def listing(keys: Sequence[str]) -> str:
    """Keys for an error message: the first 20 by name, the others by number."""
    rest = f" and {len(keys) - _LISTED} more" if len(keys) > _LISTED else ""
    return ", ".join(keys[:_LISTED]) + rest


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
        lists = "; ".join(f"{name}: {listing(keys)}" for name, keys in problems.items() if keys)
        raise ValueError(f"The checkpoint does not fit {type(model).__name__}. {lists}.")
    uses = collections.Counter(value.untyped_storage().data_ptr() for value in state_dict.values())

    def own(value: Tensor) -> Tensor:
        storage = value.untyped_storage()
        is_view = uses[storage.data_ptr()] > 1 or storage.nbytes() != value.nbytes or not value.is_contiguous()
        return value.clone(memory_format=torch.contiguous_format) if is_view else value

    fitted = {key: own(value.detach()).reshape(wanted[key].shape) for key, value in state_dict.items()}
    model.load_state_dict(fitted, assign=True)
    return model.eval()


def _compile(pattern: str) -> re.Pattern[str]:
    escaped = re.escape(pattern).replace(r"\{\}", r"(\d+)")
    if escaped.endswith(r"\*"):
        escaped = escaped[:-2] + "(.+)"
    return re.compile(escaped)


def _without_ones(tensor: Tensor) -> list[int]:
    return [size for size in tensor.shape if size != 1]
