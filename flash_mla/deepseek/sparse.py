"""Token-sparse attention: the prefill function, and the checks and launch that sparse decode shares with it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any
from weakref import ReferenceType, ref

import torch
from torch import Tensor

from flash_mla.autograd import (
    NO_SECOND_BACKWARD,
    differentiable,
    learning,
    no_backward,
    refusal,
    refuse_op,
    refusing,
    transformed,
)
from flash_mla.contract import (
    check_head_dims,
    check_index,
    check_last_dim,
    check_on,
    check_rank,
    check_scale,
    check_sink,
    check_tensor,
    is_aligned,
    named,
)
from flash_mla.deepseek.checks import check_out, check_query, check_same_dtype, given, writable
from flash_mla.entry import entry
from flash_mla.errors import HeadGroupingError, ShapeError
from flash_mla.passed import Passed, traced
from flash_mla.plan import Plan, plan
from flash_mla.problem import (
    FP8,
    SparseArgs,
    SparseBackwardArgs,
    SparseBackwardProblem,
    SparseKeys,
    SparseProblem,
    SparseSet,
)
from flash_mla.quant import FORMATS, RowFormat


@entry("flash_mla.deepseek")
def flash_mla_sparse_fwd(
    q: Tensor,
    kv: Tensor,
    indices: Tensor,
    sm_scale: float,
    d_v: int = 512,
    attn_sink: Tensor | None = None,
    topk_length: Tensor | None = None,
    out: Tensor | None = None,
    *,
    backend: str | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Sparse prefill: each query token attends to the rows of kv that it names.

    Args:
        q: [s_q, h_q, d], BF16, FP16 or (CPU, Triton) FP32; kv: [s_kv, 1, d] in the same dtype; last dims contiguous.
        indices: [s_q, 1, topk] int32; a negative one or one >= s_kv names no token.
        sm_scale: of the scores. d_v: columns of kv that are V.
        attn_sink: [h_q] FP32, as in flash_mla_with_kvcache; no effect on max_logits and lse.
        topk_length: [s_q] int32, only the leftmost so many indices of each token count.
        out: [s_q, h_q, d_v] to write into (vLLM's argument), last dim contiguous. Default: a new tensor.
        backend: run this backend or raise; None takes the first that can.

    Returns:
        out [s_q, h_q, d_v] in q's dtype; max_logits [s_q, h_q] FP32, the greatest scaled score; lse [s_q, h_q] FP32,
        natural log. A query without keys: 0, -inf, +inf. out and lse carry gradients to q, kv (the sum over all that
        name a row) and attn_sink, the same bits in every run; through max_logits a backward raises.
    """
    if q.dim() != 3 or kv.dim() != 3:  # all else is checked below, once for each set of facts
        check_query(q, "[s_q, h_q, d]", 3)
        check_rank("kv", kv.shape, 3, "[s_kv, h_kv, d]")
    if not (compiling := traced(q)) and not transformed() and not learning(q, kv, attn_sink):
        return sparse_prefill(q, kv, indices, sm_scale, d_v, attn_sink, topk_length, backend, out)
    check_out(out, q, d_v, kv=kv, indices=indices, attn_sink=attn_sink, topk_length=topk_length)
    check_scale(sm_scale)
    scale = q.shape[2] ** -0.5 if sm_scale is None else float(sm_scale)
    attend = torch.ops.flash_mla.flash_mla_sparse_fwd if compiling else SparsePrefill.apply
    result, max_logits, lse = attend(q, kv, indices, scale, d_v, attn_sink, topk_length, backend)
    return given(out, result), max_logits, lse


def row_format(q: Tensor, cache: Tensor) -> RowFormat:
    """The format whose rows are as long as the cache's."""
    size, D = cache.shape[3], q.shape[3]
    found = next((fmt for fmt in FORMATS.values() if fmt.row_bytes == size), None)
    if found is None or found.head_dim != D or q.dtype != torch.bfloat16:
        known = ", ".join(f"{fmt.name} {fmt.row_bytes} bytes for d = {fmt.head_dim}" for fmt in FORMATS.values())
        raise ShapeError(
            f"{named(q=q, k_cache=cache)} {q.dtype}, is_fp8_kvcache = True",
            f"BF16 q, and rows of one of: {known}",
            "No row format has rows of that size for this q",
            "Quantise the cache with flash_mla.quant.FORMATS[name].quantise",
        )
    return found


PREFIXES = ("", "extra_")
"""What stands before the names of the first cache's arguments, and of the second's."""


def check_keys(keys: SparseKeys, prefix: str, q: Tensor, fmt: RowFormat | None) -> None:
    """Shapes, dtypes and devices of a cache [num_blocks, page, 1, d] and of what is read of it against q's; `fmt` of
    the rows, None in q's dtype."""
    cache, indices, lengths = f"{prefix}k_cache", f"{prefix}indices", f"{prefix}topk_length"
    check_tensor(cache, keys.cache)
    check_tensor(indices, keys.indices)
    check_on(q.device, **{cache: keys.cache, indices: keys.indices, lengths: keys.lengths})
    check_rank(cache, keys.cache.shape, 4, "[num_blocks, page, 1, d]")
    if keys.cache.shape[2] != 1:
        raise HeadGroupingError(
            f"{cache} {list(keys.cache.shape)}",
            "h_kv = 1",
            "Sparse attention is multi-query",
            "Call once for each KV head",
        )
    if fmt is not None:
        fmt.check(keys.cache)
    else:
        check_same_dtype(q, cache, keys.cache)
        check_last_dim(cache, keys.cache)
        if keys.cache.shape[3] != q.shape[3]:
            raise ShapeError(named(q=q, **{cache: keys.cache}), "the same d", f"`{cache}` and q differ in d")
    check_index(indices, keys.indices, (*q.shape[:2], -1), "[b, s_q, topk] ([s_q, 1, topk] in prefill)")
    check_last_dim(indices, keys.indices)
    if keys.lengths is not None:
        check_index(lengths, keys.lengths, q.shape[:1], "[b] ([s_q] in prefill)")


def as_launched(keys: SparseKeys, formatted: bool) -> SparseKeys:
    """As a launch takes them: rows of a format as bytes, and lengths contiguous, since kernels read no stride."""
    cache, indices, lengths = keys
    if formatted and cache.dtype is not torch.uint8:
        cache = cache.view(torch.uint8)
    elif lengths is None:
        return keys
    return SparseKeys(cache, indices, None if lengths is None else lengths.contiguous())


PASSED: Passed[ReferenceType[Plan]] = Passed()
"""Plans, weak as in `calls.Served`."""


def sparse(
    q: Tensor,
    keys: tuple[SparseKeys, ...],
    formatted: bool,
    Dv: int,
    softmax_scale: float | None,
    attn_sink: Tensor | None,
    max_logits: bool,
    backend: str | None,
    out: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """(out, lse, max_logits) as in `SparseArgs`, of a call as it was given; the out that was given, if one was.

    Args:
        q, keys: in prefill (`max_logits`) without a dim of requests. lse is +inf on a row without keys.
        formatted: the rows have a format.
    """
    chosen = plan_sparse(q, keys, formatted, Dv, softmax_scale, attn_sink, max_logits, backend)
    if out is not None:
        tensors = {f"{n}{name}": x for n, one in zip(PREFIXES, keys, strict=False) for name, x in one._asdict().items()}
        check_out(out, q, Dv, attn_sink=attn_sink, **tensors)
    keys = tuple([as_launched(x, formatted) for x in keys])
    sink = None if attn_sink is None else attn_sink.contiguous()
    scale = q.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale
    like_out, like_lse = chosen.results_like(q)
    written = writable(out)
    result = torch.empty_like(like_out) if written is None else written
    lse = torch.empty_like(like_lse)
    most = torch.empty_like(like_lse) if max_logits else None
    chosen.launch(SparseArgs(q, keys, sink, scale, result, lse, most, math.inf))
    out = given(out, result)
    # in decode; prefill has a backward, and comes here without gradients
    if not max_logits and (inputs := learning(q, attn_sink, *[x.cache for x in keys])):
        out, lse = (refusing("deepseek.flash_mla_with_kvcache", x, inputs) for x in (out, lse))
    return out, lse, most


def plan_sparse(
    q: Tensor,
    keys: tuple[SparseKeys, ...],
    formatted: bool,
    Dv: int,
    softmax_scale: float | None,
    attn_sink: Tensor | None,
    max_logits: bool,
    backend: str | None,
) -> Plan:
    """The plan of a call, every check made where it did not pass before; the arguments are `sparse`'s."""
    sign = check_scale(softmax_scale)
    tensors, rest = (q, attn_sink, *keys[0], *(keys[1] if len(keys) > 1 else ())), None
    if not traced(q):  # a traced tensor has no address
        rest = (formatted, type(Dv), Dv, sign, max_logits, backend)
        known = PASSED.get(tensors, rest)
        if known is not None and (chosen := known()) is not None:
            return chosen
    if max_logits:
        q, keys = q.unsqueeze(1), tuple([x._replace(cache=x.cache.unsqueeze(0)) for x in keys])
    check_query(q, "[b, s_q, h_q, d]", 4)
    check_tensor("k_cache", keys[0].cache)
    check_rank("k_cache", keys[0].cache.shape, 4, "[num_blocks, page, h_kv, d]")
    fmt = row_format(q, keys[0].cache) if formatted else None
    for one, prefix in zip(keys, PREFIXES, strict=False):
        check_keys(one, prefix, q, fmt)
    check_head_dims(q.shape[3], Dv)
    check_sink(attn_sink, q.shape[2], q.device)
    if q.dtype == FP8 or Dv > q.shape[3]:
        raise ShapeError(
            f"q {list(q.shape)} {q.dtype}, head_dim_v = {Dv}",
            "BF16, FP16 or FP32 q, head_dim_v <= d",
            "V lies inside K",
        )
    keys = tuple([as_launched(x, formatted) for x in keys])
    problem = sparse_problem(q, fmt, keys, Dv, sign, attn_sink, max_logits)
    chosen = plan(problem, backend)
    PASSED.keep(tensors, rest, ref(chosen))
    return chosen


def sparse_problem(
    q: Tensor,
    fmt: RowFormat | None,
    keys: Sequence[SparseKeys],
    Dv: int,
    scale_sign: int,
    attn_sink: Tensor | None,
    max_logits: bool,
) -> SparseProblem:
    """The problem of checked tensors."""
    B, S_q, Hq, D = q.shape
    return SparseProblem(
        device=q.device,
        dtype=q.dtype,
        B=B,
        S_q=S_q,
        Hq=Hq,
        D=D,
        Dv=Dv,
        format=None if fmt is None else fmt.name,
        sets=tuple(
            SparseSet(
                topk=indices.shape[2],
                pages=cache.shape[0],
                page=cache.shape[1],
                cache_strides=(cache.stride(0), cache.stride(1)),
                index_strides=(indices.stride(0), indices.stride(1)),
                lengths=lengths is not None,
            )
            for cache, indices, lengths in keys
        ),
        q_strides=q.stride(),
        sink=attn_sink is not None,
        max_logits=max_logits,
        scale_sign=scale_sign,
        aligned=is_aligned(q, *(x.cache for x in keys)),
    )


# --- Prefill and its backward -----------------------------------------------------------------------------------------


def sparse_prefill(
    q: Tensor,
    kv: Tensor,
    indices: Tensor,
    sm_scale: float | None,
    d_v: int,
    attn_sink: Tensor | None,
    topk_length: Tensor | None,
    backend: str | None,
    out: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """(out, max_logits, lse) of flash_mla_sparse_fwd."""
    keys = (SparseKeys(kv, indices, topk_length),)
    result, lse, max_logits = sparse(q, keys, False, d_v, sm_scale, attn_sink, True, backend, out)
    assert max_logits is not None
    return result, max_logits, lse


@torch.library.custom_op("flash_mla::flash_mla_sparse_fwd", mutates_args=())
def sparse_prefill_op(
    q: Tensor,
    kv: Tensor,
    indices: Tensor,
    sm_scale: float,
    d_v: int,
    attn_sink: Tensor | None,
    topk_length: Tensor | None,
    backend: str | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """flash_mla_sparse_fwd where a backward is recorded, or a graph traced."""
    with torch.no_grad():
        return sparse_prefill(q, kv, indices, sm_scale, d_v, attn_sink, topk_length, backend)


@sparse_prefill_op.register_fake
def fake_sparse_prefill(
    q: Tensor, kv: Tensor, indices: Tensor, sm_scale: float, d_v: int, *_: Any
) -> tuple[Tensor, Tensor, Tensor]:
    """Shapes and dtypes of (out, max_logits, lse)."""
    max_logits, lse = (q.new_empty(q.shape[:2], dtype=torch.float32) for _ in range(2))
    return q.new_empty((*q.shape[:2], d_v)), max_logits, lse


@torch.library.custom_op("flash_mla::flash_mla_sparse_backward", mutates_args=())
def sparse_backward_op(
    d_out: Tensor,
    d_max_logits: Tensor | None,
    d_lse: Tensor,
    q: Tensor,
    kv: Tensor,
    indices: Tensor,
    attn_sink: Tensor | None,
    topk_length: Tensor | None,
    out: Tensor,
    lse: Tensor,
    sm_scale: float,
    backend: str | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """(dq, dkv, d_sink), d_sink empty without a sink."""
    if d_max_logits is not None and d_max_logits.any():
        no_backward(
            "max_logits of flash_mla_sparse_fwd",
            "the greatest score carries no gradient",
            "Detach max_logits; out and lse carry gradients",
        )
    with torch.no_grad():
        q = q.unsqueeze(1)
        keys = SparseKeys(kv.transpose(0, 1), indices, None if topk_length is None else topk_length.contiguous())
        dq, dkv, d_sink = fake_sparse_backward(
            d_out, d_max_logits, d_lse, q, kv, indices, attn_sink, topk_length, out, lse, sm_scale, backend
        )
        args = SparseBackwardArgs(
            q=q,
            keys=keys,
            attn_sink=None if attn_sink is None else attn_sink.contiguous(),
            softmax_scale=sm_scale,
            out=out.unsqueeze(1),
            lse=lse.unsqueeze(1),
            d_out=(d_out if d_out.stride(-1) == 1 else d_out.contiguous()).unsqueeze(1),
            d_lse=d_lse.unsqueeze(1),
            dq=dq,
            dkv=dkv.transpose(0, 1),
            d_sink=None if attn_sink is None else d_sink,
        )
        forward = sparse_problem(q, None, [keys], out.shape[-1], check_scale(sm_scale), attn_sink, True)
        plan(SparseBackwardProblem(forward), None if backend == "hopper" else backend).launch(args)
    return dq.squeeze(1), dkv, d_sink


@sparse_backward_op.register_fake
def fake_sparse_backward(
    d_out: Tensor,
    d_max_logits: Tensor | None,
    d_lse: Tensor,
    q: Tensor,
    kv: Tensor,
    indices: Tensor,
    attn_sink: Tensor | None,
    *_: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    """Contiguous gradients."""
    d_sink = q.new_empty(0 if attn_sink is None else attn_sink.shape, dtype=torch.float32)
    return q.new_empty(q.shape), kv.new_empty(kv.shape), d_sink


def save_sparse(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    q, kv, indices, sm_scale, _, attn_sink, topk_length, backend = inputs
    out, _, lse = output
    ctx.options = sm_scale, backend
    # a zero gradient of max_logits would have to be looked at, which waits for the GPU
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(q, kv, indices, attn_sink, topk_length, out, lse)


def sparse_backward(
    ctx: Any, d_out: Tensor | None, d_max_logits: Tensor | None, d_lse: Tensor | None
) -> tuple[Tensor | None, ...]:
    q, kv, indices, attn_sink, topk_length, out, lse = ctx.saved_tensors
    d_out, d_lse = (torch.zeros_like(x) if d is None else d for x, d in ((out, d_out), (lse, d_lse)))
    dq, dkv, d_sink = SparseBackward.apply(
        d_out, d_max_logits, d_lse, q, kv, indices, attn_sink, topk_length, out, lse, *ctx.options
    )
    return dq, dkv, None, None, None, None if attn_sink is None else d_sink, None, None


SparsePrefill = differentiable("flash_mla_sparse_fwd", save_sparse, sparse_backward)
SparseBackward = differentiable("flash_mla_sparse_backward", *refusal("flash_mla_sparse_fwd", *NO_SECOND_BACKWARD))
sparse_prefill_op.register_autograd(sparse_backward, setup_context=save_sparse)
refuse_op(sparse_backward_op, "flash_mla_sparse_fwd", *NO_SECOND_BACKWARD)
