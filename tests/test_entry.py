"""What a user sees of each public function from outside: profiles, logs, selection explained, import time."""

from __future__ import annotations

import ast
import inspect
import json
import logging
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

import flash_mla
from flash_mla import deepseek, indexer
from flash_mla.backends import ORDER, choose
from flash_mla.backends.cpu import engine
from flash_mla.errors import DeviceError, ShapeError
from flash_mla.plan import plan
from flash_mla.problem import FP8


class Call(NamedTuple):
    """A public function and a small call of it."""

    module: str
    function: Callable[..., Any]
    arguments: dict[str, Any]

    @property
    def name(self) -> str:
        return f"{self.module}.{self.function.__name__}"


def calls() -> list[Call]:
    torch.manual_seed(0)
    q, kv, rows = torch.randn(2, 4, 1, 64), torch.randn(2, 2, 2, 64, 64), torch.randn(100, 4, 64)
    table, lengths = torch.arange(2, dtype=torch.int32).repeat(2, 1), torch.tensor([70, 128], dtype=torch.int32)
    prompt = torch.randn(2, 4, 100, 64)
    pool, latent = torch.randn(4, 64, 2, 64), torch.randn(100, 1, 64)
    starts = torch.tensor([0, 40, 100], dtype=torch.int32)
    indices = torch.arange(64, dtype=torch.int32).expand(100, 1, 64)
    decode = {"q": q, "k_cache": kv, "v_cache": kv.clone(), "block_table": table, "seq_lens": lengths}
    dense = {"q": q.transpose(1, 2), "k_cache": pool, "block_table": table, "cache_seqlens": lengths, "head_dim_v": 64}
    eights = dense | {"q": dense["q"].to(FP8), "k_cache": pool.to(FP8)}
    varlen = {"cu_seqlens_qo": starts, "cu_seqlens_kv": starts, "max_seqlen_qo": 60, "max_seqlen_kv": 60}
    q8, keys8 = torch.randn(5, 4, 128).to(FP8), (torch.randn(100, 128).to(FP8), torch.rand(100))
    bounds = {"starts": torch.zeros(5, dtype=torch.int32), "ends": torch.full((5,), 100, dtype=torch.int32)}
    ragged = {"q": q8, "kv": keys8, "weights": torch.randn(5, 4), **bounds}
    index_pages = indexer.INDEX_ROWS.quantise(torch.randn(4, 64, 1, 128).bfloat16())
    paged = {
        "q": torch.randn(2, 1, 4, 128).to(FP8), "k_cache": index_pages, "weights": torch.randn(2, 1, 4),
        "context_lens": lengths, "block_table": table,
    }  # fmt: skip
    ours, theirs, index = "flash_mla", "flash_mla.deepseek", "flash_mla.indexer"
    return [
        Call(ours, flash_mla.flash_mla_with_kvcache, decode),
        Call(ours, flash_mla.flash_mla_prefill, {"q": prompt, "k": prompt, "v": prompt}),
        Call(ours, flash_mla.mha_fwd_kvcache, {
            "q": prompt[:, :2], "k_cache": kv, "v_cache": kv.clone(), "block_table": table, "k": prompt[:, 2:],
            "v": prompt[:, 2:],
        }),
        Call(ours, flash_mla.decode_over_pages, {
            "q": q, "k_pages": pool, "v_pages": pool, "block_table": table, "seq_lens": lengths,
        }),
        Call(theirs, deepseek.flash_mla_with_kvcache, dense),
        Call(theirs, deepseek.flash_mla_with_kvcache_fp8, eights),
        Call(theirs, deepseek.flash_mla_sparse_fwd, {"q": rows, "kv": latent, "indices": indices, "sm_scale": 0.1,
                                                     "d_v": 64}),
        Call(theirs, deepseek.flash_attn_varlen_func, {"q": rows, "k": rows, "v": rows, **varlen}),
        Call(theirs, deepseek.flash_attn_varlen_qkvpacked_func, {
            "qkv": torch.randn(100, 4, 192), "cu_seqlens": starts, "max_seqlen": 60, "head_dim_qk": 64,
        }),
        Call(theirs, deepseek.flash_attn_varlen_kvpacked_func, {
            "q": rows, "kv": torch.randn(100, 4, 128), **varlen, "head_dim_qk": 64,
        }),
        Call(index, indexer.mqa_logits, ragged),
        Call(index, indexer.prefill_indices, ragged | {"topk": 16}),
        Call(index, indexer.paged_mqa_logits, paged),
        Call(index, indexer.decode_indices, paged | {"topk": 16}),
        Call(index, indexer.topk_indices, {"scores": torch.randn(5, 100), "topk": 16}),
    ]  # fmt: skip


CALLS = calls()
each = pytest.mark.parametrize("call", CALLS, ids=lambda call: call.name)


def test_calls_are_every_function_that_selects() -> None:
    modules = {"flash_mla": flash_mla, "flash_mla.deepseek": deepseek, "flash_mla.indexer": indexer}
    takes = {
        f"{path}.{name}"
        for path, module in modules.items()
        for name in module.__all__
        if inspect.isfunction(getattr(module, name))
        and "backend" in inspect.signature(getattr(module, name)).parameters
    }
    assert takes == {call.name for call in CALLS}


# --- Profiles ---------------------------------------------------------------------------------------------------------


@each
def test_a_call_is_a_range_of_a_profile(call: Call) -> None:
    call.function(**call.arguments)
    with profile(activities=[ProfilerActivity.CPU]) as seen:
        call.function(**call.arguments)
    names = {event.name for event in seen.events()}
    assert call.name in names
    # the module whose kernels ran: CPU's, or the interpreter's
    assert any(name.startswith("flash_mla.backends.") for name in names), names


def test_a_profile_does_not_compile_a_graph_again() -> None:
    q = torch.randn(1, 2, 64, 16)
    graphs = []

    def backend(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable[..., Any]:
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    compiled = torch.compile(flash_mla.flash_mla_prefill, backend=backend, fullgraph=True)
    want = compiled(q, q, q)
    with profile(activities=[ProfilerActivity.CPU]) as seen:
        out = compiled(q, q, q)
    assert len(graphs) == 1
    assert torch.equal(out, want)
    assert "flash_mla::flash_mla_prefill" in {event.name for event in seen.events()}


# --- Selection --------------------------------------------------------------------------------------------------------


@each
@pytest.mark.parametrize("backend", [["cpu"], "gpu", 0, torch.device("cpu"), {"cpu": 1}], ids=str)
def test_what_is_no_backend_is_refused(call: Call, backend: object) -> None:
    with pytest.raises(DeviceError, match="There is no such backend"):
        call.function(**call.arguments, backend=backend)


@pytest.mark.parametrize("call", CALLS[:4], ids=lambda call: call.name)
def test_what_is_no_backend_is_refused_in_a_graph(call: Call) -> None:
    torch._dynamo.reset()
    compiled = torch.compile(lambda **x: call.function(**x, backend=["cpu"]), backend="eager")
    with pytest.raises(DeviceError, match="There is no such backend"):
        compiled(**call.arguments)


@each
def test_explanation_names_who_serves(call: Call) -> None:
    before = [x.clone() for x in call.arguments.values() if isinstance(x, Tensor)]
    told = flash_mla.explain(call.function, **call.arguments)
    chosen = plan(told.problem)
    assert told.backend == chosen.name
    assert told.kernels[chosen.name] == chosen.phase.__name__
    assert set(told.kernels) | set(told.refusals) == set(ORDER)
    for name, reason in told.refusals.items():
        assert choose(name, told.problem) == reason
    assert f"{call.function.__name__}: {chosen.name} serves it" in str(told)
    after = [x for x in call.arguments.values() if isinstance(x, Tensor)]
    assert all(torch.equal(a.view(torch.uint8), b.view(torch.uint8)) for a, b in zip(before, after, strict=True))


def test_explanation_of_one_backend_and_of_no_work() -> None:
    call = CALLS[0]
    told = flash_mla.explain(call.function, **call.arguments, backend="hopper")
    assert told.backend is None
    assert list(told.refusals) == ["hopper"]
    assert "no backend serves it" in str(told)
    none = flash_mla.explain(flash_mla.flash_mla_prefill, *(torch.empty(1, 2, 0, 16) for _ in range(3)))
    assert none.backend == "empty"
    assert "no work" in str(none)


def test_explanation_refuses_what_the_call_refuses() -> None:
    call = CALLS[0]
    with pytest.raises(ShapeError):
        flash_mla.explain(call.function, **(call.arguments | {"q": torch.randn(2, 4, 64)}))
    with pytest.raises(DeviceError, match="There is no such backend"):
        flash_mla.explain(call.function, **call.arguments, backend="gpu")
    for function in (flash_mla.get_mla_metadata, "flash_mla_with_kvcache", print):
        with pytest.raises(ShapeError, match="Nothing is selected"):
            flash_mla.explain(function, *call.arguments.values())


# --- Logs -------------------------------------------------------------------------------------------------------------


def test_selection_and_fallback_are_logged(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    caplog.set_level(logging.DEBUG, "flash_mla")
    call = CALLS[0]
    plan.cache_clear()
    call.function(**call.arguments)
    call.function(**call.arguments)
    (selection,) = [record for record in caplog.records if "serves DecodeProblem" in record.message]
    assert selection.levelno == logging.DEBUG
    assert {record.name for record in caplog.records} == {"flash_mla"}

    caplog.clear()
    monkeypatch.setattr(engine, "lacking", lambda: "llvmlite is hidden by a test")
    engine.missing.cache_clear()
    try:
        engine.missing()
        engine.missing()
    finally:
        engine.missing.cache_clear()
    assert caplog.messages == ["the CPU backend runs torch's ops: llvmlite is hidden by a test"]
    assert caplog.records[0].levelno == logging.INFO


def test_nothing_prints_but_the_command_line() -> None:
    package = Path(flash_mla.__file__).parent
    quiet = [path for path in package.rglob("*.py") if path.name not in ("cli.py", "demo.py")]
    names = (node for path in quiet for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Name))
    assert "print" not in {node.id for node in names}


# --- Import -----------------------------------------------------------------------------------------------------------

HEAVY = ("torch._dynamo", "triton", "cutlass", "llvmlite", "transformers", "matplotlib", "rich", "typer")

IMPORT = f"""
import json, sys, time, torch
before, start = set(sys.modules), time.process_time()
import flash_mla
seconds = time.process_time() - start
print(json.dumps([seconds, [name for name in {HEAVY} if name in sys.modules and name not in before]]))
"""


def test_import_adds_little_to_torch() -> None:
    done = subprocess.run([sys.executable, "-c", IMPORT], capture_output=True, text=True, check=True)
    seconds, heavy = json.loads(done.stdout)
    assert heavy == []
    assert seconds < 0.3, "CPU seconds of `import flash_mla` after `import torch`"
