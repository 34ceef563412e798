"""The backward of prefill: problems and arguments to `kernels/triton/backward.py` and its two neighbours."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch
from torch import Tensor

from flash_mla.backends.triton.device import launch_fitting, refuse_columns, refuse_far, target
from flash_mla.kernels.triton import backward, prefill
from flash_mla.kernels.triton.backward_keys import keys_kernel
from flash_mla.kernels.triton.backward_queries import queries_kernel
from flash_mla.kernels.triton.launcher import Launcher
from flash_mla.kernels.triton.strides import row_stride, strides
from flash_mla.kernels.triton.target import Target
from flash_mla.kernels.triton.tiles import MASK_BYTES
from flash_mla.problem import FP8, BackwardArgs, BackwardProblem, PrefillProblem


class Prepared(NamedTuple):
    """What prepare_kernel wrote: lse2, shift, left and the sink's shares [B * Hq, P] FP32; live [B * Hq * row tiles]
    int32, past the last row of each tile that has a gradient."""

    lse2: Tensor
    shift: Tensor
    left: Tensor | None
    d_sink: Tensor | None
    live: Tensor


def refuse(problem: BackwardProblem) -> str | None:
    """Why the kernels cannot run this problem, or None."""
    if problem.forward.dtype == FP8:
        return "FP8 has no backward"
    return refuse_columns(problem.forward) or refuse_far({"q": problem.forward.q_strides}, problem.forward.P)


def config(problem: BackwardProblem, on: Target | None = None) -> backward.Config:
    """The kernels' tiles for a problem, on its device or on the target given."""
    forward = problem.forward
    return backward.config(
        P=forward.P, S_kv=forward.S_kv, D=forward.D, Dv=forward.Dv, mask=MASK_BYTES[forward.mask],
        block_mask=forward.block_mask, itemsize=forward.dtype.itemsize, target=on or target(problem.device),
    )  # fmt: skip


def launch(problem: BackwardProblem, config: backward.Config, args: BackwardArgs) -> None:
    """Three kernels at most, and the lists of kept blocks; smaller tiles where the device refuses these."""
    launch_fitting(launch_config, backward.smaller, problem, config, args)


def launch_config(problem: BackwardProblem, config: backward.Config, args: BackwardArgs) -> None:
    """The kernels with these tiles."""
    forward = problem.forward
    if refuse_far({"d_out": args.d_out.stride()}, forward.P) is not None:
        args = args._replace(d_out=args.d_out.contiguous())
    prepared = prepare(problem, args)
    live = prepared.live.view(forward.B, forward.Hq, -1).amax(2)
    limits: dict[str, Any] = {
        "P": forward.P,
        "S_kv": forward.S_kv,
        "causal": forward.causal,
        "seq_lens": args.seq_lens,
        "start_pos": args.start_pos,
    }
    if problem.dkv:
        lists = None
        if args.block_mask is not None:
            lists = prefill.compact(args.block_mask, **limits, kernel=backward.columns_kernel, dim=3)
        tiles = config.keys
        keys_kernel[(forward.B * forward.Hk * -(-forward.S_kv // tiles.tile_n),)](
            **keys_arguments(problem, config, args, prepared, live, lists),
            num_warps=tiles.warps,
            num_stages=tiles.stages,
        )
    if problem.dq:
        lists = None if args.block_mask is None else prefill.compact(args.block_mask, **limits)
        tiles = config.queries
        queries_kernel[(forward.B * forward.Hq * -(-forward.P // tiles.tile_m),)](
            **queries_arguments(problem, config, args, prepared, live, lists),
            num_warps=tiles.warps,
            num_stages=tiles.stages,
        )


@functools.lru_cache(maxsize=256)
def bound(problem: BackwardProblem, *strides: tuple[int, ...] | None) -> list[Launcher]:
    """The slot for prepare_kernel's launcher of one problem and these strides; empty until its first call fills it."""
    return []


def prepare(problem: BackwardProblem, args: BackwardArgs) -> Prepared:
    """What every backward begins with: numbers for each query row, and the sink's gradient."""
    forward = problem.forward
    prepared = empty_prepared(problem)
    lse, d_lse = args.lse.stride(), None if args.d_lse is None else args.d_lse.stride()
    slot = bound(problem, args.out.stride(), args.d_out.stride(), lse, d_lse)
    if not slot:
        grid = (row_tiles(forward) * forward.B, forward.Hq, 1)
        slot.append(Launcher(backward.prepare_kernel, grid, prepare_constants(problem, args), {"num_warps": 4}))
    slot[0](prepare_tensors(args, prepared))
    if args.d_sink is not None and prepared.d_sink is not None:
        torch.sum(prepared.d_sink.view(forward.B, forward.Hq, -1), dim=(0, 2), out=args.d_sink)
    return prepared


def empty_prepared(problem: BackwardProblem) -> Prepared:
    """The workspace: 2 FP32 a query row, 4 with a sink."""
    forward = problem.forward
    heads = forward.B * forward.Hq
    rows = torch.empty((4 if forward.sink else 2, heads, forward.P), dtype=torch.float32, device=problem.device)
    live = torch.empty(heads * row_tiles(forward), dtype=torch.int32, device=problem.device)
    lse2, shift, *sink = rows.unbind()
    left, d_sink = sink or (None, None)
    return Prepared(lse2, shift, left, d_sink, live)


def row_tiles(forward: PrefillProblem) -> int:
    """Tiles of a head's rows in prepare_kernel."""
    return -(-forward.P // backward.prepare_rows(forward.Dv))


# --- Arguments, by the kernels' names ---------------------------------------------------------------------------------


def prepare_tensors(args: BackwardArgs, prepared: Prepared) -> dict[str, Tensor | float | None]:
    """What a call brings; `prepare_constants` are the others."""
    return {
        "out_ptr": args.out,
        "d_out_ptr": args.d_out,
        "lse_ptr": args.lse,
        "d_lse_ptr": args.d_lse,
        "sink_ptr": args.attn_sink,
        "lse2_ptr": prepared.lse2,
        "shift_ptr": prepared.shift,
        "left_ptr": prepared.left,
        "d_sink_ptr": prepared.d_sink,
        "live_ptr": prepared.live,
    }


def prepare_constants(problem: BackwardProblem, args: BackwardArgs) -> dict[str, Any]:
    forward = problem.forward
    return {
        "P": forward.P,
        **strides("o", "bhs", args.out),
        **strides("d", "bhs", args.d_out),
        **strides("l", "bhs", args.lse),
        **strides("g", "bhs", args.d_lse),
        "DV": forward.Dv,
        "TILE_M": backward.prepare_rows(forward.Dv),
        "DV_TILE": backward.value_tile(forward.Dv),
    }


def shared_arguments(
    problem: BackwardProblem,
    config: backward.Config,
    tiles: backward.Tiles,
    args: BackwardArgs,
    prepared: Prepared,
    live: Tensor,
    lists: tuple[Tensor, Tensor] | None,
) -> dict[str, Any]:
    """What both kernels take."""
    forward = problem.forward
    kept, num_kept = lists or (None, None)
    return {
        "q_ptr": args.q,
        "k_ptr": args.k,
        "v_ptr": args.v,
        "d_out_ptr": args.d_out,
        "lse2_ptr": prepared.lse2,
        "shift_ptr": prepared.shift,
        "left_ptr": prepared.left,
        "live_ptr": live,
        "seq_lens_ptr": args.seq_lens,
        "start_pos_ptr": args.start_pos,
        "mask_ptr": args.mask,
        "kept_ptr": kept,
        "num_kept_ptr": num_kept,
        "softmax_scale": args.softmax_scale,
        "P": forward.P,
        "S_kv": forward.S_kv,
        **strides("q", "bh", args.q),
        **strides("k", "bh", args.k),
        **strides("v", "bh", args.v),
        **strides("o", "bh", args.d_out),
        **strides("m", "bhst", args.mask),
        # a list that all requests or heads share is one
        "stride_lb": 0 if num_kept is None or num_kept.shape[0] == 1 else num_kept.stride(0),
        "stride_lh": 0 if num_kept is None or num_kept.shape[1] == 1 else num_kept.stride(1),
        "RATIO": forward.ratio,
        "D": forward.D,
        "DV": forward.Dv,
        "STRIDE_Q": row_stride(args.q),
        "STRIDE_K": row_stride(args.k),
        "STRIDE_V": row_stride(args.v),
        "STRIDE_O": row_stride(args.d_out),
        "CAUSAL": forward.causal,
        "MASK": forward.mask,
        "TILE_M": tiles.tile_m,
        "TILE_N": tiles.tile_n,
        "D_MAIN": config.d_main,
        "D_REST": config.d_rest,
        "DV_TILE": config.dv_tile,
        "PRECISION": config.precision,
    }


def keys_arguments(
    problem: BackwardProblem,
    config: backward.Config,
    args: BackwardArgs,
    prepared: Prepared,
    live: Tensor,
    lists: tuple[Tensor, Tensor] | None,
) -> dict[str, Any]:
    return {
        **shared_arguments(problem, config, config.keys, args, prepared, live, lists),
        "dk_ptr": args.dk,
        "dv_ptr": args.dv,
        "Hk": problem.forward.Hk,
        "block_rows": 0 if lists is None else lists[0].shape[3],
        **strides("dk", "bht", args.dk),
        **strides("dv", "bht", args.dv),
    }


def queries_arguments(
    problem: BackwardProblem,
    config: backward.Config,
    args: BackwardArgs,
    prepared: Prepared,
    live: Tensor,
    lists: tuple[Tensor, Tensor] | None,
) -> dict[str, Any]:
    return {
        **shared_arguments(problem, config, config.queries, args, prepared, live, lists),
        "dq_ptr": args.dq,
        "Hq": problem.forward.Hq,
        "block_columns": 0 if lists is None else lists[0].shape[3],
        **strides("dq", "bhs", args.dq),
    }
