"""Prefill: problems and arguments to `kernels/triton/prefill.py`."""

from __future__ import annotations

from flash_mla.backends.triton.device import launch_fitting, refuse_columns, stored, target
from flash_mla.kernels.triton import prefill
from flash_mla.kernels.triton.target import Target
from flash_mla.kernels.triton.tiles import MASK_BYTES, smaller
from flash_mla.problem import PrefillArgs, PrefillProblem

refuse = refuse_columns


def config(problem: PrefillProblem, on: Target | None = None) -> prefill.Config:
    """The kernel's tiles for a problem, on its device or on the target given."""
    return prefill.config(
        P=problem.P, D=problem.D, Dv=problem.Dv, paged=problem.paged, alias=problem.alias,
        mask=MASK_BYTES[problem.mask], block_mask=problem.block_mask, itemsize=problem.dtype.itemsize,
        target=on or target(problem.device),
    )  # fmt: skip


def launch(problem: PrefillProblem, config: prefill.Config, args: PrefillArgs) -> None:
    """One kernel, and before it the list of kept blocks; smaller tiles where the device refuses these."""
    launch_fitting(launch_config, smaller, problem, config, args)


def launch_config(problem: PrefillProblem, config: prefill.Config, args: PrefillArgs) -> None:
    """The kernels with these tiles."""
    kept = num_kept = None
    if args.block_mask is not None:
        kept, num_kept = prefill.compact(
            args.block_mask, P=problem.P, S_kv=problem.S_kv, causal=problem.causal, seq_lens=args.seq_lens,
            start_pos=args.start_pos,
        )  # fmt: skip
    arguments = prefill.arguments(
        config, S_kv=problem.S_kv, q=stored(args.q, config.widen), k=stored(args.k, config.widen),
        v=stored(args.v, config.widen), block_table=args.block_table, seq_lens=args.seq_lens,
        start_pos=args.start_pos, mask=args.mask, kept=kept, num_kept=num_kept, q_descale=args.q_descale,
        k_descale=args.k_descale, v_descale=args.v_descale, attn_sink=args.attn_sink,
        softmax_scale=args.softmax_scale, out=args.out, lse=args.lse, causal=problem.causal,
    )  # fmt: skip
    grid = prefill.grid(config, problem.B, problem.Hq, problem.P)
    prefill.prefill_kernel[grid](**arguments, num_warps=config.warps, num_stages=config.stages)
