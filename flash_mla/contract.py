"""Tensors in; a problem, or one precise error.

Every public function calls one function of this module first. Nothing here writes memory, and only `check_values`
reads the values of a tensor.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Real
from typing import Any, NoReturn, TypeVar

import torch
from torch import Tensor

from flash_mla.errors import (
    BlockCountError,
    BlockTableError,
    DeviceError,
    DTypeError,
    GradientError,
    HeadGroupingError,
    LayoutError,
    MaskShapeError,
    ScaleWarning,
    SequenceLengthError,
    ShapeError,
    describe,
)
from flash_mla.layout import BlockSparseLayout
from flash_mla.problem import ALIGNMENT, BLOCK, DTYPES, FP8, DecodeProblem, MaskKind, PrefillProblem
from flash_mla.quant import needs_descale

INDEX_DTYPES = (torch.int32, torch.int64)
Descales = tuple[float | Tensor | None, float | Tensor | None, float | Tensor | None]
NO_DESCALES: Descales = (None, None, None)
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
UNABSORBED = (
    "Give q the D of the cache's rows; over an MLA latent (512 + 64 columns) absorb W_UK into q's nope columns first"
)
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

    def fits(self, problem: DecodeProblem) -> bool:
        """Whether it was made for such a call."""
        return (
            self.B == problem.B
            and self.Hq == problem.Hq
            and self.Hk == problem.Hk
            and self.S_q == problem.S_q
            and self.D == problem.D
            and self.Nblk == problem.Nblk
            and self.table_blocks == problem.table_blocks
            and self.Dv in (None, problem.Dv)
        )

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


def check_decode_dtypes(q: Tensor, k_cache: Tensor, v_cache: Tensor) -> None:
    """One dtype for all, or 16-bit queries over FP8 caches."""
    if q.dtype in (torch.bfloat16, torch.float16) and k_cache.dtype == v_cache.dtype == FP8:
        return
    check_dtypes(q=q, k_cache=k_cache, v_cache=v_cache)


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
        # without memory (meta tensors, tensors without an element) every address is 0
        and (v_cache.data_ptr() != 0 or v_cache.untyped_storage()._cdata == k_cache.untyped_storage()._cdata)
    )


def is_aligned(*tensors: Tensor) -> bool:
    """Whether each tensor's first element lies on ALIGNMENT bytes."""
    return not any(tensor.data_ptr() % ALIGNMENT for tensor in tensors)


def out_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.bfloat16 if dtype == FP8 else dtype


def check_head_dims(D: int, Dv: int) -> None:
    for name, size in (("D", D), ("Dv", Dv)):
        if not isinstance(size, (int, torch.SymInt)) or size % 8 or not 8 <= size <= 576:
            raise ShapeError(
                f"head dim {name} = {size!r}"[:200],
                "a multiple of 8 from 8 to 576",
                f"`{name}` is not a head dimension that the kernels support",
                f"Pad {name} with zeros to the next multiple of 8",
            )


Some = TypeVar("Some", DecodeProblem, PrefillProblem)


def check_out(out: Tensor | None, problem: Some, **inputs: Tensor | float | None) -> Some:
    """`out` has the output's shape, dtype, device and layout, and shares no memory with any tensor of the call.

    Returns the problem, whose `aligned` counts out too.
    """
    if out is None:
        return problem
    check_tensor("out", out)
    strides = problem.out_strides if isinstance(problem, DecodeProblem) else None
    if tuple(out.shape) != problem.out_shape:
        raise ShapeError(named(out=out), f"out {list(problem.out_shape)}", "`out` does not have the output's shape")
    if out.dtype != problem.out_dtype:
        raise DTypeError(f"out {out.dtype}", f"out {problem.out_dtype}", "`out` does not have the output's dtype")
    if strides is None and not out.is_contiguous():
        raise LayoutError(
            f"out with strides {out.stride()}", "out contiguous", "`out` is not contiguous", "Pass a contiguous out"
        )
    check_on(problem.device, out=out)
    refuse_learning_out(out)
    check_apart("out", out, **inputs)
    return problem if is_aligned(out) else problem._replace(aligned=False)


def refuse_learning_out(out: Tensor) -> None:
    """No gradient to what `out` held."""
    if out.requires_grad and torch.is_grad_enabled():
        raise GradientError(
            "out, which requires grad",
            "an out that does not",
            "`out` is written in place, and what it held has then no gradient",
            "Pass out.detach(), or none",
        )


def check_apart(written: str, target: Tensor, **inputs: Tensor | float | None) -> None:
    """What is written shares no memory with what the call reads."""
    first, last = reach(target)
    for name, tensor in inputs.items():
        if not isinstance(tensor, Tensor):
            continue
        start, end = reach(tensor)
        if first < end and start < last:
            raise LayoutError(
                f"{written} at bytes {first:#x} to {last:#x}, {name} at {start:#x} to {end:#x}",
                f"{written} in memory of its own",
                f"`{written}` overlaps `{name}`, which is read while {written} is written",
                "Pass another tensor, or none" if written == "out" else f"Pass a copy: {name}.clone()",
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


def check_values(block_table: Tensor, seq_lens: Tensor, Nblk: int, name: str = "seq_lens", page: int = BLOCK) -> int:
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
    if high > Nblk * page:
        b = int(seq_lens.argmax())
        raise SequenceLengthError(
            f"{name}[{b}] = {high} tokens, Nblk = {Nblk} blocks",
            f"{name}[b] <= Nblk*{page} = {Nblk * page}",
        )
    if high > table_blocks * page:
        b = int(seq_lens.argmax())
        raise BlockCountError(
            f"block_table {list(block_table.shape)}, {name}[{b}] = {high}",
            f"at least ceil({high}/{page}) = {-(-high // page)} blocks in a row of block_table",
            "`block_table` has fewer than `ceil(seq_len/64)` blocks",
        )
    index = torch.arange(table_blocks, device=block_table.device)
    used = index * page < seq_lens[:, None]
    bad = used & ((block_table < 0) | (block_table >= Nblk))
    if bad.any():
        b, i = (int(x) for x in bad.nonzero()[0])
        raise BlockTableError(
            f"block_table[{b}, {i}] = {int(block_table[b, i])}, which {name}[{b}] = {int(seq_lens[b])} uses; "
            f"Nblk = {Nblk}",
            f"0 <= block_table[b, i] < Nblk = {Nblk} for i < ceil({name}[b]/{page})",
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


def check_scale(softmax_scale: float | None) -> int:
    """The sign of softmax_scale: -1, 0 or 1 (None: D ** -0.5, which is above 0)."""
    if softmax_scale is None:
        return 1
    if not is_finite(softmax_scale):
        raise ShapeError(
            f"softmax_scale = {softmax_scale!r}"[:200],
            "a finite real number, or None for D ** -0.5",
            f"`softmax_scale` is a {type(softmax_scale).__name__} and no finite number",
            "Pass a float",
        )
    return int(softmax_scale > 0) - int(softmax_scale < 0)


def warn_default_scale(D: int, Dv: int, stacklevel: int) -> None:
    """Tell who attends to a latent without a scale: D ** -0.5 is the absorbed query's, not the model's."""
    if D == Dv:
        return
    message = describe(
        f"softmax_scale = None; V is the first {Dv} of K's {D} columns, MLA's latent",
        "the scale of the query before absorption, (nope + rope) ** -0.5",
        f"The default, {D} ** -0.5, is made of the absorbed query's D",
        f"Pass softmax_scale: 192 ** -0.5 for DeepSeek-V2 and -V3, or {D} ** -0.5 to say that you mean it",
    )
    warnings.warn(message, ScaleWarning, stacklevel=stacklevel + 1)


def settle_causal(causal: bool | None, mask: Tensor | None) -> bool:
    """Whether a prefill is causal: as said, or else where no mask is given."""
    if causal is None:
        return mask is None
    if not isinstance(causal, bool):
        raise ShapeError(
            f"causal = {causal!r}"[:200], "True, False or None", "`causal` says neither yes nor no", "Pass a bool"
        )
    return causal


def is_finite(value: object) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)


def check_descale(name: str, value: float | Tensor | None, B: int, Hk: int, device: torch.device) -> bool:
    """Whether there is a descale: a finite number, not negative, or an FP32 tensor that broadcasts to [B, Hk]."""
    if value is None:
        return False
    if not isinstance(value, Tensor):
        if not is_finite(value) or value < 0:
            raise ShapeError(
                f"{name} = {value!r}"[:200],
                "a finite number, 0 or more, or a float32 tensor that broadcasts to [B, Hk]",
                f"`{name}` is no factor from stored to real values",
                "Pass the scale that the values were divided by",
            )
        return True
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


def check_descales_given(k_cache: Tensor, v_cache: Tensor, descales: Descales) -> None:
    """Refuse a cache that was stored with factors where one is left out: its values would be taken as they lie."""
    for name, cache, descale in (("k", k_cache, descales[1]), ("v", v_cache, descales[2])):
        if descale is None and needs_descale(cache):
            raise ShapeError(
                f"{name}_cache {list(cache.shape)} of a PagedKVCache made with {name}_descale, {name}_descale None",
                f"{name}_descale = cache.{name}_descale",
                f"The stored values were divided by `{name}_descale`",
                "Call cache.decode(q), which passes it, or pass it along",
            )


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
    """A call in DeepSeek's order has a 4-dim pool as second argument and an integer table as third; its
    get_mla_metadata begins with lengths."""
    first, second, third = (*args, None, None, None)[:3]
    pool = isinstance(second, Tensor) and second.dim() == 4
    table = isinstance(third, Tensor) and third.dtype in INDEX_DTYPES and third.dim() == 2
    lengths = isinstance(first, Tensor) and first.dtype in INDEX_DTYPES and first.dim() == 1
    if (pool and table) or lengths:
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


def check_shape(name: str, shape: Sequence[int], rank: int, layout: str) -> None:
    """A tuple (or torch.Size, or list) of `rank` sizes, none negative."""
    sizes = isinstance(shape, Sequence) and all(isinstance(x, (int, torch.SymInt)) for x in shape)
    if isinstance(shape, str) or not sizes or any(x < 0 for x in shape):
        given = f"is a {type(shape).__name__}" if isinstance(shape, Tensor) else f"= {shape!r}"
        raise ShapeError(
            f"{name} {given}"[:200],
            f"{name} {layout}, a tuple of ints, none negative",
            f"`{name}` is not a shape",
            "Pass q.shape and k_cache.shape",
        )
    check_rank(name, shape, rank, layout)


def metadata(
    q_shape: Sequence[int],
    kv_shape: Sequence[int],
    block_table: Tensor,
    seq_lens: Tensor,
    v_head_dim: int | None,
    read_values: bool,
) -> MLAMetadata:
    """See `flash_mla.get_mla_metadata`."""
    check_shape("q_shape", q_shape, 4, "[B, Hq, S_q, D]")
    check_shape("kv_shape", kv_shape, 5, f"[B, Hk, Nblk, {BLOCK}, D]")
    if v_head_dim is not None and not isinstance(v_head_dim, int):
        raise ShapeError(
            f"v_head_dim = {v_head_dim!r}"[:200], "an int, or None", "`v_head_dim` is no number of columns", "Pass Dv"
        )
    check_tensor("block_table", block_table)
    check_tensor("seq_lens", seq_lens)
    B, Hq, S_q, D = (int(x) for x in q_shape)
    Hk, Nblk = int(kv_shape[1]), int(kv_shape[2])
    check_block_size("kv_shape", kv_shape)
    check_cache_shape("kv_shape", kv_shape, B, D, shape_of("q_shape", q_shape))
    check_grouping(Hq, Hk)
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
            None if shape[0] != B else UNABSORBED,
        )


def check_ranks(q: Tensor, k_cache: Tensor, v_cache: Tensor) -> None:
    check_rank("q", q.shape, 4, "[B, Hq, S_q, D]")
    check_rank("k_cache", k_cache.shape, 5, f"[B, Hk, Nblk, {BLOCK}, D]")
    check_rank("v_cache", v_cache.shape, 5, f"[B, Hk, Nblk, {BLOCK}, Dv]")


def check_caches(q: Tensor, k_cache: Tensor, v_cache: Tensor) -> bool:
    """Shapes and layout of both caches against q; returns whether V aliases K."""
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
        raise ShapeError(
            f"metadata is a {type(metadata).__name__}",
            "metadata is a flash_mla.MLAMetadata",
            "`metadata` does not come from flash_mla.get_mla_metadata",
            "Pass get_mla_metadata(q.shape, k_cache.shape, block_table, seq_lens), or none",
        )
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
    mask: Tensor | None = None,
    descales: Descales = NO_DESCALES,
    attn_sink: Tensor | None = None,
    softmax_scale: float | None = None,
) -> DecodeProblem:
    """The problem of a `flash_mla_with_kvcache` call; reads no value.

    A call without a mask whose shapes, strides, dtypes and devices passed before is not checked again.
    """
    scale_sign = check_scale(softmax_scale)
    key = None if mask is not None else passing(q, k_cache, v_cache, block_table, seq_lens, descales, attn_sink)
    problem = None if key is None else PASSED.get((scale_sign, key))
    if problem is not None:
        return problem
    refuse_deepseek_order(q, k_cache, v_cache)
    problem = checked_decode(q, k_cache, v_cache, block_table, seq_lens, mask, descales, attn_sink, scale_sign)
    if key is not None:
        if len(PASSED) >= MOST_PASSED:
            PASSED.clear()
        PASSED[scale_sign, key] = problem
    return problem


# NOTE: 4 us against 16 for the checks; a whole call without its launch then takes 13 us (Zen 4).
PASSED: dict[tuple[int, tuple[object, ...]], DecodeProblem] = {}
MOST_PASSED = 4096


def passing(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_table: Tensor,
    seq_lens: Tensor,
    descales: Descales,
    attn_sink: Tensor | None,
) -> tuple[object, ...] | None:
    """All that the checks of a call look at, as a key; None where an argument is not what it should be."""
    try:
        q_start, k_start, v_start = q.data_ptr(), k_cache.data_ptr(), v_cache.data_ptr()
        tensors = [(x.shape, x.stride(), x.dtype, x.device) for x in (q, k_cache, v_cache, block_table, seq_lens)]
    except AttributeError:  # not a tensor: the checks say which
        return None
    if not k_start:  # without memory, addresses do not tell what is an alias
        return None
    more: tuple[object, ...] = ()
    if attn_sink is not None or descales != NO_DESCALES:
        for value in (attn_sink, *descales):
            if isinstance(value, Tensor):
                more = (*more, (value.shape, value.dtype, value.device))
            elif value is None:
                more = (*more, None)
            else:  # a number, whose value counts
                return None
    marked = k_cache.dtype == FP8 and (needs_descale(k_cache), needs_descale(v_cache))
    return (*tensors, k_start == v_start, (q_start | k_start | v_start) % ALIGNMENT, marked, more)


def checked_decode(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_table: Tensor,
    seq_lens: Tensor,
    mask: Tensor | None,
    descales: Descales,
    attn_sink: Tensor | None,
    scale_sign: int,
) -> DecodeProblem:
    """As `decode`, every check made."""
    check_tensor("q", q)
    check_tensor("k_cache", k_cache)
    check_tensor("v_cache", v_cache)
    check_tensor("block_table", block_table)
    check_tensor("seq_lens", seq_lens)
    check_on(q.device, k_cache=k_cache, v_cache=v_cache, block_table=block_table, seq_lens=seq_lens, mask=mask)
    check_ranks(q, k_cache, v_cache)
    check_decode_dtypes(q, k_cache, v_cache)
    alias = check_caches(q, k_cache, v_cache)
    check_descales_given(k_cache, v_cache, descales)
    B, Hq, S_q, _ = q.shape
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
        scale_sign=scale_sign,
    )


def decode_problem(
    q: Tensor, k: Tensor, v: Tensor, block_table: Tensor, k_rope: Tensor | None = None, **inputs: Any
) -> DecodeProblem:
    """The problem of q [B, Hq, S_q, D] over page views.

    `inputs` are the fields of DecodeProblem from `alias` on, but for those that the tensors tell: aligned, page,
    rope_strides.
    """
    B, Hq, S_q, D = q.shape
    return DecodeProblem(
        device=q.device,
        dtype=q.dtype,
        kv_dtype=k.dtype,
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
        aligned=is_aligned(q, k, v) and (k_rope is None or is_aligned(k_rope)),
        page=k.shape[3],
        rope_strides=None if k_rope is None else k_rope.stride(),
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
        aligned=is_aligned(q, k, v),
        **inputs,
    )


def prefill(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    seq_lens: Tensor | None = None,
    attn_mask: Tensor | None = None,
    descales: Descales = NO_DESCALES,
    attn_sink: Tensor | None = None,
    softmax_scale: float | None = None,
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
        tokens_first = q.shape[1] == k.shape[1] == v.shape[1] and k.shape[2] == v.shape[2] and k.shape[3] == D
        raise ShapeError(
            named(q=q, k=k, v=v),
            "q [B, Hq, P, D], k [B, Hk, P, D], v [B, Hk, P, Dv]",
            "The tensors look like [B, P, H, D], as FlashAttention takes them" if tokens_first else None,
            "Call .transpose(1, 2) on q, k, v and on what is returned" if tokens_first else None,
        )
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
        scale_sign=check_scale(softmax_scale),
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
    softmax_scale: float | None,
    *,
    causal: bool,
) -> PrefillProblem:
    """The problem of a `mha_fwd_kvcache` call; reads no value."""
    check_on(q.device, k_cache=k_cache, v_cache=v_cache, block_table=block_table)
    check_on(q.device, start_pos=start_pos, k=k, v=v, attn_mask=attn_mask)
    check_ranks(q, k_cache, v_cache)
    check_dtypes(q=q, k_cache=k_cache, v_cache=v_cache)
    alias = check_caches(q, k_cache, v_cache)
    check_descales_given(k_cache, v_cache, descales)
    B, Hq, P, _ = q.shape
    Hk = k_cache.shape[1]
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
    table_blocks = block_table.shape[1]
    blocks = min(table_blocks, k_cache.shape[2]) if start_pos is None else table_blocks
    if B and blocks * BLOCK < P:
        raise BlockCountError(
            f"P = {P} tokens, block_table {list(block_table.shape)}, Nblk = {k_cache.shape[2]}",
            f"at least ceil(P/64) = {-(-P // BLOCK)} blocks",
            "P does not align with block_table coverage (`ceil(P/64)` blocks)",
        )
    if k is not None or v is not None:
        check_new_rows(q, k, v, k_cache, v_cache, alias)
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
        scale_sign=check_scale(softmax_scale),
    )


def check_new_rows(
    q: Tensor, k: Tensor | None, v: Tensor | None, k_cache: Tensor, v_cache: Tensor, alias: bool
) -> None:
    """The rows that `mha_fwd_kvcache` writes into the caches before it attends; each has a place of its own."""
    if k is None or v is None or alias:
        raise ShapeError(
            f"k {'omitted' if k is None else 'given'}, v {'omitted' if v is None else 'given'}"
            + (", v_cache a view of k_cache" if alias else ""),
            "both k and v, and separate caches, or neither",
            "`k` and `v` are written together, each to its own cache",
            "Pass both, or write the cache beforehand and pass neither",
        )
    (B, Hk), P = k_cache.shape[:2], q.shape[2]
    for name, rows, cache in (("k", k, k_cache), ("v", v, v_cache)):
        shape = (B, Hk, P, cache.shape[4])
        if tuple(rows.shape) != shape:
            raise ShapeError(
                named(q=q, **{name: rows}), f"{name} {list(shape)}", f"`{name}` does not fit q and the cache"
            )
        check_last_dim(name, rows)
    check_dtypes(q=q, k=k, v=v)
    check_writable("k_cache", k_cache)
    check_writable("v_cache", v_cache)
    if share_memory(k_cache, v_cache):
        raise LayoutError(
            f"{named(k_cache=k_cache, v_cache=v_cache)} with strides {k_cache.stride()} and {v_cache.stride()}",
            "caches in memory of their own",
            "`k_cache` and `v_cache` overlap, and both are written",
            "Pass separate caches",
        )
    for name, cache in (("k_cache", k_cache), ("v_cache", v_cache)):
        check_apart(name, cache, q=q, k=k, v=v)


def check_writable(name: str, cache: Tensor) -> None:
    """No two heads or blocks of a request lie on the same memory; requests may all share one pool (stride 0)."""
    extent = BLOCK * cache.shape[4]
    for dim in (2, 1, 0):
        size, stride = cache.shape[dim], cache.stride(dim)
        if size > 1 and stride < extent and not (dim == 0 and stride == 0):
            raise LayoutError(
                f"{named(**{name: cache})} with strides {cache.stride()}",
                f"a {('batch', 'head', 'block')[dim]} stride of at least {extent}" + (", or 0" if dim == 0 else ""),
                f"`{name}` is written, and has several names for the same memory",
                "Pass a cache whose heads and blocks lie apart",
            )
        extent = max(extent, stride * (size - 1) + extent if stride else extent)


def share_memory(one: Tensor, other: Tensor) -> bool:
    """Whether two written caches meet. Exact where both have the same strides, as parts of one tensor have."""
    (start, end), (first, last) = reach(one), reach(other)
    if start >= last or first >= end:
        return False
    if one.stride()[:3] != other.stride()[:3]:
        return True
    low, high = (one, other) if start <= first else (other, one)
    dims = sorted(((s, n) for s, n in zip(one.stride()[:3], one.shape[:3], strict=True) if s and n > 1), reverse=True)
    slabs = (BLOCK * low.shape[4], BLOCK * high.shape[4])
    return slabs_meet(abs(first - start) // one.element_size(), slabs, dims)


def slabs_meet(distance: int, slabs: tuple[int, int], dims: Sequence[tuple[int, int]]) -> bool:
    """Whether a slab of the lower tensor meets one of the higher, which begins `distance` elements later.

    dims (stride, size) from the largest stride on; each stride is at least the extent of what it steps over.
    """
    if not dims:
        return -slabs[1] < distance < slabs[0]
    (stride, size), *rest = dims
    steps = distance // stride
    return any(slabs_meet(distance - i * stride, slabs, rest) for i in (steps, steps + 1) if abs(i) < size)


def check_prompt_values(
    block_table: Tensor, start_pos: Tensor | None, problem: PrefillProblem, k_cache: Tensor, writes: bool
) -> int:
    """Check the table's entries over each prompt, and start_pos; returns the most keys of a request, in tokens."""
    if not problem.B:
        return 0
    Nblk = k_cache.shape[2]
    if start_pos is None:
        starts = torch.zeros(problem.B, dtype=torch.int64, device=block_table.device)
    else:
        starts = start_pos.long()
        if int(starts.min()) < 0:
            raise SequenceLengthError(
                f"start_pos has {int(starts.min())}",
                "start_pos[b] >= 0",
                "`start_pos[b]` is negative",
                "Pass the tokens that the cache holds before this chunk",
            )
        starts = starts.clamp(max=2**62)
    ends = starts + problem.P
    longest = check_values(block_table, ends, Nblk, "start_pos + P" if start_pos is not None else "P")
    if writes and problem.P:
        check_written_blocks(block_table, starts, ends, Nblk, pool=k_cache.stride(0) == 0)
    return longest


def check_written_blocks(block_table: Tensor, starts: Tensor, ends: Tensor, Nblk: int, pool: bool) -> None:
    """No block that a call writes stands anywhere else in the part of the table that it uses."""
    B, columns = block_table.shape
    index = torch.arange(columns, device=block_table.device)
    used = index * BLOCK < ends[:, None]
    written = used & ((index + 1) * BLOCK > starts[:, None])
    ids = block_table.long()
    if not pool:  # each request has blocks of its own
        ids = ids + torch.arange(B, device=ids.device)[:, None] * Nblk
    ids = ids.masked_fill(~used, B * Nblk)
    counts = torch.zeros(B * Nblk + 1, dtype=torch.int64, device=ids.device)
    counts.scatter_add_(0, ids.flatten(), torch.ones_like(ids).flatten())
    bad = written & (counts[ids] > 1)
    if bad.any():
        b, i = (int(x) for x in bad.nonzero()[0])
        raise BlockTableError(
            f"block_table[{b}, {i}] = {int(block_table[b, i])}, which is written and named more than once",
            "each written block once in the used part of block_table",
            "Two tokens would be written to one place, or one read where another is written",
            "Give each request blocks of its own for its new tokens; copy a shared block before writing to it",
        )


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
