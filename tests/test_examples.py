"""The programs of examples/ run, and what they print is so."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import cuda_graph
import decode_loop
import deepseek_dropin
import mla_module
import pytest
import torch

EXAMPLES = Path(__file__).parent.parent / "examples"


def test_the_decode_loop_gives_the_tokens_of_attention_without_a_cache(capsys: pytest.CaptureFixture[str]) -> None:
    assert decode_loop.main()
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 4
    tokens = [eval(line.split("->")[1]) for line in lines[:3]]
    assert [len(x) for x in tokens] == [12, 5, 8]
    assert len({token for x in tokens for token in x}) > 10, "a model that repeats itself tests little"


@pytest.mark.parametrize(("dtype", "most"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
def test_the_module_decodes_what_one_call_gives(dtype: torch.dtype, most: float) -> None:
    assert mla_module.main(dtype) < most


def test_the_module_moves_and_keeps_no_cache() -> None:
    layer = mla_module.LatentAttention(dim=32, heads=2, nope=16, rope=16, v=16, latent=32)
    kept = layer.state_dict()
    with torch.no_grad():
        layer(torch.randn(1, 3, 32), layer.new_cache(1, 64))
    assert layer.state_dict().keys() == kept.keys() == {f"{name}.weight" for name, _ in layer.named_children()}
    layer.double().to(torch.bfloat16)
    cache = layer.new_cache(1, 64)
    assert cache.k_cache.dtype == torch.bfloat16
    other = mla_module.LatentAttention(dim=32, heads=2, nope=16, rope=16, v=16, latent=32).to(torch.bfloat16)
    other.load_state_dict(layer.state_dict())
    x = torch.randn(1, 3, 32, dtype=torch.bfloat16)
    with torch.no_grad():
        assert torch.equal(layer(x, cache), other(x, other.new_cache(1, 64)))


def test_the_graph_is_right_or_says_that_there_is_none(capsys: pytest.CaptureFixture[str]) -> None:
    assert cuda_graph.main() == 8
    said = capsys.readouterr().out
    assert ("nothing was captured" in said) != torch.cuda.is_available()
    assert "(68, 15, 39, 66)" in said


def test_the_drop_in_is_within_the_budget() -> None:
    errors = deepseek_dropin.main()
    assert errors["dense"] < 1.6e-2
    assert errors["sparse"] < 1.6e-2


def test_an_example_is_a_program() -> None:
    """Run as its docstring says, from another folder."""
    done = subprocess.run(
        [sys.executable, EXAMPLES / "deepseek_dropin.py"],
        capture_output=True,
        text=True,
        cwd=EXAMPLES.parent,
        env={"PYTHONPATH": str(EXAMPLES.parent), "PATH": "", "HOME": str(Path.home())},
    )
    assert done.returncode == 0, done.stderr
    assert "sparse decode: error" in done.stdout


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.py")), ids=lambda path: path.stem)
def test_every_example_says_how_it_is_run(path: Path) -> None:
    assert f"    python examples/{path.name}" in path.read_text()
