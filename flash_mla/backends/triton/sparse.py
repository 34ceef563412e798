"""Sparse problems to the Triton kernels' arguments: a cache in q's dtype or in a row format, as strided parts."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from flash_mla.backends.triton.device import launch_fitting, target
from flash_mla.kernels.triton import sparse
from flash_mla.kernels.triton.strides import strides
from flash_mla.kernels.triton.target import Target
from flash_mla.kernels.triton.tiles import power_of_2, smaller
from flash_mla.problem import SparseArgs, SparseKeys, SparseProblem
from flash_mla.quant import FORMATS, RowFormat


class KeyViews(NamedTuple):
    """[pages, page, n] views: all columns in q's dtype, or a row format's e4m3 codes, BF16 rope and scales."""

    codes: Tensor | None
    rope: Tensor | None
    scales: Tensor | None


def refuse(problem: SparseProblem) -> str | None:
    """Why the kernel cannot run this problem, or None."""
    if problem.D > 576 or problem.D % 8:
        return f"D must be a multiple of 8, at most 576; it is {problem.D}"
    if problem.Dv > 512 or problem.Dv > sparse.head_tiles(problem.D)[0]:
        return f"V must lie in K's first {sparse.head_tiles(problem.D)[0]} columns, one tile; Dv is {problem.Dv}"
    return None


def config(problem: SparseProblem, on: Target | None = None) -> sparse.Config:
    """The kernel's tiles; max_logits is not kept through a merge, and its callers have tokens enough."""
    return sparse.config(
        tokens=problem.B * problem.S_q,
        Hq=problem.Hq,
        D=problem.D,
        topk=sum(keys.topk for keys in problem.sets),
        itemsize=problem.dtype.itemsize,
        quantised=0 if problem.format is None else FORMATS[problem.format].quantised,
        flat=flat(problem),
        split=not problem.max_logits,
        target=on or target(problem.device),
    )


def flat(problem: SparseProblem) -> bool:
    """Whether row i of a cache lies i rows after the first, whatever its page."""
    together = all(s.pages == 1 or s.cache_strides[0] == s.page * s.cache_strides[1] for s in problem.sets)
    return together and not (problem.format is not None and FORMATS[problem.format].page_split)


def key_views(cache: Tensor, fmt: RowFormat | None) -> KeyViews:
    """The parts of a cache [pages, page, D or row_bytes], as views."""
    if fmt is None:
        return KeyViews(cache, None, None)
    codes, scales, rope = fmt.parts(cache)
    # e8m0 scales stay bytes
    scales = scales.view(torch.float32) if fmt.scale_dtype == torch.float32 and fmt.scale_bytes else scales
    return KeyViews(codes, rope.view(torch.bfloat16) if fmt.rope else codes, scales if fmt.scale_bytes else codes)


def key_arguments(keys: SparseKeys | None, fmt: RowFormat | None) -> dict[str, Any]:
    """sparse_kernel's arguments of one cache."""
    if keys is None:
        cache, indices, lengths = KeyViews(None, None, None), None, None
        topk = pages = page = 0
    else:
        cache, indices, lengths = key_views(keys.cache, fmt), keys.indices, keys.lengths
        topk, (pages, page, _) = keys.indices.shape[2], keys.cache.shape
    return dict(
        index_ptr=indices,
        length_ptr=lengths,
        codes_ptr=cache.codes,
        rope_ptr=cache.rope,
        scale_ptr=cache.scales,
        topk=topk,
        pages=pages,
        page=page,
        **strides("i", "bs", indices),
        **strides("c", "nt", cache.codes),
        **strides("r", "nt", cache.rope),
        **strides("s", "nt", cache.scales),
    )


def arguments(
    problem: SparseProblem, config: sparse.Config, args: SparseArgs, partial: Tensor | None
) -> dict[str, Any]:
    """sparse_kernel's arguments; those of the second cache end in 2."""
    fmt = None if problem.format is None else FORMATS[problem.format]
    first, second = args.keys if len(args.keys) == 2 else (args.keys[0], None)
    return dict(
        q_ptr=args.q,
        **key_arguments(first, fmt),
        **{f"{name}2": value for name, value in key_arguments(second, fmt).items()},
        sink_ptr=args.attn_sink,
        out_ptr=args.out,
        lse_ptr=args.lse,
        max_ptr=args.max_logits,
        partial_ptr=partial,
        softmax_scale=args.softmax_scale,
        tokens=problem.B * problem.S_q,
        Hq=problem.Hq,
        **strides("q", "bsh", args.q),
        S_Q=problem.S_q,
        D=problem.D,
        DV=problem.Dv,
        QUANT=0 if fmt is None else fmt.quantised,
        GROUP=0 if fmt is None else fmt.tile or 0,
        E8M0=fmt is not None and fmt.scale_dtype != torch.float32,
        NATIVE=config.native,
        SPLIT=config.splits > 1,
        TILE_M=config.tile_m,
        TILE_N=config.tile_n,
        D_MAIN=config.d_main,
        D_REST=config.d_rest,
        PRECISION=config.precision,
        FLAT=config.flat,
    )


def launch(problem: SparseProblem, config: sparse.Config, args: SparseArgs) -> None:
    """One kernel, and a merge where the keys of a token are split; smaller tiles where the device refuses these."""
    launch_fitting(launch_config, smaller, problem, config, args.normalised())
    args.mark_empty()


def launch_config(problem: SparseProblem, config: sparse.Config, args: SparseArgs) -> None:
    """The kernels with these tiles."""
    tokens = problem.B * problem.S_q
    rows = tokens * problem.Hq
    partial = None
    if config.splits > 1:
        partial = args.q.new_empty(config.splits * rows * (problem.Dv + 1), dtype=torch.float32)
    grid = sparse.grid(config, tokens, problem.Hq)
    sparse.sparse_kernel[grid](
        **arguments(problem, config, args, partial), num_warps=config.warps, num_stages=config.stages
    )
    if partial is not None:
        sparse.merge_kernel[(rows,)](
            partial_ptr=partial,
            sink_ptr=args.attn_sink,
            out_ptr=args.out,
            lse_ptr=args.lse,
            rows=rows,
            Hq=problem.Hq,
            splits=config.splits,
            DV=problem.Dv,
            DV_TILE=power_of_2(problem.Dv),
            num_warps=4,
        )
