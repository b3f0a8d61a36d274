"""benchmarks/speed_paella.py and the plain form that it measures against."""

import json
import runpy
import sys
from types import SimpleNamespace

import pytest
import torch
from parity.case import Case

from diffusers_ext.schedulers.token_sampling import typical_filter

TINY = "--c_hidden 32 --down_levels 1 1 2 --condition_dim 16 --num_codes 64 --tokens 8 --threads 1 --rounds 1"


@pytest.fixture(scope="module")
def script(repo_root) -> SimpleNamespace:
    sys.path.insert(0, str(repo_root / "benchmarks"))
    try:
        return SimpleNamespace(**runpy.run_path(str(repo_root / "benchmarks" / "speed_paella.py")))
    finally:
        sys.path.remove(str(repo_root / "benchmarks"))


def test_plain_network_is_the_recorded_one(script, repo_root):
    case = Case(repo_root / "tests/parity/cases/paella/v1_unet_forward")
    ctor = case.facts["ctor"]
    model = script.plain.DenoiseUNet(**{name: ctor[name] for name in ("num_labels", "c_hidden", "c_clip", "c_r")},
                                     down_levels=ctor["down_levels"], up_levels=ctor["up_levels"])  # fmt: skip
    model.load_state_dict(case.weights())
    with torch.no_grad():
        case.check("logits", model(case["tokens"], case["clip"], case["r"]))
        case.check("logits_spatial_clip", model(case["tokens"], case["clip_spatial"], case["r"]))


def test_plain_network_runs_in_half_precision(script):
    args = script.parse_args([*TINY.split(), "--dtype", "bfloat16"])  # what an accelerator is measured in
    tokens, condition = script.inputs(args)
    with torch.no_grad():
        logits = script.build_plain(args)(tokens, condition, torch.zeros(1))
    assert logits.dtype == torch.bfloat16 and logits.isfinite().all()


def test_plain_filter_is_ours(script):
    logits = torch.randn(20, 3000, generator=torch.Generator().manual_seed(0)) * 2
    assert torch.equal(script.plain.typical_filter(logits, 0.3), typical_filter(logits, 0.3))


def test_plain_sampling_runs_to_tokens(script):
    args = script.parse_args(TINY.split())
    tokens, condition = script.inputs(args, 2)
    torch.manual_seed(0)
    drawn = script.plain.sample(script.build_plain(args), condition, tokens, steps=3)
    assert drawn.shape == (2, 8, 8) and 0 <= int(drawn.min()) and int(drawn.max()) < 64


def test_forms_agree_and_the_table_says_so(script, tmp_path):
    script.main([*TINY.split(), "--json", str(tmp_path / "figures.json")])
    rows = json.loads((tmp_path / "figures.json").read_text())["1 thread"]
    by_name = {row["case"]: row for row in rows}
    assert float(by_name["network, one forward"]["difference"]) < 1e-5
    assert by_name["tail: guidance, filter, Gumbel draw"]["difference"] == "0 of 64 tokens"
    logits, tokens = by_name["one CFG step, tokens to tokens"]["difference"].split(", ")
    assert float(logits) < 1e-5 and tokens == "0 of 64 tokens"
    assert 0.5 < float(by_name["tail, draws included, `multinomial`"]["difference"].split()[1]) < 1.7
    assert all(row["ratio"] > 0 for row in rows)


@pytest.mark.parametrize(
    "arguments, message",
    [("--tokens 0", "--tokens must be at least 1"), ("--rounds 0", "--rounds must be at least 1")],
)
def test_bad_arguments(script, arguments, message, capsys):
    with pytest.raises(SystemExit):
        script.parse_args(arguments.split())
    assert message in capsys.readouterr().err
