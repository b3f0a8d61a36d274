"""One recorded case: `case.json`, `io.safetensors` and, for a network, the original's `weights.safetensors`."""

import json
from pathlib import Path

import torch
from safetensors.torch import load_file


class Case:
    """What a kind's function receives: facts, inputs, weights, and the only way to compare.

    A kind reads its inputs with `case["name"]` and holds every result against the record with `case.check("name",
    actual)`. Both are noted, so that the walker can refuse a kind that compared nothing or passed over a tensor.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self.facts: dict = json.loads((folder / "case.json").read_text())
        for field in ("system", "kind", "atol", "rtol"):
            if field not in self.facts:
                raise ValueError(f"{folder / 'case.json'} has no field {field!r}")
        self.system: str = self.facts["system"]
        self.kind: str = self.facts["kind"]
        path = folder / "io.safetensors"  # without one, whatever a kind asks for is missing
        self._tensors = load_file(path) if path.is_file() else {}
        self._seen: set[str] = set()
        self.checked: set[str] = set()

    def __getitem__(self, name: str) -> torch.Tensor:
        if name not in self._tensors:
            raise KeyError(f"{self.folder.name} records no tensor {name!r}; it records {sorted(self._tensors)}")
        self._seen.add(name)
        return self._tensors[name]

    def __contains__(self, name: str) -> bool:
        return name in self._tensors

    def names(self, prefix: str = "") -> list[str]:
        """The recorded tensors whose name starts with `prefix`, sorted."""
        return sorted(name for name in self._tensors if name.startswith(prefix))

    def weights(self) -> dict[str, torch.Tensor]:
        """The original state dict, under its original keys, as float32 (float16 files hold exact values)."""
        path = self.folder / self.facts.get("weights_from", "weights.safetensors")
        return {k: v.float() if v.is_floating_point() else v for k, v in load_file(path).items()}

    def check(self, name: str, actual: torch.Tensor, *, atol: float | None = None, rtol: float | None = None) -> None:
        """Compares `actual` with the recorded tensor `name`: integers exactly, floats at the tolerance."""
        expected = self[name]
        self.checked.add(name)
        where = f"{self.folder.name}: {name}"
        assert tuple(actual.shape) == tuple(expected.shape), (
            f"{where}: {tuple(actual.shape)} != {tuple(expected.shape)}"
        )
        actual = actual.detach().cpu()
        if not expected.is_floating_point():
            wrong = int((actual.to(expected.dtype) != expected).sum())
            assert wrong == 0, f"{where}: {wrong} of {expected.numel()} values differ"
            return
        atol = self.facts["atol"] if atol is None else atol
        rtol = self.facts["rtol"] if rtol is None else rtol
        torch.testing.assert_close(
            actual.to(expected.dtype), expected, atol=atol, rtol=rtol, msg=lambda m: f"{where}\n{m}"
        )

    def unused(self, name: str, reason: str) -> None:
        """Says that a recorded tensor is left aside on purpose; `reason` is for the reader of the kind."""
        assert reason and name in self._tensors, name
        self._seen.add(name)

    def unread(self) -> list[str]:
        return sorted(set(self._tensors) - self._seen)
