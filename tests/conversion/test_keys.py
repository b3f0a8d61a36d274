import argparse
import collections
import itertools
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from diffusers_ext.conversion.keys import (
    build_empty,
    load_original,
    load_strict,
    rename_keys,
    under,
    unwrap_state_dict,
)


def names(*keys: str) -> dict[str, torch.Tensor]:
    return {key: torch.full((1,), float(index)) for index, key in enumerate(keys)}


def test_rename():
    rules = [
        ("in.weight", "conv_in.weight"),
        ("mid.{}.*", "middle.{}.*"),
        *under("down.{}.", "blocks.{}.", [("block.{}.conv.*", "resnets.{}.conv1.*")]),
    ]
    renamed = rename_keys(names("in.weight", "mid.12.a.b", "down.3.block.0.conv.weight"), rules)
    assert list(renamed) == ["conv_in.weight", "middle.12.a.b", "blocks.3.resnets.0.conv1.weight"]
    assert [value.item() for value in renamed.values()] == [0, 1, 2]


def test_first_rule_wins_and_patterns_fit_the_whole_key():
    rules = [("a.{}.weight", "special.{}"), ("a.*", "other.*")]
    assert list(rename_keys(names("a.1.weight", "a.1.weights", "a.x.weight"), rules)) == [
        "special.1",
        "other.1.weights",
        "other.x.weight",
    ]
    with pytest.raises(ValueError, match=r"does not know: aX1, b\.a\.1\."):
        rename_keys(names("aX1", "b.a.1"), rules)  # the dot is no wildcard, and a prefix does not go unseen


def test_unknown_keys_are_listed_unless_ignored():
    state_dict = names("a.weight", "loss.disc.weight", "ema.weight")
    with pytest.raises(ValueError, match=r"does not know: loss\.disc\.weight, ema\.weight\."):
        rename_keys(state_dict, [("a.*", "b.*")])
    assert list(rename_keys(state_dict, [("a.*", "b.*")], ignore=("loss.*", "ema.*"))) == ["b.weight"]
    with pytest.raises(ValueError, match=r"k0, .*k19 and 5 more"):
        rename_keys(names(*(f"k{i}" for i in range(25))), [])


def test_two_keys_with_one_name_are_an_error():
    with pytest.raises(ValueError, match=r"overwrite others: b\.weight"):
        rename_keys(names("a.weight", "b.weight"), [("a.*", "c.*"), ("b.*", "c.*")])


def test_unwrap():
    weights = names("a.weight", "b.weight")
    assert unwrap_state_dict(weights) == weights
    assert unwrap_state_dict({"state_dict": weights, "epoch": 3}) == weights
    assert unwrap_state_dict({f"module.{key}": value for key, value in weights.items()}) == weights
    with pytest.raises(ValueError, match="holds epoch, optimizer: expected tensors by name"):
        unwrap_state_dict({**weights, "epoch": 3, "optimizer": {}})
    with pytest.raises(ValueError, match="holds nothing"):
        unwrap_state_dict({"state_dict": {}})


def linear() -> nn.Linear:
    return build_empty(nn.Linear, in_features=3, out_features=2)


def test_load_strict_fits():
    state_dict = {"weight": torch.randn(2, 3, 1, 1, dtype=torch.float16), "bias": torch.randn(2, dtype=torch.float16)}
    module = load_strict(linear(), state_dict)
    assert not module.training and module.weight.requires_grad and module.weight.dtype == torch.float16
    assert torch.equal(module.weight, state_dict["weight"][:, :, 0, 0])


def test_load_strict_copies_only_what_shares_its_memory():
    """A 10 GB file is not held twice, and no weight keeps a larger tensor alive or changes along with another."""
    both, bias = torch.randn(2, 2, 3), torch.randn(2)
    module = load_strict(linear(), {"weight": both[0], "bias": bias})
    assert module.bias.data_ptr() == bias.data_ptr() and module.weight.untyped_storage().nbytes() == 2 * 3 * 4
    assert torch.equal(module.weight, both[0])
    twins = load_strict(nn.ParameterDict({"a": torch.zeros(2), "b": torch.zeros(2)}), {"a": bias, "b": bias})
    assert len({bias.data_ptr(), twins["a"].data_ptr(), twins["b"].data_ptr()}) == 3
    turned = load_strict(linear(), {"weight": torch.randn(3, 2).T, "bias": bias}).weight
    assert turned.is_contiguous()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"bias": None}, r"does not fit Linear\. missing: bias\.$"),
        ({"gamma": torch.zeros(2)}, r"unknown: gamma\.$"),
        ({"weight": torch.zeros(3, 2)}, r"misshaped: weight \(3, 2\) instead of \(2, 3\)\.$"),
        ({"bias": torch.tensor([0.0, float("nan")])}, r"not finite: bias\.$"),
        ({"bias": None, "gamma": torch.zeros(2)}, r"missing: bias; unknown: gamma\.$"),
    ],
)
def test_load_strict_lists_what_does_not_fit(changes, message):
    state_dict = {"weight": torch.zeros(2, 3), "bias": torch.zeros(2), **changes}
    with pytest.raises(ValueError, match=message):
        load_strict(linear(), {key: value for key, value in state_dict.items() if value is not None})


def test_load_original_reads_what_research_code_saves(tmp_path):
    weights = names("a", "b")
    save_file(weights, tmp_path / "model.safetensors")
    assert load_original(tmp_path / "model.safetensors") == weights

    content = {
        "state_dict": collections.OrderedDict(weights),
        "args": argparse.Namespace(lr=1e-4),
        "best": np.float64(0.5),
        "step": np.int64(7),
        "history": np.arange(3),
        "meters": collections.defaultdict(list),
        "callbacks": {},
    }
    for name in ("model.ckpt", "model.pt"):
        torch.save(content, tmp_path / name)
        loaded = load_original(str(tmp_path / name))
        assert unwrap_state_dict(loaded) == weights
        assert (loaded["args"].lr, loaded["best"], loaded["step"]) == (1e-4, 0.5, 7)
        assert loaded["history"].tolist() == [0, 1, 2]


def test_load_original_leaves_the_weights_in_the_file(tmp_path):
    weights = {"a": torch.randn(3)}
    torch.save(weights, tmp_path / "new.ckpt")
    torch.save(weights, tmp_path / "old.ckpt", _use_new_zipfile_serialization=False)
    for name, allow_pickle in itertools.product(("new.ckpt", "old.ckpt"), (False, True)):
        loaded = load_original(tmp_path / name, allow_pickle=allow_pickle)["a"]
        assert torch.equal(loaded, weights["a"])
        maps = Path("/proc/self/maps")
        if name == "new.ckpt" and maps.is_file():  # Linux
            spans = [line.split()[0].split("-") for line in maps.read_text().splitlines() if line.endswith("new.ckpt")]
            assert any(int(start, 16) <= loaded.data_ptr() < int(end, 16) for start, end in spans)
        loaded.zero_()  # ours, not the file's
        assert torch.equal(load_original(tmp_path / name)["a"], weights["a"])


def test_load_original_reads_lightning_files_without_lightning(tmp_path, monkeypatch):
    name = "pytorch_lightning.callbacks.model_checkpoint"
    module = types.ModuleType(name)
    module.ModelCheckpoint = type("ModelCheckpoint", (), {"__module__": name})
    with monkeypatch.context() as patch:
        for parent in ("pytorch_lightning", "pytorch_lightning.callbacks"):
            patch.setitem(sys.modules, parent, types.ModuleType(parent))
        patch.setitem(sys.modules, name, module)
        torch.save({"state_dict": names("a"), "callbacks": {module.ModelCheckpoint: {"best": 1}}}, tmp_path / "a.ckpt")
    assert list(load_original(tmp_path / "a.ckpt")["state_dict"]) == ["a"]


class WritesAFile:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (self.path, "w"))


def test_pickles_run_no_code_unless_allowed(tmp_path):
    torch.save({"weights": torch.zeros(1), "extra": WritesAFile(str(tmp_path / "proof"))}, tmp_path / "hostile.ckpt")
    with pytest.raises(ValueError, match=r"hostile\.ckpt.*more than weights \(io\.open\).*allow_pickle=True"):
        load_original(tmp_path / "hostile.ckpt")
    assert not (tmp_path / "proof").exists()
    loaded = load_original(tmp_path / "hostile.ckpt", allow_pickle=True)
    loaded["extra"].close()
    assert (tmp_path / "proof").exists()


def test_load_original_names_bad_files(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"missing\.pt'.*no such file"):
        load_original(tmp_path / "missing.pt")
    torch.save(torch.zeros(2), tmp_path / "tensor.pt")
    with pytest.raises(ValueError, match=r"tensor\.pt'.*holds a Tensor, expected a state dict"):
        load_original(tmp_path / "tensor.pt")
    torch.save(names("a"), tmp_path / "whole.pt")
    for size in (0, 40, 300):
        (tmp_path / "cut.pt").write_bytes((tmp_path / "whole.pt").read_bytes()[:size])
        with pytest.raises(ValueError, match=r"cut\.pt'.*damaged"):
            load_original(tmp_path / "cut.pt")
    (tmp_path / "cut.safetensors").write_bytes(b"\x08")
    with pytest.raises(ValueError, match=r"cut\.safetensors'.*damaged"):
        load_original(tmp_path / "cut.safetensors")
