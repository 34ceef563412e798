"""Tensors in; a problem, or one precise error.

Every public function calls one function of this module first. Nothing here writes memory, and only `check_values`
reads the values of a tensor.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

import torch
from torch import Tensor

from flash_mla.errors import (
    BlockCountError,
    BlockTableError,
    DeviceError,
    DTypeError,
    HeadGroupingError,
    LayoutError,
    MaskShapeError,
    SequenceLengthError,
    ShapeError,
)
from flash_mla.layout import BlockSparseLayout
from flash_mla.problem import BLOCK, DTYPES, FP8, DecodeProblem, MaskKind, PrefillProblem

INDEX_DTYPES = (torch.int32, torch.int64)
Descales = tuple[float | Tensor | None, float | Tensor | None, float | Tensor | None]
DEEPSEEK_NAMES = {
    "cache_seqlens",
    "head_dim_v",
    "indices",
    "is_fp8_kvcache",
    "num_heads_k",
    "num_q_tokens_per_head_k",
    "num_splits",
    "tile_scheduler_metadata",
}
DEEPSEEK = "Call flash_mla.deepseek, which has DeepSeek's names and argument order"


@dataclass(frozen=True)
class MLAMetadata:
    """What `get_mla_metadata` has checked: shapes, and (unless `max_seq_len` is None) values.

    Attributes:
        B, Hq, Hk, S_q, D, Nblk: as in the reference's shape table; `Dv` is None when v_head_dim was not given.
        table_blocks: blocks in a row of block_table.
        max_seq_len: the largest sequence length in tokens when it was checked; None with check_values=False.
    """

    B: int
    Hq: int
    Hk: int
    S_q: int
    D: int
    Dv: int | None
    Nblk: int
    table_blocks: int
    max_seq_len: int | None

    @property
    def ratio(self) -> int:
        """Query heads that share one KV head, Hq / Hk."""
        return self.Hq // self.Hk

    @property
    def q_shape(self) -> tuple[int, int, int, int]:
        """[B, Hq, S_q, D]."""
        return (self.B, self.Hq, self.S_q, self.D)

    @property
    def kv_shape(self) -> tuple[int, int, int, int, int]:
        """[B, Hk, Nblk, 64, D]."""
        return (self.B, self.Hk, self.Nblk, BLOCK, self.D)


# --- Single rules -----------------------------------------------------------------------------------------------------


def shape_of(name: str, shape: Sequence[int]) -> str:
    return f"{name} {list(shape)}"


def named(**tensors: Tensor) -> str:
    return ", ".join(shape_of(name, tensor.shape) for name, tensor in tensors.items())


def check_rank(name: str, shape: Sequence[int], rank: int, layout: str) -> None:
    if len(shape) != rank:
        raise ShapeError(
            f"{shape_of(name, shape)}, which has {len(shape)} dims",
            f"{name} {layout}",
            f"`{name}` does not have {rank} dims",
        )


def check_grouping(Hq: int, Hk: int) -> None:
    if Hq < 1 or Hk < 1 or Hq % Hk:
        raise HeadGroupingError(f"Hq = {Hq} query heads and Hk = {Hk} KV heads", "Hq % Hk == 0")


def check_block_size(name: str, shape: Sequence[int]) -> None:
    if shape[3] != BLOCK:
        raise BlockCountError(
            f"{shape_of(name, shape)}: blocks of {shape[3]} tokens",
            f"blocks of {BLOCK} tokens: {name} [B, Hk, Nblk, {BLOCK}, D]",
            f"Block size is fixed at {BLOCK}",
            f"Re-pack the cache into blocks of {BLOCK} tokens",
        )


def check_tensor(name: str, value: object) -> None:
    if not isinstance(value, Tensor):
        raise ShapeError(
            f"{name} is a {type(value).__name__}",
            f"{name} is a torch.Tensor",
            f"`{name}` is not a tensor",
            "Pass tensors in the reference's argument order; see docs/contract.md",
        )


def check_on(device: torch.device, **tensors: Tensor | None) -> None:
    """Every argument that is given is a tensor on q's device."""
    for name, tensor in tensors.items():
        if tensor is None:
            continue
        check_tensor(name, tensor)
        if tensor.device != device:
            raise DeviceError(f"{name} on {tensor.device}, q on {device}", f"every tensor on {device}")


def check_dtypes(**tensors: Tensor) -> torch.dtype:
    dtype = next(iter(tensors.values())).dtype
    if dtype in DTYPES and all(tensor.dtype == dtype for tensor in tensors.values()):
        return dtype
    given = ", ".join(f"{name} {tensor.dtype}" for name, tensor in tensors.items())
    if len({tensor.dtype for tensor in tensors.values()}) > 1:
        raise DTypeError(given, "the same dtype for all of them")
    raise DTypeError(
        given,
        "float8_e4m3fn, bfloat16, float16 or float32",
        f"{dtype} is not a dtype that attention runs in",
    )


def check_index(name: str, tensor: Tensor, shape: Sequence[int], layout: str) -> None:
    """An integer tensor of exactly that shape; a -1 in `shape` admits any size."""
    fits = tensor.dim() == len(shape) and all(
        want in (-1, have) for want, have in zip(shape, tensor.shape, strict=True)
    )
    if not fits:
        raise ShapeError(named(**{name: tensor}), f"{name} {layout} = {list(shape)}", f"`{name}` has the wrong shape")
    if tensor.dtype not in INDEX_DTYPES:
        raise DTypeError(
            f"{name} {tensor.dtype}",
            "int32 or int64",
            f"`{name}` is not an integer tensor",
            f"Call {name}.to(torch.int32)",
        )


def check_table(block_table: Tensor, B: int) -> None:
    check_index("block_table", block_table, (B, -1), "[B, Nblk]")
    if not block_table.is_contiguous():
        raise LayoutError(
            f"block_table {list(block_table.shape)} with strides {block_table.stride()}",
            "block_table contiguous",
            "block_table is not contiguous",
        )


def check_monotonic(name: str, shape: Sequence[int], strides: Sequence[int], dims: str) -> None:
    """Strides do not grow from left to right over dims of size > 1; a broadcast dim (stride 0) may stand anywhere."""
    last, last_dim = math.inf, ""
    for dim, size, stride in zip(dims.split(), shape, strides, strict=True):
        if size <= 1 or stride == 0:
            continue
        if stride > last:
            raise LayoutError(
                f"{shape_of(name, shape)} with strides {tuple(strides)}",
                f"strides that do not grow from left to right over the dims {dims}",
                f"`{name}` has non-monotonic strides: dim {dim} has stride {stride}, more than {last_dim}'s {last}",
                f"Call {name}.contiguous() before the call",
            )
        last, last_dim = stride, dim


def check_last_dim(name: str, tensor: Tensor) -> None:
    if tensor.stride(-1) != 1 and tensor.shape[-1] > 1:
        raise LayoutError(
            f"{named(**{name: tensor})} with strides {tensor.stride()}",
            "stride 1 on the last dim (D)",
            f"`{name}` is not contiguous on D",
        )


def check_page_view(name: str, cache: Tensor) -> None:
    """Blocks of 64 rows of D, each block one slab in memory; the leading dims strided but monotonic."""
    if cache.stride()[-2:] != (cache.shape[-1], 1):
        raise LayoutError(
            f"{named(**{name: cache})} with strides {cache.stride()}",
            f"each block a contiguous slab of 64 rows x D: strides (..., {cache.shape[-1]}, 1)",
            f"`{name}` is not contiguous on D/Blk",
        )
    check_monotonic(name, cache.shape[:3], cache.stride()[:3], "B Hk Nblk")


def is_alias(k_cache: Tensor, v_cache: Tensor) -> bool:
    """V is the first Dv columns of K's memory: same start, same strides, no wider than K (MLA)."""
    return (
        v_cache.stride() == k_cache.stride()
        and v_cache.shape[-1] <= k_cache.shape[-1]
        and v_cache.data_ptr() == k_cache.data_ptr()
    )


def out_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.bfloat16 if dtype == FP8 else dtype


def check_queries(S_q: int) -> None:
    if S_q < 1:
        raise ShapeError(
            f"S_q = {S_q} query tokens", "S_q >= 1", "A decode call without a query has nothing to compute"
        )


def check_head_dims(D: int, Dv: int) -> None:
    for name, size in (("D", D), ("Dv", Dv)):
        if size % 8 or not 8 <= size <= 576:
            raise ShapeError(
                f"head dim {name} = {size}",
                "a multiple of 8 from 8 to 576",
                f"`{name}` is not a head dimension that the kernels support",
                f"Pad {name} with zeros to the next multiple of 8",
            )


def check_out(out: Tensor | None, shape: tuple[int, ...], dtype: torch.dtype, **inputs: Tensor) -> None:
    """`out` has the output's shape, dtype, device and layout, and shares no memory with the inputs (q first)."""
    if out is None:
        return
    check_tensor("out", out)
    if tuple(out.shape) != shape:
        raise ShapeError(named(out=out), f"out {list(shape)}", "`out` does not have the output's shape")
    if out.dtype != dtype:
        raise DTypeError(f"out {out.dtype}", f"out {dtype}", "`out` does not have the output's dtype")
    if not out.is_contiguous():
        raise LayoutError(
            f"out with strides {out.stride()}", "out contiguous", "`out` is not contiguous", "Pass a contiguous out"
        )
    check_on(inputs["q"].device, out=out)
    first, last = reach(out)
    for name, tensor in inputs.items():
        start, end = reach(tensor)
        if first < end and start < last:
            raise LayoutError(
                f"out at bytes {first:#x} to {last:#x}, {name} at {start:#x} to {end:#x}",
                "out in memory of its own",
                f"`out` overlaps `{name}`, which is read while out is written",
                "Pass another tensor, or none",
            )


def reach(tensor: Tensor) -> tuple[int, int]:
    """The addresses from a tensor's first byte to past its last."""
    if not tensor.numel():
        return 0, 0
    span = 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return tensor.data_ptr(), tensor.data_ptr() + span * tensor.element_size()


def check_seq_lens_shape(seq_lens: Tensor, B: int, name: str = "seq_lens") -> None:
    check_index(name, seq_lens, (B,), "[B]")


# --- Values -----------------------------------------------------------------------------------------------------------


def check_values(block_table: Tensor, seq_lens: Tensor, Nblk: int, name: str = "seq_lens") -> int:
    """Check lengths and used table entries, reading them once (on a GPU this waits for it).

    Returns the largest length in tokens.
    """
    if not seq_lens.numel():
        return 0
    table_blocks = block_table.shape[1]
    low, high = (int(x) for x in torch.aminmax(seq_lens))
    if low < 0:
        b = int(seq_lens.argmin())
        raise SequenceLengthError(
            f"{name}[{b}] = {low}", f"{name}[b] >= 0", f"`{name}[b]` is negative", "Pass lengths in tokens, 0 or more"
        )
    if high > Nblk * BLOCK:
        b = int(seq_lens.argmax())
        raise SequenceLengthError(
            f"{name}[{b}] = {high} tokens, Nblk = {Nblk} blocks",
            f"{name}[b] <= Nblk*64 = {Nblk * BLOCK}",
        )
    if high > table_blocks * BLOCK:
        b = int(seq_lens.argmax())
        raise BlockCountError(
            f"block_table {list(block_table.shape)}, {name}[{b}] = {high}",
            f"at least ceil({high}/64) = {-(-high // BLOCK)} blocks in a row of block_table",
            "`block_table` has fewer than `ceil(seq_len/64)` blocks",
        )
    index = torch.arange(table_blocks, device=block_table.device)
    used = index * BLOCK < seq_lens[:, None]
    bad = used & ((block_table < 0) | (block_table >= Nblk))
    if bad.any():
        b, i = (int(x) for x in bad.nonzero()[0])
        raise BlockTableError(
            f"block_table[{b}, {i}] = {int(block_table[b, i])}, which {name}[{b}] = {int(seq_lens[b])} uses; "
            f"Nblk = {Nblk}",
            f"0 <= block_table[b, i] < Nblk = {Nblk} for i < ceil({name}[b]/64)",
        )
    return high


def check_prefill_lengths(seq_lens: Tensor, P: int) -> None:
    """Key lengths of a prefill lie in [0, P]; on a GPU they are not read, and kernels clamp them."""
    if seq_lens.device.type != "cpu" or not seq_lens.numel():
        return
    low, high = (int(x) for x in torch.aminmax(seq_lens))
    if low < 0 or high > P:
        raise SequenceLengthError(
            f"seq_lens from {low} to {high}, P = {P}",
            f"0 <= seq_lens[b] <= P = {P}",
            "`seq_lens[b]` is negative" if low < 0 else "`seq_lens[b]` > P, the keys that are there",
            "Pass the number of real keys of each request",
        )


# --- Optional inputs --------------------------------------------------------------------------------------------------


def check_mask(name: str, mask: Tensor | None, B: int, Hq: int, rows: int, layout: str) -> MaskKind:
    """The kind of a mask [B|1, Hq|1, rows|1, L]; L is checked by `check_mask_length`."""
    if mask is None:
        return "none"
    check_tensor(name, mask)
    if mask.dtype != torch.bool and not mask.is_floating_point():
        raise MaskShapeError(
            f"{name} {mask.dtype}",
            "bool (True = attend) or a floating dtype (added to the scaled scores)",
            f"`{name}` is neither bool nor floating",
            f"Call {name}.bool()",
        )
    if mask.dim() != 4:
        raise MaskShapeError(
            named(**{name: mask}),
            f"{name} {layout}",
            f"`{name}` does not have 4 dims",
            "Add dims of size 1 with mask[:, None, None]",
        )
    for size, want, dim in zip(mask.shape[:3], (B, Hq, rows), ("B", "Hq", "query"), strict=True):
        if size not in (1, want):
            raise MaskShapeError(
                f"{named(**{name: mask})}: {dim} dim {size}",
                f"{name} {layout}: {dim} dim 1 or {want}",
                f"`{name}` does not broadcast to the queries",
                "Give each leading dim its full size, or 1",
            )
    return "bool" if mask.dtype == torch.bool else "float"


def check_mask_length(name: str, mask: Tensor | None, keys: int) -> None:
    if mask is not None and mask.shape[-1] < keys:
        raise MaskShapeError(
            f"{named(**{name: mask})}, which covers {mask.shape[-1]} keys",
            f"a last dim of at least {keys}",
            f"`{name}` last dim < `P+T`",
        )


def check_descale(name: str, value: float | Tensor | None, B: int, Hk: int, device: torch.device) -> bool:
    """Whether there is a descale; a tensor must be FP32 and broadcast to [B, Hk]."""
    if not isinstance(value, Tensor):
        return value is not None
    if value.dtype != torch.float32:
        raise DTypeError(f"{name} {value.dtype}", "float32", f"`{name}` is not FP32", f"Call {name}.float()")
    check_on(device, **{name: value})
    if value.dim() > 2 or any(s not in (1, w) for s, w in zip(value.shape[::-1], (Hk, B), strict=False)):
        raise ShapeError(
            named(**{name: value}),
            f"a shape that broadcasts to [B, Hk] = [{B}, {Hk}]",
            f"`{name}` does not broadcast to [B, Hk]",
            "Pass a float, or a tensor [B, Hk] in which either dim may be 1",
        )
    return True


def check_descales(descales: Descales, B: int, Hk: int, device: torch.device) -> bool:
    """Whether any of (q_descale, k_descale, v_descale) is given."""
    names = ("q_descale", "k_descale", "v_descale")
    given = [check_descale(name, value, B, Hk, device) for name, value in zip(names, descales, strict=True)]
    return any(given)


def check_sink(attn_sink: Tensor | None, Hq: int, device: torch.device) -> None:
    if attn_sink is None:
        return
    check_tensor("attn_sink", attn_sink)
    if tuple(attn_sink.shape) != (Hq,) or attn_sink.dtype != torch.float32:
        raise ShapeError(
            f"{named(attn_sink=attn_sink)} {attn_sink.dtype}",
            f"attn_sink [Hq] = [{Hq}] float32",
            "`attn_sink` is not one FP32 logit a query head",
        )
    check_on(device, attn_sink=attn_sink)


# --- Calls ------------------------------------------------------------------------------------------------------------


def refuse_deepseek_order(*args: object) -> None:
    """A call in DeepSeek's order has a 4-dim pool as second argument, or an integer table as third."""
    pool = len(args) > 1 and isinstance(args[1], Tensor) and args[1].dim() == 4
    table = len(args) > 2 and isinstance(args[2], Tensor) and args[2].dtype in INDEX_DTYPES and args[2].dim() == 2
    lengths_first = len(args) > 0 and isinstance(args[0], Tensor) and args[0].dtype in INDEX_DTYPES
    if (pool and table) or lengths_first:
        deepseek_order([a for a in args if a is not None])


def deepseek_order(args: Sequence[object]) -> NoReturn:
    shown = ", ".join(str(list(a.shape)) if isinstance(a, Tensor) else type(a).__name__ for a in args)
    raise ShapeError(
        f"arguments in order: {shown}",
        "the reference's order: q, k_cache, v_cache, block_table, seq_lens, ... (q_shape, kv_shape, block_table, "
        "seq_lens for get_mla_metadata)",
        "This call is in the argument order of DeepSeek's package",
        DEEPSEEK,
    )


def metadata(
    q_shape: Sequence[int],
    kv_shape: Sequence[int],
    block_table: Tensor,
    seq_lens: Tensor,
    v_head_dim: int | None,
    read_values: bool,
) -> MLAMetadata:
    """See `flash_mla.get_mla_metadata`."""
    for name, shape in (("q_shape", q_shape), ("kv_shape", kv_shape)):
        if isinstance(shape, Tensor) or not isinstance(shape, Sequence):
            raise ShapeError(
                f"{name} is a {type(shape).__name__}",
                f"{name} is a tuple of ints",
                f"`{name}` is not a shape",
                DEEPSEEK,
            )
    check_rank("q_shape", q_shape, 4, "[B, Hq, S_q, D]")
    check_rank("kv_shape", kv_shape, 5, "[B, Hk, Nblk, 64, D]")
    check_tensor("block_table", block_table)
    check_tensor("seq_lens", seq_lens)
    B, Hq, S_q, D = (int(x) for x in q_shape)
    Hk, Nblk = int(kv_shape[1]), int(kv_shape[2])
    check_block_size("kv_shape", kv_shape)
    check_cache_shape("kv_shape", kv_shape, B, D, shape_of("q_shape", q_shape))
    check_grouping(Hq, Hk)
    check_queries(S_q)
    check_head_dims(D, D if v_head_dim is None else v_head_dim)
    check_table(block_table, B)
    check_seq_lens_shape(seq_lens, B)
    check_on(block_table.device, seq_lens=seq_lens)
    longest = check_values(block_table, seq_lens, Nblk) if read_values else None
    return MLAMetadata(B, Hq, Hk, S_q, D, v_head_dim, Nblk, block_table.shape[1], longest)


def check_cache_shape(name: str, shape: Sequence[int], B: int, D: int, q: str) -> None:
    if shape[0] != B or shape[4] != D:
        raise ShapeError(
            f"{shape_of(name, shape)}, {q}",
            f"{name} [B, Hk, Nblk, 64, D] with B = {B} and D = {D}",
            f"`{name}` and q differ in " + ("B" if shape[0] != B else "D"),
        )


def check_caches(q: Tensor, k_cache: Tensor, v_cache: Tensor) -> bool:
    """Shapes and layout of both caches against q; returns whether V aliases K."""
    check_rank("q", q.shape, 4, "[B, Hq, S_q, D]")
    check_rank("k_cache", k_cache.shape, 5, "[B, Hk, Nblk, 64, D]")
    check_rank("v_cache", v_cache.shape, 5, "[B, Hk, Nblk, 64, Dv]")
    check_block_size("k_cache", k_cache.shape)
    check_cache_shape("k_cache", k_cache.shape, q.shape[0], q.shape[3], named(q=q))
    if v_cache.shape[:4] != k_cache.shape[:4]:
        raise ShapeError(
            named(k_cache=k_cache, v_cache=v_cache), "the same B, Hk, Nblk, 64", "`k_cache` and `v_cache` differ"
        )
    check_grouping(q.shape[1], k_cache.shape[1])
    check_head_dims(q.shape[3], v_cache.shape[4])
    check_page_view("k_cache", k_cache)
    alias = is_alias(k_cache, v_cache)
    if not alias:
        check_page_view("v_cache", v_cache)
    return alias


def check_metadata(metadata: MLAMetadata, q: Tensor, k_cache: Tensor, v_cache: Tensor, block_table: Tensor) -> None:
    """The metadata was made for these shapes."""
    if not isinstance(metadata, MLAMetadata):
        deepseek_order([q, k_cache, v_cache, block_table, metadata])
    table_blocks, Dv = block_table.shape[-1], v_cache.shape[-1]
    if (
        q.shape == metadata.q_shape
        and k_cache.shape == metadata.kv_shape
        and table_blocks == metadata.table_blocks
        and metadata.Dv in (None, Dv)
    ):
        return
    raise ShapeError(
        f"{named(q=q, k_cache=k_cache, v_cache=v_cache, block_table=block_table)}; {metadata}",
        "tensors of the shapes that the metadata was made for",
        "The metadata belongs to other shapes",
        "Call get_mla_metadata again for these shapes",
    )


def decode(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_table: Tensor,
    seq_lens: Tensor,
    mask: Tensor | None,
    descales: Descales,
    attn_sink: Tensor | None,
) -> DecodeProblem:
    """The problem of a `flash_mla_with_kvcache` call; reads no value.

    A plain call (no mask, descale, sink) whose shapes, strides, dtypes and devices passed before is not checked again.
    """
    if mask is not None or attn_sink is not None or descales != (None, None, None):
        return checked_decode(q, k_cache, v_cache, block_table, seq_lens, mask, descales, attn_sink)
    try:
        tensors = (q, k_cache, v_cache, block_table, seq_lens)
        key = (*[(x.shape, x.stride(), x.dtype, x.device) for x in tensors], k_cache.data_ptr() == v_cache.data_ptr())
    except AttributeError:  # not a tensor: the checks say which
        return checked_decode(q, k_cache, v_cache, block_table, seq_lens, mask, descales, attn_sink)
    problem = PASSED.get(key)
    if problem is None:
        problem = checked_decode(q, k_cache, v_cache, block_table, seq_lens, mask, descales, attn_sink)
        if len(PASSED) >= MOST_PASSED:
            PASSED.clear()
        PASSED[key] = problem
    return problem


# NOTE: 4 us against 16 for the checks; a whole call without its launch then takes 13 us (Zen 4).
PASSED: dict[tuple[object, ...], DecodeProblem] = {}
MOST_PASSED = 4096


def checked_decode(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_table: Tensor,
    seq_lens: Tensor,
    mask: Tensor | None,
    descales: Descales,
    attn_sink: Tensor | None,
) -> DecodeProblem:
    """As `decode`, every check made."""
    check_tensor("q", q)
    check_tensor("k_cache", k_cache)
    check_tensor("v_cache", v_cache)
    check_tensor("block_table", block_table)
    check_tensor("seq_lens", seq_lens)
    check_on(q.device, k_cache=k_cache, v_cache=v_cache, block_table=block_table, seq_lens=seq_lens, mask=mask)
    check_dtypes(q=q, k_cache=k_cache, v_cache=v_cache)
    alias = check_caches(q, k_cache, v_cache)
    B, Hq, S_q, _ = q.shape
    check_queries(S_q)
    check_table(block_table, B)
    check_seq_lens_shape(seq_lens, B)
    check_sink(attn_sink, Hq, q.device)
    if not q.is_contiguous():
        raise LayoutError(f"{named(q=q)} with strides {q.stride()}", "q contiguous", "`q` is not contiguous")
    return decode_problem(
        q,
        k_cache,
        v_cache,
        block_table,
        alias=alias,
        mask=check_mask("mask", mask, B, Hq, S_q, "[B, 1, 1, P+T]"),
        descale=check_descales(descales, B, k_cache.shape[1], q.device),
        sink=attn_sink is not None,
    )


def decode_problem(q: Tensor, k: Tensor, v: Tensor, block_table: Tensor, **inputs: Any) -> DecodeProblem:
    """The problem of q [B, Hq, S_q, D] over page views; `inputs` are the fields of DecodeProblem from `alias` on."""
    B, Hq, S_q, D = q.shape
    return DecodeProblem(
        device=q.device,
        dtype=q.dtype,
        out_dtype=out_dtype(q.dtype),
        B=B,
        Hq=Hq,
        Hk=k.shape[1],
        S_q=S_q,
        D=D,
        Dv=v.shape[4],
        Nblk=k.shape[2],
        table_blocks=block_table.shape[1],
        q_strides=q.stride(),
        k_strides=k.stride(),
        v_strides=v.stride(),
        **inputs,
    )


def check_start_pos(start_pos: Tensor | None, B: int) -> None:
    if start_pos is not None:
        check_seq_lens_shape(start_pos, B, "start_pos")


def prefill_problem(q: Tensor, k: Tensor, v: Tensor, *, S_kv: int, causal: bool, **inputs: Any) -> PrefillProblem:
    """The problem of q [B, Hq, P, D] over k and v, contiguous [B, Hk, S_kv, D] or page views.

    `inputs` are the fields of PrefillProblem from `mask` on that are not at their default.
    """
    B, Hq, P, D = q.shape
    return PrefillProblem(
        device=q.device,
        dtype=q.dtype,
        out_dtype=out_dtype(q.dtype),
        B=B,
        Hq=Hq,
        Hk=k.shape[1],
        P=P,
        S_kv=S_kv,
        D=D,
        Dv=v.shape[-1],
        q_strides=q.stride(),
        k_strides=k.stride(),
        v_strides=v.stride(),
        paged=k.dim() == 5,
        alias=is_alias(k, v),
        causal=causal,
        **inputs,
    )


def prefill(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    seq_lens: Tensor | None,
    attn_mask: Tensor | None,
    descales: Descales,
    attn_sink: Tensor | None,
    *,
    causal: bool,
    block_mask: bool,
) -> PrefillProblem:
    """The problem of a `flash_mla_prefill` call; reads no value."""
    for name, tensor, layout in (("q", q, "[B, Hq, P, D]"), ("k", k, "[B, Hk, P, D]"), ("v", v, "[B, Hk, P, Dv]")):
        check_rank(name, tensor.shape, 4, layout)
        check_last_dim(name, tensor)
        check_monotonic(name, tensor.shape[:3], tensor.stride()[:3], "B H P")
    check_on(q.device, k=k, v=v, seq_lens=seq_lens, attn_mask=attn_mask)
    check_dtypes(q=q, k=k, v=v)
    B, Hq, P, D = q.shape
    Hk, Dv = k.shape[1], v.shape[3]
    if (k.shape[0], k.shape[2], k.shape[3]) != (B, P, D) or v.shape[:3] != k.shape[:3]:
        raise ShapeError(named(q=q, k=k, v=v), "q [B, Hq, P, D], k [B, Hk, P, D], v [B, Hk, P, Dv]")
    check_grouping(Hq, Hk)
    check_head_dims(D, Dv)
    if seq_lens is not None:
        check_seq_lens_shape(seq_lens, B)
        check_prefill_lengths(seq_lens, P)
    check_sink(attn_sink, Hq, q.device)
    return prefill_problem(
        q,
        k,
        v,
        S_kv=P,
        causal=causal,
        mask=check_mask("attn_mask", attn_mask, B, Hq, P, "[B, 1|Hq, P, P]"),
        block_mask=block_mask,
        seq_lens=seq_lens is not None,
        descale=check_descales(descales, B, Hk, q.device),
        sink=attn_sink is not None,
    )


def mha(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_table: Tensor,
    start_pos: Tensor | None,
    k: Tensor | None,
    v: Tensor | None,
    attn_mask: Tensor | None,
    descales: Descales,
    *,
    causal: bool,
) -> PrefillProblem:
    """The problem of a `mha_fwd_kvcache` call; reads no value."""
    check_on(q.device, k_cache=k_cache, v_cache=v_cache, block_table=block_table)
    check_on(q.device, start_pos=start_pos, k=k, v=v, attn_mask=attn_mask)
    dtype = check_dtypes(q=q, k_cache=k_cache, v_cache=v_cache)
    alias = check_caches(q, k_cache, v_cache)
    B, Hq, P, D = q.shape
    Hk, Dv, table_blocks = k_cache.shape[1], v_cache.shape[4], block_table.shape[-1]
    if Hq != Hk:
        raise HeadGroupingError(
            f"q has {Hq} heads, k_cache has {Hk}",
            "H query heads and H KV heads",
            "`mha_fwd_kvcache` is standard MHA (no MLA head-grouping)",
            "Use flash_mla_prefill for grouped-query attention",
        )
    check_last_dim("q", q)
    check_monotonic("q", q.shape[:3], q.stride()[:3], "B H P")
    check_table(block_table, B)
    check_start_pos(start_pos, B)
    blocks = min(table_blocks, k_cache.shape[2]) if start_pos is None else table_blocks
    if blocks * BLOCK < P:
        raise BlockCountError(
            f"P = {P} tokens, block_table {list(block_table.shape)}, Nblk = {k_cache.shape[2]}",
            f"at least ceil(P/64) = {-(-P // BLOCK)} blocks",
            "P does not align with block_table coverage (`ceil(P/64)` blocks)",
        )
    # caches without an element all start at address 0: no alias
    latent = alias and k_cache.numel() > 0
    check_new_rows(q, k, v, (B, Hk, P, D), (B, Hk, P, Dv), dtype, latent)
    return prefill_problem(
        q,
        k_cache,
        v_cache,
        S_kv=P if start_pos is None else table_blocks * BLOCK,
        causal=causal,
        mask=check_mask("attn_mask", attn_mask, B, Hq, P, "[B, 1|H, P, P]"),
        seq_lens=start_pos is not None,
        start_pos=start_pos is not None,
        descale=check_descales(descales, B, Hk, q.device),
    )


def check_new_rows(
    q: Tensor,
    k: Tensor | None,
    v: Tensor | None,
    k_shape: tuple[int, ...],
    v_shape: tuple[int, ...],
    dtype: torch.dtype,
    alias: bool,
) -> None:
    """The rows that `mha_fwd_kvcache` writes into the cache before it attends."""
    if k is None and v is None:
        return
    if k is None or v is None or alias:
        raise ShapeError(
            f"k {'omitted' if k is None else 'given'}, v {'omitted' if v is None else 'given'}"
            + (", v_cache a view of k_cache" if alias else ""),
            "both k and v, and separate caches, or neither",
            "`k` and `v` are written together, each to its own cache",
            "Pass both, or write the cache beforehand and pass neither",
        )
    for name, rows, shape in (("k", k, k_shape), ("v", v, v_shape)):
        if tuple(rows.shape) != shape:
            raise ShapeError(
                named(q=q, **{name: rows}), f"{name} {list(shape)}", f"`{name}` does not fit q and the cache"
            )
        check_last_dim(name, rows)
    check_dtypes(q=q, k=k, v=v)


def check_prompt_values(block_table: Tensor, start_pos: Tensor | None, problem: PrefillProblem, Nblk: int) -> int:
    """Check the table's entries over each prompt, and start_pos; returns the most keys of a request, in tokens."""
    if start_pos is not None and start_pos.numel() and int(start_pos.min()) < 0:
        raise SequenceLengthError(
            f"start_pos has {int(start_pos.min())}",
            "start_pos[b] >= 0",
            "`start_pos[b]` is negative",
            "Pass the tokens that the cache holds before this chunk",
        )
    ends = (
        torch.full((problem.B,), problem.P, device=block_table.device) if start_pos is None else start_pos + problem.P
    )
    return check_values(block_table, ends, Nblk, "start_pos + P" if start_pos is not None else "P")


def sparse_blocks(sparse_layout: object, q: Tensor) -> Tensor | None:
    """A bool tensor, a BlockSparseLayout or a BlockMask -> bool [B, Hq, ceil(P/64), ceil(P/64)], expanded."""
    if sparse_layout is None:
        return None
    if not isinstance(sparse_layout, (Tensor, BlockSparseLayout)):
        if not hasattr(sparse_layout, "BLOCK_SIZE"):
            raise ShapeError(
                f"sparse_layout is a {type(sparse_layout).__name__}",
                "a bool tensor, a BlockSparseLayout or FlexAttention's BlockMask",
                "`sparse_layout` does not describe blocks",
                "Build it with BlockSparseLayout",
            )
        sparse_layout = BlockSparseLayout.from_block_mask(sparse_layout)  # type: ignore[arg-type]
    blocks = sparse_layout.blocks if isinstance(sparse_layout, BlockSparseLayout) else sparse_layout
    B, Hq, P = q.shape[:3]
    n = -(-P // BLOCK)
    fits = (
        blocks.dim() == 4
        and blocks.shape[0] in (1, B)
        and blocks.shape[1] in (1, Hq)
        and tuple(blocks.shape[2:]) == (n, n)
        and blocks.dtype == torch.bool
    )
    if not fits:
        raise MaskShapeError(
            f"sparse_layout {list(blocks.shape)} {blocks.dtype}, P = {P}",
            f"bool [B|1, Hq|1, ceil(P/64), ceil(P/64)] = [{B}|1, {Hq}|1, {n}, {n}]",
            "`sparse_layout` does not describe the 64x64 blocks of this problem",
            "Build it with BlockSparseLayout for this P",
        )
    check_on(q.device, sparse_layout=blocks)
    return blocks.expand(B, Hq, n, n)
