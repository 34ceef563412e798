"""Every public callable, every argument in turn, of a kind that it does not take: our error, or a legal call; nothing
written by a call that raises.

The callables are found by introspection; `CALLS` has a right call of each, and one that it lacks fails a test.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterator
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

import flash_mla
from flash_mla import (
    BlockSparseLayout,
    DeviceError,
    FlashMLAError,
    PagedKVCache,
    ShapeError,
    decode_over_pages,
    deepseek,
    distributed,
    explain,
    flash_mla_prefill,
    flash_mla_with_kvcache,
    get_mla_metadata,
    indexer,
    merge,
    mha_fwd_kvcache,
    mla,
    quant,
)
from flash_mla.problem import FP8
from flash_mla.testing import DecodeCase, MhaCase, PrefillCase, storage_bytes

BF16 = torch.bfloat16


# --- What is public ---------------------------------------------------------------------------------------------------

MODULES = (flash_mla, deepseek, indexer, merge, mla, quant, distributed)
RESULTS = {"Explanation", "MLAMetadata", "DecodeStep", "FlashMLASchedMeta", "Parts"}
"""Classes that only our functions make."""
INSIDE = {"check_divisor", "decode_e4m3", "finite_abs", "gather_rows", "mark_scaled", "needs_descale"}
"""Of `quant`: what the library shares."""


def names_of(module: ModuleType) -> Iterator[str]:
    """A module's public names; without `__all__`, those that it defines."""
    own = (name for name, x in vars(module).items() if getattr(x, "__module__", "") == module.__name__)
    yield from getattr(module, "__all__", None) or (name for name in own if not name.startswith("_"))


def public() -> set[str]:
    """module.function, module.Class and module.Class.method of all that users may call."""
    found = set()
    for module in MODULES:
        for name in names_of(module):
            value, path = getattr(module, name), f"{module.__name__.removeprefix('flash_mla.')}.{name}"
            if not callable(value) or name in RESULTS | INSIDE:
                continue
            if inspect.isclass(value) and issubclass(value, Warning | Exception):
                continue
            found.add(path)
            if inspect.isclass(value):
                members = {n: inspect.getattr_static(value, n) for n in vars(value) if not n.startswith("_")}
                found |= {f"{path}.{n}" for n, x in members.items() if callable(x) or isinstance(x, classmethod)}
    return found


# --- A right call of each ---------------------------------------------------------------------------------------------


def ints(*shape: int) -> torch.Tensor:
    return torch.zeros(shape, dtype=torch.int32)


def e4m3(*shape: int) -> torch.Tensor:
    return torch.randn(shape).to(FP8)


def of(case: Any, **more: Any) -> dict[str, Any]:
    return case.call().arguments | more


def drop_in(dtype: torch.dtype) -> dict[str, Any]:
    return {
        "q": torch.randn(2, 1, 4, 64).to(dtype), "k_cache": torch.randn(6, 64, 1, 64).to(dtype),
        "block_table": ints(2, 3), "cache_seqlens": ints(2) + 3, "head_dim_v": 64, "softmax_scale": 0.1,
    }  # fmt: skip


def sequences(**more: Any) -> dict[str, Any]:
    starts = torch.tensor([0, 3, 7], dtype=torch.int32)
    rows = [torch.randn(7, heads, 64) for heads in (4, 2, 2)]
    names = ("q", "k", "v", "cu_seqlens_qo", "cu_seqlens_kv", "max_seqlen_qo", "max_seqlen_kv", "softmax_scale")
    return dict(zip(names, (*rows, starts, starts, 4, 4, 0.1), strict=True)) | more


def scores() -> dict[str, Any]:
    return {
        "q": e4m3(5, 4, 128), "kv": (e4m3(9, 128), torch.ones(9)), "weights": torch.ones(5, 4), "starts": ints(5),
        "ends": ints(5) + 9,
    }  # fmt: skip


def paged_scores() -> dict[str, Any]:
    return {
        "q": e4m3(2, 1, 4, 128), "k_cache": indexer.INDEX_ROWS.empty(3).zero_(), "weights": torch.ones(2, 4),
        "context_lens": ints(2) + 5, "block_table": ints(2, 3), "max_context_len": 192,
    }  # fmt: skip


def pages(**storage: Any) -> PagedKVCache:
    """Three requests of 70, 3 and no tokens."""
    cache = PagedKVCache(3, 2, 16, max_seq_len=192, dtype=torch.float32, **storage)
    cache.append(torch.randn(3, 2, 70, 16), torch.randn(3, 2, 70, 16), [70, 3, 0])
    return cache


def rows(*shape: int) -> torch.Tensor:
    return torch.randn(shape).to(BF16)


ROWS = quant.FP8_DS_MLA
SLOTS = torch.tensor([3, 70], dtype=torch.int32)
ALONE = distributed.ShardedAttention(SimpleNamespace(mesh_dim_names=()))  # type: ignore[arg-type]


def projection() -> mla.MLAProjection:
    return mla.MLAProjection.from_weight(torch.randn(2 * (8 + 16), 32), 2, nope=8, rope=4)


def sharded(**more: Any) -> dict[str, Any]:
    x = of(DecodeCase("", (70, 3), Hq=4, Hk=2))
    shapes = {"q_shape": x["q"].shape, "kv_shape": x["k_cache"].shape}
    step = ALONE.step(**shapes, block_table=x["block_table"], seq_lens=x["seq_lens"])
    names = ("q", "k_cache", "v_cache", "block_table")
    return {name: x[name] for name in names} | {"step": step} | more


def own_blocks() -> distributed.ContextCache:
    cache = distributed.ContextCache(PagedKVCache(3, 2, 16, max_seq_len=192, dtype=torch.float32), ALONE)
    cache.append(torch.randn(3, 2, 70, 16), torch.randn(3, 2, 70, 16), [70, 3, 0])
    return cache


Call = tuple[Callable[..., Any], dict[str, Any]]
CALLS: dict[str, Callable[[], Call]] = {
    "flash_mla.flash_mla_with_kvcache": lambda: (flash_mla_with_kvcache, of(DecodeCase("", (70, 3), sink=True))),
    "flash_mla.flash_mla_prefill": lambda: (flash_mla_prefill, of(PrefillCase("", 70, sink=True))),
    "flash_mla.mha_fwd_kvcache": lambda: (mha_fwd_kvcache, of(MhaCase("", 70, starts=(64, 3)))),
    "flash_mla.get_mla_metadata": lambda: (
        get_mla_metadata,
        {
            "q_shape": (2, 4, 1, 64), "kv_shape": (2, 1, 3, 64, 64), "block_table": ints(2, 3), "seq_lens": ints(2),
            "v_head_dim": 64,
        },
    ),
    "flash_mla.decode_over_pages": lambda: (
        decode_over_pages,
        {
            "q": torch.randn(2, 4, 1, 64), "k_pages": torch.randn(6, 16, 1, 64), "v_pages": torch.randn(6, 16, 1, 64),
            "block_table": ints(2, 3), "seq_lens": ints(2) + 3,
        },
    ),
    "flash_mla.explain": lambda: (
        lambda function=flash_mla_with_kvcache, **x: explain(function, **x), of(DecodeCase("", (70, 3))),
    ),
    "flash_mla.PagedKVCache": lambda: (
        PagedKVCache, {"batch": 2, "num_kv_heads": 2, "head_dim": 16, "max_seq_len": 100},
    ),
    "flash_mla.PagedKVCache.mla": lambda: (
        lambda batch=2, head_dim=32, v_head_dim=16, max_seq_len=100: PagedKVCache.mla(
            batch, head_dim, v_head_dim, max_seq_len=max_seq_len
        ),
        {},
    ),
    "flash_mla.PagedKVCache.append": lambda: (
        pages().append,
        {"k": torch.randn(2, 2, 3, 16), "v": torch.randn(2, 2, 3, 16), "num_tokens": [3, 1], "requests": [0, 2]},
    ),
    "flash_mla.PagedKVCache.extend": lambda: (pages().extend, {"num_tokens": 5, "requests": [0, 2]}),
    "flash_mla.PagedKVCache.decode": lambda: (pages().decode, {"q": torch.randn(3, 4, 1, 16)}),
    "flash_mla.PagedKVCache.fork": lambda: (pages(pool_blocks=9).fork, {"source": 0, "target": 2}),
    "flash_mla.PagedKVCache.reorder": lambda: (pages(pool_blocks=9).reorder, {"index": [1, 1, 0]}),
    "flash_mla.PagedKVCache.truncate": lambda: (pages().truncate, {"lengths": [60], "requests": [0]}),
    "flash_mla.PagedKVCache.free": lambda: (pages().free, {"requests": [1]}),
    "flash_mla.PagedKVCache.clear": lambda: (pages().clear, {}),
    "flash_mla.PagedKVCache.grow": lambda: (pages().grow, {"blocks": 1}),
    "flash_mla.BlockSparseLayout": lambda: (BlockSparseLayout, {"blocks": torch.ones(1, 1, 2, 2, dtype=torch.bool)}),
    "flash_mla.BlockSparseLayout.causal": lambda: (BlockSparseLayout.causal, {"P": 100}),
    "flash_mla.BlockSparseLayout.sliding_window": lambda: (BlockSparseLayout.sliding_window, {"P": 100, "window": 64}),
    "flash_mla.BlockSparseLayout.local_global": lambda: (
        BlockSparseLayout.local_global, {"P": 100, "window": 64, "global_tokens": 4},
    ),
    "flash_mla.BlockSparseLayout.from_dense_mask": lambda: (
        BlockSparseLayout.from_dense_mask, {"mask": torch.ones(70, 70, dtype=torch.bool)},
    ),
    "flash_mla.BlockSparseLayout.from_block_mask": lambda: (
        BlockSparseLayout.from_block_mask, {"block_mask": block_mask()},
    ),
    "flash_mla.BlockSparseLayout.to": lambda: (BlockSparseLayout.causal(100).to, {"device": "cpu"}),
    "deepseek.get_mla_metadata": lambda: (deepseek.get_mla_metadata, {}),
    "deepseek.flash_mla_with_kvcache": lambda: (deepseek.flash_mla_with_kvcache, drop_in(BF16)),
    "deepseek.flash_mla_with_kvcache_fp8": lambda: (
        deepseek.flash_mla_with_kvcache_fp8, drop_in(FP8) | {"descale_q": torch.ones(1), "descale_k": torch.ones(1)},
    ),
    "deepseek.flash_mla_sparse_fwd": lambda: (
        deepseek.flash_mla_sparse_fwd,
        {"q": torch.randn(5, 4, 576), "kv": torch.randn(9, 1, 576), "indices": ints(5, 1, 8), "sm_scale": 0.1},
    ),
    "deepseek.flash_attn_varlen_func": lambda: (deepseek.flash_attn_varlen_func, sequences()),
    "deepseek.flash_attn_varlen_qkvpacked_func": lambda: (
        deepseek.flash_attn_varlen_qkvpacked_func,
        {
            "qkv": torch.randn(7, 2, 48), "cu_seqlens": torch.tensor([0, 3, 7], dtype=torch.int32), "max_seqlen": 4,
            "head_dim_qk": 16,
        },
    ),
    "deepseek.flash_attn_varlen_kvpacked_func": lambda: (
        deepseek.flash_attn_varlen_kvpacked_func,
        {name: x for name, x in sequences().items() if name not in "kv"}
        | {"kv": torch.randn(7, 2, 128), "head_dim_qk": 64},
    ),
    "deepseek.pool_indices": lambda: (
        deepseek.pool_indices, {"positions": ints(2, 1, 8), "block_table": ints(2, 3), "page": 64},
    ),
    "deepseek.ragged_indices": lambda: (
        deepseek.ragged_indices,
        {"positions": ints(7, 8), **dict.fromkeys(("cu_seqlens_q", "cu_seqlens_kv"), torch.tensor([0, 3, 7]))},
    ),
    "indexer.mqa_logits": lambda: (indexer.mqa_logits, scores()),
    "indexer.prefill_indices": lambda: (indexer.prefill_indices, scores() | {"topk": 4}),
    "indexer.paged_mqa_logits": lambda: (indexer.paged_mqa_logits, paged_scores()),
    "indexer.decode_indices": lambda: (indexer.decode_indices, paged_scores() | {"topk": 4}),
    "indexer.topk_indices": lambda: (
        indexer.topk_indices,
        {"scores": torch.randn(4, 50), "topk": 5, "starts": ints(4), "block_table": ints(2, 3), "page": 64},
    ),
    "merge.merge": lambda: (merge.merge, {"outs": torch.randn(3, 2, 16), "lses": torch.randn(3, 2)}),
    "merge.apply_sink": lambda: (
        merge.apply_sink, {"out": torch.randn(2, 4, 16), "lse": torch.randn(2, 4), "attn_sink": torch.zeros(4)},
    ),
    "mla.MLAProjection": lambda: (
        mla.MLAProjection, {"w_k": torch.randn(2, 8, 32), "w_v": torch.randn(2, 16, 32), "rope": 4},
    ),
    "mla.MLAProjection.from_weight": lambda: (
        mla.MLAProjection.from_weight, {"weight": torch.randn(48, 32), "num_heads": 2, "nope": 8, "rope": 4},
    ),
    "mla.MLAProjection.expand": lambda: (projection().expand, {"rows": torch.randn(2, 1, 5, 36)}),
    "mla.MLAProjection.absorb": lambda: (projection().absorb, {"q": torch.randn(2, 2, 3, 12)}),
    "mla.MLAProjection.project": lambda: (projection().project, {"out": torch.randn(2, 2, 3, 32)}),
    "quant.quantise": lambda: (quant.quantise, {"x": torch.randn(2, 2, 5, 16), "descale": 0.5}),
    "quant.dequantise": lambda: (quant.dequantise, {"x": e4m3(2, 2, 5, 16), "descale": 0.5}),
    "quant.RowFormat": lambda: (quant.RowFormat, {"name": "own", "quantised": 64, "rope": 0}),
    "quant.RowFormat.page_bytes": lambda: (ROWS.page_bytes, {"page": 64}),
    "quant.RowFormat.empty": lambda: (ROWS.empty, {"num_blocks": 2}),
    "quant.RowFormat.encode": lambda: (ROWS.encode, {"rows": rows(2, 64, 1, 576)}),
    "quant.RowFormat.quantise": lambda: (ROWS.quantise, {"rows": rows(2, 64, 1, 576)}),
    "quant.RowFormat.dequantise": lambda: (ROWS.dequantise, {"pages": ROWS.empty(2).zero_()}),
    "quant.RowFormat.append": lambda: (
        ROWS.append,
        {"pages": ROWS.empty(2).zero_(), "slots": SLOTS, "k_nope": rows(2, 512), "k_rope": rows(2, 64)},
    ),
    "quant.RowFormat.read": lambda: (ROWS.read, {"pages": ROWS.empty(2).zero_(), "slots": SLOTS}),
    "quant.RowFormat.check": lambda: (ROWS.check, {"pages": ROWS.empty(2).zero_()}),
    "quant.RowFormat.parts": lambda: (ROWS.parts, {"pages": ROWS.empty(2).zero_()}),
    "distributed.ShardedAttention": lambda: (
        distributed.ShardedAttention, {"mesh": SimpleNamespace(mesh_dim_names=())},
    ),
    "distributed.ShardedAttention.head_slices": lambda: (ALONE.head_slices, {"Hq": 8, "Hk": 2}),
    "distributed.ShardedAttention.step": lambda: (
        ALONE.step,
        {
            "q_shape": (2, 4, 2, 64), "kv_shape": (2, 2, 3, 64, 64), "block_table": ints(2, 3), "seq_lens": ints(2) + 5,
            "tail_mask": torch.ones(1, 1, 2, 2, dtype=torch.bool), "v_head_dim": 64,
        },
    ),
    "distributed.ShardedAttention.decode": lambda: (ALONE.decode, sharded()),
    "distributed.ShardedAttention.gather_heads": lambda: (ALONE.gather_heads, {"x": torch.randn(2, 4, 1, 64)}),
    "distributed.ShardedAttention.shard_prompt": lambda: (
        ALONE.shard_prompt, {"x": torch.randn(2, 4, 70, 8), "dim": 2},
    ),
    "distributed.ShardedAttention.gather_prompt": lambda: (
        lambda rows, num_tokens: ALONE.gather_prompt(rows, num_tokens=num_tokens),
        {"rows": torch.randn(2, 4, 70, 8), "num_tokens": 70},
    ),
    "distributed.ShardedAttention.prefill": lambda: (
        ALONE.prefill, {name: x for name, x in of(PrefillCase("", 70)).items() if name in ("q", "k", "v")},
    ),
    "distributed.ContextCache": lambda: (
        distributed.ContextCache, {"pages": PagedKVCache(2, 2, 16, max_seq_len=64), "attention": ALONE},
    ),
    "distributed.ContextCache.append": lambda: (
        own_blocks().append,
        {"k": torch.randn(2, 2, 3, 16), "v": torch.randn(2, 2, 3, 16), "num_tokens": [3, 1], "requests": [0, 2]},
    ),
    "distributed.ContextCache.truncate": lambda: (own_blocks().truncate, {"lengths": [60], "requests": [0]}),
    "distributed.ContextCache.fork": lambda: (own_blocks().fork, {"source": 0, "target": 2}),
    "distributed.ContextCache.free": lambda: (own_blocks().free, {"requests": [1]}),
    "distributed.head_slices": lambda: (distributed.head_slices, {"Hq": 8, "Hk": 2, "rank": 1, "size": 2}),
    "distributed.local_cache": lambda: (
        distributed.local_cache,
        {"cache": torch.randn(2, 1, 3, 64, 8), "block_table": ints(2, 3), "rank": 0, "size": 2},
    ),
    "distributed.local_lengths": lambda: (
        distributed.local_lengths, {"seq_lens": torch.tensor([70, 3]), "rank": 0, "size": 2},
    ),
    "distributed.local_mask": lambda: (
        distributed.local_mask,
        {"mask": torch.ones(1, 1, 1, 200, dtype=torch.bool), "keys": 64, "rank": 0, "size": 2},
    ),
    "distributed.local_positions": lambda: (distributed.local_positions, {"tokens": 70, "rank": 0, "size": 2}),
    "distributed.local_table": lambda: (distributed.local_table, {"block_table": ints(2, 3), "rank": 0, "size": 2}),
    "distributed.prompt_chunks": lambda: (distributed.prompt_chunks, {"num_tokens": 300, "rank": 0, "size": 2}),
}  # fmt: skip


def block_mask() -> Any:
    from torch.nn.attention.flex_attention import create_block_mask

    return create_block_mask(lambda b, h, q, k: q >= k, 1, 1, 128, 128, device="cpu", BLOCK_SIZE=64)


def test_every_public_callable_has_a_right_call() -> None:
    assert public() == CALLS.keys()
    for make in CALLS.values():
        function, arguments = make()
        function(**arguments)


# --- Wrong kinds ------------------------------------------------------------------------------------------------------

JUNK: dict[str, Any] = {
    "none": None, "text": "abc", "list": [1, 2], "ragged list": [[1], 2], "dict": {"a": 1}, "type": int, "bool": True,
    "negative": -1, "zero": 0, "number": 10**30, "complex": 1j, "nan": math.nan, "inf": math.inf, "float": 1.5,
    "object": object(), "numpy": np.zeros((2, 3)), "bytes": b"abc",
}  # fmt: skip


def junk_tensors(right: object) -> dict[str, torch.Tensor]:
    """Tensors that are none of the right argument's kind: shapes and layouts; beside a tensor, its dtype and device."""
    made = {
        "0-d": torch.tensor(1.0), "0-d int": torch.tensor(3), "empty": torch.empty(0),
        "5-d": torch.zeros(1, 1, 1, 1, 1), "sparse": torch.zeros(2, 3).to_sparse(),
        "complex tensor": torch.ones(2, 3, dtype=torch.complex64),
    }  # fmt: skip
    if isinstance(right, torch.Tensor):
        shape = right.shape
        made |= {str(t): torch.ones(shape).to(t) for t in (torch.bool, torch.int8, torch.int64, torch.float64, FP8)}
        made |= {
            "meta": right.to("meta"), "flat": torch.zeros(right.numel(), dtype=right.dtype), "complex of its shape":
            torch.ones(shape, dtype=torch.complex64), "sparse of its shape": torch.zeros(shape).to_sparse(),
        }  # fmt: skip
        if shape:
            made["a row less"] = torch.ones((shape[0] + 1, *shape[1:]), dtype=torch.float32).to(right.dtype)
            made["a column more"] = torch.ones((*shape[:-1], shape[-1] + 1), dtype=torch.float32).to(right.dtype)
    return made


def watched(function: Callable[..., Any], arguments: dict[str, Any]) -> list[torch.Tensor]:
    """The tensors that a refused call must leave alone."""
    owner = getattr(function, "__self__", None)
    owned = [] if owner is None or inspect.isclass(owner) else [*getattr(owner, "__dict__", {}).values()]
    if isinstance(owner, distributed.ContextCache):
        owned += [*vars(owner.pages).values()]
    flat = [y for x in (*owned, *arguments.values()) for y in (x if isinstance(x, tuple) else (x,))]
    return [x for x in flat if isinstance(x, torch.Tensor) and x.layout == torch.strided and x.device.type != "meta"]


def faults(name: str) -> Iterator[str]:
    """What a call of the public callable does wrong with each argument in turn."""
    function, arguments = CALLS[name]()
    held = [(x, storage_bytes(x)) for x in watched(function, arguments)]
    parameters = inspect.signature(function).parameters.values()
    for key in [x.name for x in parameters if x.kind not in (x.VAR_POSITIONAL, x.VAR_KEYWORD)]:
        for kind, junk in (JUNK | junk_tensors(arguments.get(key))).items():
            try:
                function(**{**arguments, key: junk})
            except FlashMLAError:
                if any(not torch.equal(before, storage_bytes(x)) for x, before in held):
                    yield f"{key} = {kind}: written, then refused"
            except Exception as error:
                yield f"{key} = {kind}: raw {error!r}"[:300]
            else:  # a legal call, which may have changed what it was given
                function, arguments = CALLS[name]()
                held = [(x, storage_bytes(x)) for x in watched(function, arguments)]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", CALLS)
def test_a_wrong_kind_is_our_error_or_legal(name: str) -> None:
    found = [*faults(name)]
    assert not found, "\n".join(found)


COMPILED = ("flash_mla_with_kvcache", "flash_mla_prefill", "mha_fwd_kvcache", "decode_over_pages")


@pytest.mark.parametrize("name", COMPILED)
def test_a_wrong_kind_is_our_error_in_a_compiled_call_too(name: str) -> None:
    """torch's own errors of custom ops would name no argument."""
    function, arguments = CALLS[f"flash_mla.{name}"]()
    for key, right in arguments.items():
        if key in ("k_descale", "v_descale"):  # as q_descale, whose calls trace for seconds
            continue
        for junk in ([1, 2], torch.tensor(1.0) if isinstance(right, torch.Tensor) else "abc"):
            torch.compiler.reset()
            with pytest.raises(FlashMLAError, match=rf"\b{key}\b"):
                torch.compile(function, backend="eager")(**{**arguments, key: junk})


def test_a_flag_is_refused_before_the_cache_is_written() -> None:
    arguments = MhaCase("", 70, starts=(64, 3)).call().arguments
    before = storage_bytes(arguments["k_cache"])
    with pytest.raises(ShapeError, match="return_lse"):
        mha_fwd_kvcache(**arguments, return_lse="yes")
    assert torch.equal(before, storage_bytes(arguments["k_cache"]))


def test_bytes_are_no_name_of_a_backend() -> None:
    """A custom op takes them for a string; behind a call in eager mode, they are refused all the same."""
    q, k, v = (torch.randn(1, 2, 8, 16, requires_grad=True) for _ in range(3))
    starts = torch.tensor([0, 8], dtype=torch.int32)
    rows = q[0].transpose(0, 1)
    for call in (
        lambda: flash_mla_prefill(q, k, v, backend=b"cpu"),
        lambda: deepseek.flash_attn_varlen_func(rows, rows, rows, starts, starts, 8, 8, backend=b"cpu"),
    ):
        with pytest.raises(DeviceError, match="backend=b'cpu'"):
            call()
