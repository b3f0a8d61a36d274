"""What frozen encoders make of each sample: computed once, kept on disk, refused when it belongs to something else.

A cache is a folder: `cache.json` says what it was made of (the digests of data and encoders, sizes), and each
`shard-<number>.safetensors` holds the samples `number * shard_size` and following. A shard appears in one rename, so
an interrupted run goes on where it stopped, and several processes share the work. Values are exact: integers are
stored in the smallest type that holds them, floats as they are.
"""

import hashlib
import json
import os
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from tqdm.auto import tqdm

from .args import DataArgs

INDEX = "cache.json"
SHARD_SIZE = 4096  # samples a file
OFFSETS = ".offsets"  # suffix: where each sample's rows of a tensor begin and end

Sample = Mapping[str, Tensor]


class CacheError(ValueError):
    """A cache is damaged, or was made of other data, encoders or options."""


class SampleCache(Dataset):
    """The cached samples, map-style: dictionaries of tensors, floats and integers (int64) as they were encoded."""

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        index = json.loads((self.folder / INDEX).read_text(encoding="utf-8"))
        self.num_samples, self.shard_size = index["num_samples"], index["shard_size"]
        self._shards: dict[int, dict[str, Tensor]] = {}

    def __len__(self) -> int:
        return self.num_samples

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        if not 0 <= index < self.num_samples:
            raise IndexError(f"The cache {self.folder} holds samples 0 to {self.num_samples - 1}, not {index}.")
        number, row = divmod(index, self.shard_size)
        if number not in self._shards:  # mapped into memory, not read
            self._shards[number] = load_file(shard_path(self.folder, number))
        shard, sample = self._shards[number], {}
        for name, values in shard.items():
            if name.endswith(OFFSETS):
                continue
            if (offsets := shard.get(name + OFFSETS)) is not None:
                values = values[int(offsets[row]) : int(offsets[row + 1])]
            else:
                values = values[row]
            sample[name] = values.clone() if values.is_floating_point() else values.to(torch.int64)
        return sample

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_shards": {}}  # every loader process maps the files itself


class CachedRows(Dataset):
    """Rows whose pictures are replaced by what a cache holds of them; the other columns are read as before."""

    def __init__(self, cache: Dataset, rows: Any, columns: Sequence[str]):
        """`rows` has `select_columns`, as a data set of `datasets` or `NamedRows` have it."""
        self.cache, self.size = cache, len(rows)
        self.others = rows.select_columns(list(dict.fromkeys(columns))) if columns else None

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> dict[str, Any]:
        others = {} if self.others is None else self.others[index]
        return {**others, **self.cache[index]}


def check_cacheable(
    cache_dir: str | None, data: DataArgs, kept: str, *, crop_scale: tuple[float, float] | None = None
) -> None:
    """Refuses a cache together with pictures that are another one in every epoch.

    Args:
        cache_dir: `--cache_dir`; nothing is refused without it.
        kept: What it holds of a picture: "latents", "tokens".
        crop_scale: Of a recipe that has the option.

    Raises:
        ValueError: there is augmentation; names the ways out.
    """
    options = "--random_flip" if crop_scale is None else "--random_flip and --crop_scale"
    if cache_dir and (data.random_flip or not data.center_crop or crop_scale not in (None, (1.0, 1.0))):
        raise ValueError(
            f"--cache_dir keeps one set of {kept} a picture, which excludes augmentation: pass --center_crop and "
            f"leave out {options}, or leave out --cache_dir."
        )


def open_cache(
    folder: str | Path,
    key: Mapping[str, Any],
    dataset: Any,
    *,
    read: Callable[[Any], Any],
    encode: Callable[[list[Any]], Iterable[Sample]],
    accelerator: Accelerator,
    batch_size: int,
    ragged: Sequence[str] = (),
    num_workers: int = 0,
    shard_size: int = SHARD_SIZE,
) -> SampleCache:
    """Opens the cache in `folder`, after writing what is missing of it.

    Args:
        folder: new, empty, or a cache of the same `key`.
        key: what the values depend on, by names that an error can tell; plain JSON values, such as digests.
        dataset: map-style; its samples are cached under their indices.
        read: `dataset[index] -> sample`, in the loader's processes.
        encode: `list of samples -> one dictionary of tensors a sample`, the same names and shapes for all.
        accelerator: its processes write shards by turns, and wait for each other.
        batch_size: samples a call of `encode`.
        ragged: names of tensors whose first axis differs from sample to sample.
        num_workers: loader processes.
        shard_size: samples a file, for a new cache.

    Raises:
        CacheError: the folder holds something else than a cache, or one of another `key` (the message tells which
            parts differ); a shard is damaged; the first or the last sample is not what `encode` makes of it now.
    """
    folder = Path(folder)
    index = {"num_samples": len(dataset), "shard_size": shard_size, "key": dict(key)}
    found = _read_index(folder)
    if found is not None:
        _compare(folder, {"num_samples": len(dataset), **key}, {"num_samples": found["num_samples"], **found["key"]})
        index = found
    accelerator.wait_for_everyone()  # everybody has looked before anybody writes
    if found is None and accelerator.is_main_process:
        folder.mkdir(parents=True, exist_ok=True)
        _write_text(folder / INDEX, json.dumps(index, indent=1))
    accelerator.wait_for_everyone()
    rows_of, cache = dict(_shard_rows(index)), SampleCache(folder)
    there = [number for number, rows in rows_of.items() if _is_whole(shard_path(folder, number), len(rows))]
    if there:
        _spot_check(cache, [rows_of[there[0]][0], rows_of[there[-1]][-1]], dataset, read, encode)
    accelerator.wait_for_everyone()  # nobody writes before everybody knows what is missing
    missing = [number for number in rows_of if number not in there]
    mine = {number: rows_of[number] for number in missing[accelerator.process_index :: accelerator.num_processes]}
    bar = tqdm(
        total=sum(map(len, mine.values())), disable=not (mine and accelerator.is_local_main_process), desc="cache"
    )
    for number, rows in mine.items():
        loader = DataLoader(
            _ReadRows(dataset, read),
            batch_size=batch_size,
            sampler=rows,
            num_workers=num_workers,
            collate_fn=list,
            generator=torch.Generator(),  # the loader's own seed must not advance the default generator
        )
        samples = []
        for batch in loader:
            samples += [{name: _smallest(value) for name, value in sample.items()} for sample in encode(batch)]
            bar.update(len(batch))
        _write_shard(shard_path(folder, number), samples, ragged)
    bar.close()
    accelerator.wait_for_everyone()
    return cache


def shard_path(folder: Path, number: int) -> Path:
    return folder / f"shard-{number:06d}.safetensors"


# ---------------------------------------------------------------------------------------------------------------------
# what a cache was made of


def digest_network(network: Any) -> str:
    """Of a network's class, configuration and weights (not of where they were loaded from)."""
    state = hashlib.blake2b(type(network).__name__.encode(), digest_size=16)
    config = network.config.to_dict() if hasattr(network.config, "to_dict") else dict(network.config)
    # versions, places, and the class, which is fed above: a tower of a CLIPModel names none, the same tower saved does
    other = ("transformers_version", "dtype", "architectures")
    config = {k: v for k, v in config.items() if not k.startswith("_") and k not in other}
    _feed(state, config)
    for name, tensor in nn.Module.state_dict(network).items():
        _feed(state, [name, str(tensor.dtype), list(tensor.shape)])
        state.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return state.hexdigest()


def digest_saved(*parts: Any) -> str:
    """Of what `save_pretrained` writes: for tokenizers and feature extractors."""
    state = hashlib.blake2b(digest_size=16)
    with tempfile.TemporaryDirectory() as folder:
        for number, part in enumerate(parts):
            part.save_pretrained(Path(folder, str(number)))
        for path in sorted(p for p in Path(folder).rglob("*") if p.is_file()):
            _feed(state, [path.relative_to(folder).as_posix(), path.read_bytes()])
    return state.hexdigest()


def digest_rows(dataset: Any, columns: Sequence[str]) -> str:
    """Of the columns of a `datasets.Dataset` as they are stored, and of the transform that shows them.

    Where a row names a file, its size and time of change count, not its content.
    """
    state = hashlib.blake2b(repr(dataset.format["format_kwargs"]).encode(), digest_size=16)
    columns = list(dict.fromkeys(columns))
    for table in dataset.with_format("arrow").select_columns(columns).iter(batch_size=1024):
        for name in columns:
            _feed(state, table.column(name).to_pylist(), files=True)
    return state.hexdigest()


def _feed(state: Any, value: Any, *, files: bool = False) -> None:
    """Hashes nested plain values; each with its kind and length, so that no two lists of values look alike."""
    if isinstance(value, Mapping):
        value = sorted((str(name), item) for name, item in value.items())
    if isinstance(value, (list, tuple)):
        state.update(f"[{len(value)}".encode())
        for item in value:
            _feed(state, item, files=files)
    elif isinstance(value, bytes):
        state.update(f"b{len(value)}:".encode() + value)
    else:
        text = f"{type(value).__name__} {value!r}".encode()
        state.update(f"{len(text)}:".encode() + text)
        if files and isinstance(value, str) and os.path.isfile(value):
            stat = os.stat(value)
            state.update(f"{stat.st_size} {stat.st_mtime_ns}".encode())


# ---------------------------------------------------------------------------------------------------------------------
# files


class _ReadRows(Dataset):
    def __init__(self, dataset: Any, read: Callable[[Any], Any]):
        self.dataset, self.read = dataset, read

    def __getitem__(self, index: int) -> Any:
        return self.read(self.dataset[index])


def _shard_rows(index: Mapping[str, Any]) -> list[tuple[int, range]]:
    """Number and samples of each shard."""
    size, total = index["shard_size"], index["num_samples"]
    return [(start // size, range(start, min(start + size, total))) for start in range(0, total, size)]


def _read_index(folder: Path) -> dict[str, Any] | None:
    """What `cache.json` says; `None` for a folder that is new or empty."""
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return None
    try:
        return json.loads((folder / INDEX).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CacheError(
            f"{folder} is not empty, but holds no readable {INDEX}: it is no cache. Name another --cache_dir."
        ) from error


def _compare(folder: Path, wanted: Mapping[str, Any], found: Mapping[str, Any]) -> None:
    differing = [name for name in {**wanted, **found} if wanted.get(name) != found.get(name)]
    if differing:
        parts = ", ".join(f"{name} ({found.get(name)} there, {wanted.get(name)} here)" for name in differing)
        raise CacheError(
            f"The cache {folder} was made of something else: {parts}. Name another --cache_dir, or remove the folder "
            "and it is written anew."
        )


def _spot_check(cache: SampleCache, indices: list[int], dataset: Any, read: Callable, encode: Callable) -> None:
    """Finds what no digest knows: pictures changed in place, or code that makes something else of them."""
    for index, now in zip(indices, encode([read(dataset[index]) for index in indices]), strict=True):
        there = cache[index]
        if there.keys() != now.keys() or not all(
            _alike(there[name], value.detach().cpu()) for name, value in now.items()
        ):
            raise CacheError(
                f"Sample {index} of the cache {cache.folder} is not what the encoders make of it now: the data have "
                "changed, or the code that reads them. Name another --cache_dir, or remove the folder and it is "
                "written anew."
            )


def _alike(cached: Tensor, computed: Tensor) -> bool:
    """Equal up to what another device rounds otherwise, and to the near ties between codes that this decides."""
    if cached.shape != computed.shape or cached.numel() == 0:
        return cached.shape == computed.shape
    if cached.is_floating_point():
        return bool((cached - computed).abs().max() <= 0.02 * computed.abs().max())
    return float((cached == computed).float().mean()) >= 0.9


def _is_whole(path: Path, num_samples: int) -> bool:
    """Whether the shard is there.

    Raises:
        CacheError: it is damaged.
    """
    if not path.exists():
        return False
    try:
        with safe_open(path, "pt") as shard:
            names = list(shard.keys())
            lengths = {
                shard.get_slice(name).get_shape()[0] - name.endswith(OFFSETS)
                for name in names
                if name + OFFSETS not in names
            }
    except (SafetensorError, OSError, IndexError) as error:
        raise CacheError(f"{path} is damaged ({error}): remove it, and the next run writes it anew.") from error
    if lengths != {num_samples}:
        raise CacheError(f"{path} does not hold {num_samples} samples: remove it, and the next run writes it anew.")
    return True


def _write_shard(path: Path, samples: Sequence[Sample], ragged: Sequence[str]) -> None:
    tensors = {}
    for name in samples[0]:
        values = [sample[name] for sample in samples]
        if name in ragged:
            tensors[name + OFFSETS] = torch.tensor([0, *map(len, values)]).cumsum(0)
        else:
            values = [value.unsqueeze(0) for value in values]
        tensors[name] = torch.cat(values)  # in the largest of their types
    temporary = path.with_name(f"{path.name}.tmp-{os.getpid()}")
    try:
        save_file(tensors, temporary)
        with temporary.open("rb") as stream:
            os.fsync(stream.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _smallest(values: Tensor) -> Tensor:
    """On the CPU, and integers in the smallest type that holds them all."""
    values = values.detach().cpu()
    if values.is_floating_point() or values.numel() == 0:
        return values
    low, high = int(values.min()), int(values.max())
    for dtype in (torch.uint8, torch.int16, torch.int32):
        if torch.iinfo(dtype).min <= low and high <= torch.iinfo(dtype).max:
            return values.to(dtype)
    return values


def _write_text(path: Path, text: str) -> None:
    temporary = path.with_name(f"{path.name}.tmp-{os.getpid()}")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)
