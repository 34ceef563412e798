"""decode_over_pages: the door for caches as serving engines hold them, read where they lie.

The reference's functions ask for blocks of 64 tokens, each one slab. Engines hold pages of 16, 32 or a multiple of 64
tokens, heads inside or outside of a page, K beside V in one tensor or in one row, and MLA's latent and rope in tensors
of their own. All of that is strides: a page view `[B, Hk, num_blocks, page, D]` of the memory, which the same kernels
read. No cache is copied, whatever its size.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal, NamedTuple, overload
from weakref import ReferenceType, ref

import torch
from torch import Tensor

from flash_mla import contract
from flash_mla.backends import choose
from flash_mla.calls import as_tensors, give_back
from flash_mla.contract import NO_DESCALES, DecodeCall, Descales, named
from flash_mla.entry import entry
from flash_mla.errors import BlockCountError, LayoutError, ShapeError
from flash_mla.heads import as_heads, by_token, from_heads
from flash_mla.launch import attend_decode, expand_descale
from flash_mla.passed import Passed, spans, traced
from flash_mla.plan import Plan, plan, without_memory
from flash_mla.problem import BLOCK, PLAIN, DecodeArgs, DecodeProblem, Options

__all__ = ["decode_over_pages"]

LAYOUTS = {"NHD": "[num_blocks, page, Hk, D]", "HND": "[num_blocks, Hk, page, D]"}


@overload
def decode_over_pages(
    q: Tensor, k_pages: Tensor, v_pages: Tensor | None, block_table: Tensor, seq_lens: Tensor,
    mask: Tensor | None = ..., *, layout: str = ..., k_rope_pages: Tensor | None = ..., v_head_dim: int | None = ...,
    causal: bool = ..., check_values: bool = ..., softmax_scale: float | None = ...,
    q_descale: float | Tensor | None = ..., k_descale: float | Tensor | None = ...,
    v_descale: float | Tensor | None = ..., attn_sink: Tensor | None = ..., return_lse: Literal[False] = False,
    out: Tensor | None = ..., tail_mask: Tensor | None = ..., batch_invariant: bool = ..., backend: str | None = ...,
) -> Tensor: ...  # fmt: skip


@overload
def decode_over_pages(
    q: Tensor, k_pages: Tensor, v_pages: Tensor | None, block_table: Tensor, seq_lens: Tensor,
    mask: Tensor | None = ..., *, layout: str = ..., k_rope_pages: Tensor | None = ..., v_head_dim: int | None = ...,
    causal: bool = ..., check_values: bool = ..., softmax_scale: float | None = ...,
    q_descale: float | Tensor | None = ..., k_descale: float | Tensor | None = ...,
    v_descale: float | Tensor | None = ..., attn_sink: Tensor | None = ..., return_lse: Literal[True],
    out: Tensor | None = ..., tail_mask: Tensor | None = ..., batch_invariant: bool = ..., backend: str | None = ...,
) -> tuple[Tensor, Tensor]: ...  # fmt: skip


@overload
def decode_over_pages(
    q: Tensor, k_pages: Tensor, v_pages: Tensor | None, block_table: Tensor, seq_lens: Tensor,
    mask: Tensor | None = ..., *, layout: str = ..., k_rope_pages: Tensor | None = ..., v_head_dim: int | None = ...,
    causal: bool = ..., check_values: bool = ..., softmax_scale: float | None = ...,
    q_descale: float | Tensor | None = ..., k_descale: float | Tensor | None = ...,
    v_descale: float | Tensor | None = ..., attn_sink: Tensor | None = ..., return_lse: bool, out: Tensor | None = ...,
    tail_mask: Tensor | None = ..., batch_invariant: bool = ..., backend: str | None = ...,
) -> Tensor | tuple[Tensor, Tensor]: ...  # fmt: skip


@entry("flash_mla")
def decode_over_pages(
    q: Tensor,
    k_pages: Tensor,
    v_pages: Tensor | None,
    block_table: Tensor,
    seq_lens: Tensor,
    mask: Tensor | None = None,
    *,
    layout: str = "NHD",
    k_rope_pages: Tensor | None = None,
    v_head_dim: int | None = None,
    causal: bool = True,
    check_values: bool = True,
    softmax_scale: float | None = None,
    q_descale: float | Tensor | None = None,
    k_descale: float | Tensor | None = None,
    v_descale: float | Tensor | None = None,
    attn_sink: Tensor | None = None,
    return_lse: bool = False,
    out: Tensor | None = None,
    tail_mask: Tensor | None = None,
    batch_invariant: bool = False,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Decode over a pool of pages that all requests share, in the layout of a serving engine. Nothing is copied.

    Only the last dim of q, the pages and out must be contiguous; all other strides are free, so that K and V may be
    slices of one tensor or of one row.

    Args:
        q: [B, Hq, S_q, D], BF16, FP16, FP8 (e4m3) or (CPU, Triton) FP32.
        k_pages: [num_blocks, page, Hk, D] or, with layout="HND", [num_blocks, Hk, page, D], in q's dtype, or FP8 under
            BF16 or FP16 q. page: 16, 32 or a multiple of 64 tokens.
        v_pages: likewise with Dv columns. None: V is the first v_head_dim columns of k_pages (MLA), read once.
        block_table: [B, max_pages] int32 or int64: token t of request b is in page block_table[b, t // page].
        seq_lens: [B] int32 or int64, tokens in the cache, the new ones included. 0: out 0, lse -inf.
        mask, tail_mask, batch_invariant: as in flash_mla_with_kvcache.
        layout: "NHD" (default) or "HND", of all three pools.
        k_rope_pages: K's last columns where the latent is split: k_pages then holds the first Dv (ckv), this one the
            D - Dv others (kpe), and V is k_pages. On a GPU, D is no power of two and Dv the
            greatest below it (512 + 64, 128 + 64). Default None.
        v_head_dim: Dv where v_pages is None. Default: all columns of k_pages.
        causal: without a mask, query i sees keys t <= seq_lens[b] - S_q + i (default); False: every key.
        check_values: read seq_lens and block_table and check them, which waits for the GPU. False, in an engine's loop:
            no value is read.
        softmax_scale, q_descale, k_descale, v_descale, attn_sink, return_lse, backend: as in flash_mla_with_kvcache.
        out: [B, Hq, S_q, Dv] to write into, apart from every other tensor; only its last dim need be contiguous.

    Returns:
        out [B, Hq, S_q, Dv] of q's dtype (BF16 for FP8), or (out, lse [B, Hq, S_q] FP32).

    Raises:
        FlashMLAError: one of its subclasses, before anything is written: see docs/contract.md, section 8.
    """
    mask, tail = contract.one_mask(mask, tail_mask), tail_mask is not None
    descales = (q_descale, k_descale, v_descale)
    if traced(q):
        result = torch.ops.flash_mla.decode_over_pages(
            q, k_pages, v_pages, block_table, seq_lens, mask, layout, k_rope_pages, v_head_dim, causal, check_values,
            softmax_scale, *as_tensors(descales, q), attn_sink, tail, batch_invariant, backend, out,
        )  # fmt: skip
        return give_back(result, return_lse, out)
    call = PoolCall(
        q, k_pages, v_pages, k_rope_pages, block_table, seq_lens, mask, layout, v_head_dim, causal, softmax_scale,
        descales, attn_sink, Options(tail, batch_invariant),
    )  # fmt: skip
    result = attend_pools(call, return_lse, out, backend, check_values=check_values)
    if softmax_scale is None and v_pages is None:
        contract.warn_default_scale(q.shape[3], v_head_dim or k_pages.shape[3], stacklevel=3)
    return result


class PoolCall(NamedTuple):
    """A `decode_over_pages` call as the user gave it, but for check_values, backend and out."""

    q: Tensor
    k_pages: Tensor
    v_pages: Tensor | None
    k_rope_pages: Tensor | None
    block_table: Tensor
    seq_lens: Tensor
    mask: Tensor | None = None
    layout: str = "NHD"
    v_head_dim: int | None = None
    causal: bool = True
    softmax_scale: float | None = None
    descales: Descales = NO_DESCALES
    attn_sink: Tensor | None = None
    options: Options = PLAIN
    by_token: bool = False
    """q lies as [B, S_q, Hq, D], and out will."""

    @property
    def tensors(self) -> tuple[Any, ...]:
        """What the call reads."""
        q, k_pages, v_pages, k_rope_pages, table, lengths, mask, _, _, _, _, descales, sink, _, _ = self
        return (q, k_pages, v_pages, k_rope_pages, table, lengths, mask, sink, *descales)

    def by_head(self) -> PoolCall:
        """The same with q [B, Hq, S_q, D]."""
        return self._replace(q=self.q.transpose(1, 2), by_token=False) if self.by_token else self


# --- Views ------------------------------------------------------------------------------------------------------------


def page_views(call: PoolCall) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
    """(k, v, k_rope, table): page views [B, Hk, num_blocks, page, columns] of checked pools, and their table."""
    check_pools(call)
    width = check_columns(call)
    order = (2, 0, 1, 3) if call.layout == "NHD" else (1, 0, 2, 3)
    given = [pool for pool in (call.k_pages, call.v_pages, call.k_rope_pages) if pool is not None]
    views = [pool.permute(order).expand(call.q.shape[0], -1, -1, -1, -1) for pool in given]
    views, table = as_blocks(views, call.block_table.contiguous())
    k = views[0]
    v = k[..., :width] if call.v_pages is None else views[1]
    return k, v, None if call.k_rope_pages is None else views[-1], table


def check_pools(call: PoolCall) -> None:
    """The layout, and what each tensor must be; pools have the same num_blocks, page and Hk."""
    q, k_pages, v_pages, k_rope_pages, block_table, _, _, layout, *_ = call
    if layout not in LAYOUTS:
        raise ShapeError(f"layout = {layout!r}"[:200], "'NHD' or 'HND'", "`layout` names no layout", "Pass one of them")
    contract.check_tensor("q", q)
    contract.check_rank("q", q.shape, 4, "[B, Hq, S_q, D]")
    contract.check_tensor("block_table", block_table)
    contract.check_index("block_table", block_table, (q.shape[0], -1), "[B, max_pages]")
    for name, pool in (("k_pages", k_pages), ("v_pages", v_pages), ("k_rope_pages", k_rope_pages)):
        if pool is None and name != "k_pages":
            continue
        contract.check_tensor(name, pool)
        assert pool is not None
        contract.check_rank(name, pool.shape, 4, LAYOUTS[layout])
        contract.check_last_dim(name, pool)
        if pool.shape[:3] != k_pages.shape[:3]:
            raise ShapeError(
                named(k_pages=k_pages, **{name: pool}),
                f"the same num_blocks, page and Hk, as {layout} {LAYOUTS[layout]}",
                f"`k_pages` and `{name}` differ",
            )
    contract.check_last_dim("q", q)
    contract.check_on(q.device, block_table=block_table, k_pages=k_pages, v_pages=v_pages, k_rope_pages=k_rope_pages)
    page = k_pages.shape[1 if layout == "NHD" else 2]
    if page not in (16, 32) and (page % BLOCK or not page):
        raise BlockCountError(
            f"{named(k_pages=k_pages)}, layout {layout}: pages of {page} tokens",
            f"pages of 16, 32 or a multiple of {BLOCK} tokens",
            "The kernels' tiles do not fit such pages",
            "Re-pack the pool, or name the other layout",
        )


def check_columns(call: PoolCall) -> int:
    """The columns of K, which are q's D, and of V, which is given once; returns Dv where V lies inside K."""
    q, k_pages, v_pages, k_rope_pages, *_ = call
    v_head_dim = call.v_head_dim
    pools = {"k_pages": k_pages, "v_pages": v_pages, "k_rope_pages": k_rope_pages}
    shapes = named(q=q, **{name: pool for name, pool in pools.items() if pool is not None})
    D, columns = q.shape[3], k_pages.shape[3] + (0 if k_rope_pages is None else k_rope_pages.shape[3])
    if columns != D:
        raise ShapeError(
            shapes, f"k_pages{'' if k_rope_pages is None else ' and k_rope_pages'} of q's D = {D} columns",
            "The rows of K and of q differ in D", contract.UNABSORBED,
        )  # fmt: skip
    if v_pages is not None and (k_rope_pages is not None or v_head_dim not in (None, v_pages.shape[3])):
        raise ShapeError(
            f"{shapes}, v_head_dim = {v_head_dim}",
            "v_pages None where the latent is split, and v_head_dim None or v_pages' columns",
            "V is given twice",
            "Leave v_pages or the other out",
        )
    width = k_pages.shape[3] if v_head_dim is None else v_head_dim
    if v_pages is None and not (isinstance(width, int) and 0 < width <= k_pages.shape[3]):
        raise ShapeError(
            f"{named(k_pages=k_pages)}, v_head_dim = {v_head_dim!r}"[:300],
            f"v_head_dim from 1 to {k_pages.shape[3]}",
            "V is the first v_head_dim columns of K",
        )
    if k_rope_pages is not None and width != k_pages.shape[3]:
        raise ShapeError(
            f"{shapes}, v_head_dim = {v_head_dim}",
            f"v_head_dim = {k_pages.shape[3]}, all columns of k_pages",
            "The latent of a split row is V",
            "Leave v_head_dim out",
        )
    return width


def as_blocks(views: list[Tensor], table: Tensor) -> tuple[list[Tensor], Tensor]:
    """Pages of 64m tokens whose rows lie evenly, as 64-token blocks: what every backend reads."""
    page = views[0].shape[3]
    parts = page // BLOCK
    if page <= BLOCK or any(x.shape[2] > 1 and x.stride(2) != page * x.stride(3) for x in views):
        return views, table
    return [x.unflatten(3, (parts, BLOCK)).flatten(2, 3) for x in views], table_of_blocks(table, parts)


def table_of_blocks(table: Tensor, parts: int) -> Tensor:
    """A table of pages of `parts` blocks as one of blocks; int64, since an unused entry may be 2^31-1."""
    return (table.long().unsqueeze(2) * parts + torch.arange(parts, device=table.device)).flatten(1)


# --- Checks -----------------------------------------------------------------------------------------------------------


class View(NamedTuple):
    """Where a page view lies over its pool."""

    shape: tuple[int, ...]
    strides: tuple[int, ...]

    def of(self, pool: Tensor) -> Tensor:
        return pool.as_strided(self.shape, self.strides)


class Route(NamedTuple):
    """What a call that passed its checks leaves to one with the same facts.

    Attributes:
        plan: of the problem, or of the same one with q and out packed; weak, as in `calls.Served`.
        problem: over the page views, its queries as heads where `folded`, else 0, says how many a request has.
        packed: the plan's own problem has q and out packed.
        k, v, k_rope: the page views; v's is over K's pool where V is K's first columns.
        parts: blocks that a page was cut into.
        like: a tensor like out, without memory, where the plan's launch takes q, pools and out as the call has them.
        spans: of out, then of the call's tensors.
    """

    plan: ReferenceType[Plan]
    problem: DecodeProblem
    folded: int
    packed: bool
    k: View
    v: View
    k_rope: View | None
    parts: int
    like: Tensor | None
    spans: tuple[int, ...] = ()

    def views(self, call: PoolCall) -> DecodeCall:
        """The call over page views, or over what they are views of where the launch takes it."""
        q, k, v, rope, table, lengths, mask, _, _, _, scale, descales, sink, options, by_token = call
        if self.like is not None:
            v = k if v is None else v
            return DecodeCall(q, k, v, table.contiguous(), lengths, mask, scale, descales, sink, options)
        q = q.transpose(1, 2) if by_token else q
        k_rope = None if rope is None or self.k_rope is None else self.k_rope.of(rope)
        table = table.contiguous() if self.parts == 1 else table_of_blocks(table, self.parts)
        v = self.v.of(k if v is None else v)
        return DecodeCall(q, self.k.of(k), v, table, lengths, mask, scale, descales, sink, options, k_rope)


# NOTE: 30 us less on the host than views and checks (EPYC, minima of a thread's time).
ROUTES = Passed[Route]()


def checked(call: PoolCall, out: Tensor | None) -> tuple[DecodeProblem, DecodeCall]:
    """The problem of a call, and the call over page views; reads no value, and of out only how it lies."""
    scale_sign = contract.check_scale(call.softmax_scale)
    k, v, k_rope, table = page_views(call)
    views = DecodeCall(
        call.q, k, v, table, call.seq_lens, call.mask, call.softmax_scale, call.descales, call.attn_sink, call.options,
        k_rope,
    )  # fmt: skip
    problem = pages_problem(views, scale_sign)
    if out is not None:
        contract.check_tensor("out", out)
        if not out.is_contiguous():
            check_spread(out)
            problem = problem._replace(out_strides=out.stride())
        problem = problem._replace(aligned=problem.aligned and contract.is_aligned(out))
    return problem, views


def pages_problem(call: DecodeCall, scale_sign: int) -> DecodeProblem:
    """The problem of a call over page views without out; reads no value."""
    q, k, v, table, seq_lens, mask, _, descales, attn_sink, options, k_rope = call
    B, Hq, S_q, D = q.shape
    Hk = k.shape[1]
    contract.check_tensor("seq_lens", seq_lens)
    contract.check_on(q.device, seq_lens=seq_lens, mask=mask)
    contract.check_decode_dtypes(q, k, v)
    if k_rope is not None:
        contract.check_dtypes(k_pages=k, k_rope_pages=k_rope)
    contract.check_grouping(Hq, Hk)
    contract.check_head_dims(D, v.shape[4])
    contract.check_seq_lens_shape(seq_lens, B)
    contract.check_sink(attn_sink, Hq, q.device)
    return contract.decode_problem(
        q, k, v, table, k_rope, alias=contract.is_alias(k, v),
        mask=contract.check_decode_mask(mask, options.tail, B, Hq, S_q),
        descale=contract.check_descales(descales, B, Hk, q.device), sink=attn_sink is not None,
        scale_sign=scale_sign, **options._asdict(),
    )  # fmt: skip


def check_spread(out: Tensor) -> None:
    """A strided out: rows contiguous, no two rows on the same memory."""
    contract.check_last_dim("out", out)
    extent = out.shape[-1]
    for stride, size in sorted(zip(out.stride()[:-1], out.shape[:-1], strict=True)):
        if size > 1 and stride < extent:
            raise LayoutError(
                f"{named(out=out)} with strides {out.stride()}",
                "rows that do not overlap",
                "`out` has several names for the same memory",
                "Pass another tensor, or none",
            )
        extent = max(extent, stride * (size - 1) + extent)


# --- Calls ------------------------------------------------------------------------------------------------------------


class Planned(NamedTuple):
    """A call that passed every check: over page views, its problem, and the plan, whose own may have q and out packed.

    `folded`: S_q of a call without causality, whose queries see the same keys, as the heads of a group do, and are
    heads here; 0 of any other. `like`: see `Route`; the call may then be over the pools.
    """

    plan: Plan
    problem: DecodeProblem
    call: DecodeCall
    folded: int
    packed: bool
    like: Tensor | None


Also = Callable[[PoolCall], None]
"""What another door checks of a call before our own checks; a function of a module, since it tells calls apart."""


def plan_pools(
    call: PoolCall,
    backend: str | None,
    out: Tensor | None,
    check_values: bool,
    out_is_new: bool = False,
    also: Also | None = None,
) -> Planned:
    """Every check of the call, and its plan.

    out_is_new: out is nobody else's, and of the right kind. also: what another door checks first.
    """
    _, k, v, _, _, _, _, layout, width, causal, _, _, _, options, by_token = call
    # NOTE: 512.0 == 512, as a key too
    rest, tensors = None, (*call.tensors, out)
    if not traced(call.q):
        rest = contract.rest_of(
            call, k, k if v is None else v, options, layout, type(width), width, causal, by_token, backend, out_is_new,
            also,
        )  # fmt: skip
    route = ROUTES.get(tensors, rest)
    chosen = None if route is None else route.plan()
    if route is None or chosen is None:
        if also is not None:
            also(call)
        problem, views = checked(call.by_head(), out)
        if by_token:
            problem = by_token_out(problem)
        if not out_is_new:
            contract.check_out(out, problem, call)
        chosen, route = route_of(call, views, problem, backend)
        if rest is not None:
            ROUTES.keep(tensors, rest, route._replace(spans=spans(out, *call.tensors)))
    else:
        if out is not None and not out_is_new:
            contract.check_out_again(out, route.spans, call)
        views = route.views(call)
    views = fold(views) if route.folded else views
    if check_values:
        longest = contract.check_values(views.block_table, views.seq_lens, route.problem.Nblk, page=route.problem.page)
        contract.check_mask_length("mask", None if call.options.tail else call.mask, longest)
    return Planned(chosen, route.problem, views, route.folded, route.packed, route.like)


def by_token_out(problem: DecodeProblem) -> DecodeProblem:
    """The problem with an out that lies as [B, S_q, Hq, Dv], contiguous."""
    B, Hq, S_q, Dv = problem.out_shape
    alike = B * Dv == 0 or Hq <= 1 or S_q <= 1
    return problem if alike else problem._replace(out_strides=(S_q * Hq * Dv, Dv, Hq * Dv, 1))


def route_of(call: PoolCall, views: DecodeCall, problem: DecodeProblem, backend: str | None) -> tuple[Plan, Route]:
    """The plan of a checked call, and its route but for the spans."""
    folded = problem.S_q if not call.causal and call.mask is None and problem.S_q > 1 else 0
    if folded:
        q = fold(views).q
        problem = problem._replace(Hq=q.shape[1], S_q=1, q_strides=q.stride(), out_strides=None)
    chosen = pick(problem, backend)
    k, v, rope = views.k_cache, views.v_cache, views.k_rope
    k_rope = None if rope is None else View(rope.shape, rope.stride())
    parts = call.k_pages.shape[1 if call.layout == "NHD" else 2] // problem.page
    k_view, v_view = View(k.shape, k.stride()), View(v.shape, v.stride())
    packed = chosen.problem != problem
    like = None
    if chosen.by_address and parts == 1 and not (folded or packed or rope is not None):
        like, _ = chosen.results_like(call.q)
        like = without_memory(torch.empty_like(like).transpose(1, 2)) if call.by_token else like
    return chosen, Route(ref(chosen), problem, folded, packed, k_view, v_view, k_rope, parts, like)


def attend_pools(
    call: PoolCall,
    return_lse: bool,
    out: Tensor | None = None,
    backend: str | None = None,
    *,
    check_values: bool = False,
    out_is_new: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """decode_over_pages but for its default scale's warning; `out_is_new`: see `plan_pools`."""
    return attend_planned(plan_pools(call, backend, out, check_values, out_is_new), out, return_lse)


def attend_planned(
    planned: Planned, out: Tensor | None, return_lse: bool, empty_lse: float = -math.inf
) -> Tensor | tuple[Tensor, Tensor]:
    """The attention of a call that passed its checks; empty_lse: lse of a row without keys."""
    return (attend_folded if planned.folded else attend_packed)(planned, out, return_lse, empty_lse)


def attend_packed(
    planned: Planned, out: Tensor | None, return_lse: bool, empty_lse: float
) -> Tensor | tuple[Tensor, Tensor]:
    """The attention; where the plan is of a packed problem, q is made contiguous, and out copied to."""
    chosen, _, call, _, packs, _ = planned
    if not packs:
        return attend_decode(chosen, call, out, return_lse, "decode_over_pages", empty_lse)
    packed = call._replace(q=call.q.contiguous())
    result = attend_decode(chosen, packed, None, return_lse, "decode_over_pages", empty_lse)
    if out is None:
        return result
    if isinstance(result, tuple):
        return out.copy_(result[0]), result[1]
    return out.copy_(result)


def pick(problem: DecodeProblem, backend: str | None) -> Plan:
    """The plan of the problem, or of the same one with q and out packed where the backend that serves wants them so."""
    Hq, S_q, D = problem.Hq, problem.S_q, problem.D
    packed = problem._replace(q_strides=(Hq * S_q * D, S_q * D, D, 1), out_strides=None)
    if problem.empty or packed == problem:
        return plan(problem, backend)
    best = plan(packed, backend)
    return best if isinstance(choose(best.name, problem), str) else plan(problem, best.name)


# --- Calls of a server's layer ----------------------------------------------------------------------------------------


class Bound(NamedTuple):
    """A call bound to its pool: what a layer of a server keeps, to attend again with other values of the same shapes.

    Attributes:
        plan: of the call's problem, or of the same one with q and out packed.
        k, v: page views of the pool, which they keep alive, or what these are views of.
        descales: of q, k and v, [B, Hk] each, or None.
        parts: blocks that a page was cut into.
        packed: q is made contiguous, and out copied to.
    """

    plan: Plan
    k: Tensor
    v: Tensor
    descales: tuple[Tensor | None, ...]
    softmax_scale: float
    parts: int
    packed: bool

    def attend(self, q: Tensor, block_table: Tensor, seq_lens: Tensor, out: Tensor, return_lse: bool) -> Tensor | None:
        """Write out [B, Hq, S_q, Dv] of a call with the facts of the one that was bound; its lse if asked for."""
        packed = self.packed
        lse = out.new_empty(out.shape[:3], dtype=torch.float32) if return_lse else None
        written = out.new_empty(out.shape) if packed else out
        self.plan.launch(self.args(q.contiguous() if packed else q, block_table, seq_lens, written, lse))
        if packed:
            out.copy_(written)
        return lse

    def args(self, q: Tensor, block_table: Tensor, seq_lens: Tensor, out: Tensor, lse: Tensor | None) -> DecodeArgs:
        """What the plan's launch takes, q and out packed where it wants them so."""
        table = block_table.contiguous() if self.parts == 1 else table_of_blocks(block_table, self.parts)
        q_descale, k_descale, v_descale = self.descales
        return DecodeArgs(
            q, self.k, self.v, table, seq_lens.contiguous(), None, q_descale, k_descale, v_descale, None,
            self.softmax_scale, out, lse,
        )  # fmt: skip


def bind(call: PoolCall, out: Tensor) -> Bound:
    """Check a causal call without mask, sink, rope pool or default scale, and bind it; no value is read.

    out: [B, Hq, S_q, Dv], nobody else's, and like that of all calls to come.
    """
    chosen, problem, views, _, packed, _ = plan_pools(call, None, out, False, out_is_new=True)
    assert call.softmax_scale is not None
    descales = tuple(expand_descale(x, problem) for x in call.descales)
    parts = call.k_pages.shape[1 if call.layout == "NHD" else 2] // problem.page
    return Bound(chosen, views.k_cache, views.v_cache, descales, call.softmax_scale, parts, packed)


# --- Without causality ------------------------------------------------------------------------------------------------


def fold(call: DecodeCall) -> DecodeCall:
    """The same attention with the S_q queries as heads (see `heads`), out contiguous."""
    Hk, S_q, sink = call.k_cache.shape[1], call.q.shape[2], call.attn_sink
    sink = None if sink is None else sink.view(Hk, 1, -1).expand(-1, S_q, -1).reshape(-1)
    return call._replace(q=as_heads(call.q, Hk), attn_sink=sink)


def attend_folded(
    planned: Planned, out: Tensor | None, return_lse: bool, empty_lse: float
) -> Tensor | tuple[Tensor, Tensor]:
    """The attention, its results where the queries were; written in place where `out` lies as they do as heads."""
    problem = planned.problem
    rows = None if out is None else by_token(out, problem.Hk)
    inside = rows.view(problem.out_shape) if rows is not None and rows.is_contiguous() else None
    result = attend_packed(planned, inside, True, empty_lse)
    assert isinstance(result, tuple)
    first, lse = (from_heads(x, problem.Hk, planned.folded) for x in result)
    if out is not None:
        first = out if inside is not None else out.copy_(first)
    return (first, lse) if return_lse else first
