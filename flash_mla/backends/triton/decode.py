"""Decode: problems and arguments to `kernels/triton/decode.py`, `decode_latent.py` and `combine.py`."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, NamedTuple

import torch
from torch import Tensor

from flash_mla.backends.triton.device import launch_fitting, refuse_columns, stored, target
from flash_mla.kernels.triton import combine, decode, decode_latent
from flash_mla.kernels.triton.launcher import Launcher
from flash_mla.kernels.triton.target import Target
from flash_mla.kernels.triton.tiles import MASK_BYTES, head_tiles, least_columns, smaller
from flash_mla.problem import ALIGNMENT, BLOCK, FP8, DecodeArgs, DecodeProblem

MIN_PAGE = 16
"""Tokens: the least tile of the kernels, so that no page is smaller than a tile can be."""


class DecodeConfig(NamedTuple):
    """The two kernels of a decode call; combine is None where no item is split."""

    decode: decode.Config
    combine: combine.Config | None


def refuse(problem: DecodeProblem) -> str | None:
    """Why the kernel cannot run this problem, or None."""
    if BLOCK % problem.page and problem.page % BLOCK:
        return f"pages of {problem.page} tokens: a tile of {BLOCK} tokens must be pages, or lie in one"
    if problem.page < MIN_PAGE:
        return f"pages of {problem.page} tokens: at least {MIN_PAGE}"
    if problem.rope_strides is not None:
        least = least_columns(problem.kv_dtype.itemsize, target(problem.device))
        if head_tiles(problem.D, least)[0] != problem.Dv:
            return f"a latent of {problem.Dv} beside {problem.D - problem.Dv} columns: the kernel's tiles cut elsewhere"
    return refuse_columns(problem)


def is_latent(problem: DecodeProblem, on: Target) -> bool:
    """Whether K is an FP8 latent of 512 and no or 64 rope columns, its rows on 16 bytes, and this is a Hopper GPU."""
    steps = (*problem.k_strides[:-1], *(problem.rope_strides or (0,))[:-1])
    whole = problem.aligned and not any(step % ALIGNMENT for step in steps)
    dims = problem.alias and problem.Dv == 512 and problem.D in (512, 576)
    return (on.wgmma or on.backend == "interpreter") and problem.kv_dtype == FP8 and dims and whole


def config(problem: DecodeProblem, on: Target | None = None) -> DecodeConfig:
    """The kernels' tiles for a problem, on its device or on the target given."""
    on = on or target(problem.device)
    chosen = decode.config(
        B=problem.B, Hq=problem.Hq, Hk=problem.Hk, S_q=problem.S_q, D=problem.D, Dv=problem.Dv,
        capacity=problem.table_blocks * problem.page, alias=problem.alias, mask=MASK_BYTES[problem.mask],
        itemsize=problem.kv_dtype.itemsize, target=on, batch_invariant=problem.batch_invariant,
        latent=is_latent(problem, on),
    )  # fmt: skip
    if on.backend == "hip" and problem.mask == "float":
        # NOTE: Triton 3.6's AMD pipeliner destroys the mask's load ("operation destroyed but still has uses")
        chosen = dataclasses.replace(chosen, stages=1)
    if chosen.programs < 2 or chosen.pieces == 1:
        return DecodeConfig(chosen, None)
    items = problem.B * problem.Hk
    merge = combine.config(items=items, programs=chosen.programs, Dv=problem.Dv, pieces=chosen.pieces)
    return DecodeConfig(chosen, merge)


@functools.lru_cache(maxsize=256)
def bound(
    problem: DecodeProblem,
    config: DecodeConfig,
    lse: bool,
    table_dtype: torch.dtype,
    lens_dtype: torch.dtype,
) -> list[tuple[Launcher, Launcher | None]]:
    """The slot for the launchers of one problem; empty until its first call fills it."""
    return []


def launch(problem: DecodeProblem, config: DecodeConfig, args: DecodeArgs) -> None:
    """One kernel, and the combine where requests are split; smaller tiles where the device refuses these."""
    launch_fitting(launch_config, smaller_config, problem, config, args)
    args.mark_empty()


def smaller_config(config: DecodeConfig) -> DecodeConfig | None:
    """The next config to try."""
    kernel = smaller(config.decode)
    return None if kernel is None else config._replace(decode=kernel)


def launch_config(problem: DecodeProblem, config: DecodeConfig, args: DecodeArgs) -> None:
    """The kernels with these tiles."""
    rows = problem.S_q * problem.ratio
    if config.decode.widen and not (config.decode.latent or config.decode.e4m3):
        args = in_half(problem, args)
    partial = None
    if config.decode.programs:
        numel = decode.partial_numel(config.decode, rows)
        partial = torch.empty(numel, dtype=torch.float32, device=problem.device)
    if args.mask is None and args.q_descale is None and args.k_descale is None and args.v_descale is None:
        slot = bound(problem, config, args.lse is not None, args.block_table.dtype, args.seq_lens.dtype)
        if not slot:
            slot.append(launchers(problem, config, args))
        main, merge = slot[0]
    else:
        # a mask's length, and with it its strides, changes from step to step: nothing to bind
        main, merge = launchers(problem, config, args)
    main(tensors(config.decode, args, partial))
    if merge is not None:
        merge({
            "seq_lens_ptr": args.seq_lens, "partial_ptr": partial, "sink_ptr": args.attn_sink, "out_ptr": args.out,
            "lse_ptr": args.lse,
        })  # fmt: skip


def tensors(config: decode.Config, args: DecodeArgs, partial: Tensor | None) -> dict[str, Tensor | float | None]:
    """The kernel's arguments that a call brings; `constants` are the others."""
    if config.latent:
        keys = dict(q_ptr=args.q, k_ptr=pairs(args.k), rope_ptr=None if args.k_rope is None else pairs(args.k_rope))
    else:
        form = "" if config.e4m3 else config.widen
        rope = None if args.k_rope is None else stored(args.k_rope, form)
        keys = dict(q_ptr=stored(args.q, form), k_ptr=stored(args.k, form), v_ptr=stored(args.v, form), rope_ptr=rope)
    return dict(
        **keys,
        table_ptr=args.block_table,
        seq_lens_ptr=args.seq_lens,
        mask_ptr=args.mask,
        q_descale_ptr=args.q_descale,
        k_descale_ptr=args.k_descale,
        v_descale_ptr=args.v_descale,
        sink_ptr=args.attn_sink,
        out_ptr=args.out,
        lse_ptr=args.lse,
        partial_ptr=partial,
        softmax_scale=abs(float(args.softmax_scale)),
    )


def pairs(rows: Tensor) -> Tensor:
    """FP8 rows as decode_latent reads them, two columns an element."""
    return rows.view(torch.int16)


def in_half(problem: DecodeProblem, args: DecodeArgs) -> DecodeArgs:
    """q in FP16, which FP8 is multiplied in: exact, but for a BF16 element below 2^-14 of its group's greatest.

    NOTE: done here and not in the kernel: Hopper would take a q that was converted there from registers, anew for every
    tile, and spill 1.7 KB a thread.
    """
    if problem.dtype != torch.bfloat16:
        return args._replace(q=args.q.to(torch.float16))
    groups = args.q.unflatten(1, (problem.Hk, problem.ratio))  # [B, Hk, ratio, S_q, D]
    exponent = torch.frexp(groups.abs().amax((2, 3, 4)).float()).exponent  # [B, Hk]
    factor = torch.ldexp(torch.ones_like(exponent, dtype=torch.float32), exponent)
    q = (groups.float() / factor[:, :, None, None, None]).to(torch.float16).flatten(1, 2)
    return args._replace(q=q, q_descale=factor if args.q_descale is None else factor * args.q_descale)


def kernel_of(config: decode.Config) -> Any:
    """The kernel that a config is for."""
    return decode_latent.decode_latent_kernel if config.latent else decode.decode_kernel


def constants(problem: DecodeProblem, config: decode.Config, args: DecodeArgs) -> dict[str, int | bool | str]:
    """The kernel's arguments that a problem fixes."""
    same: dict[str, Any] = dict(
        q=args.q, v=args.v, block_table=args.block_table, mask=args.mask, q_descale=args.q_descale,
        k_descale=args.k_descale, v_descale=args.v_descale, out=args.out, flip=problem.scale_sign < 0,
        tail=problem.tail,
    )  # fmt: skip
    if config.latent:
        rope = None if args.k_rope is None else pairs(args.k_rope)
        return decode_latent.constants(config, k=pairs(args.k), k_rope=rope, **same)
    return decode.constants(config, k=args.k, k_rope=args.k_rope, **same)


def launchers(problem: DecodeProblem, config: DecodeConfig, args: DecodeArgs) -> tuple[Launcher, Launcher | None]:
    """The decode kernel and its combine, bound to all but their tensors."""
    rows = problem.S_q * problem.ratio
    main = Launcher(
        kernel_of(config.decode),
        decode.grid(config.decode, rows, problem.B * problem.Hk),
        constants(problem, config.decode, args),
        {"num_warps": config.decode.warps, "num_stages": config.decode.stages},
    )
    if config.combine is None:
        return main, None
    merge = Launcher(
        combine.combine_kernel,
        combine.grid(config.combine, rows, problem.Dv, config.decode.programs),
        combine.constants(
            config.combine, B=problem.B, Hk=problem.Hk, capacity=problem.table_blocks * problem.page,
            S_q=problem.S_q, ratio=problem.ratio, Dv=problem.Dv, out=args.out, pdl=config.decode.pdl,
            partial_rows=-(-rows // config.decode.tile_m) * config.decode.tile_m, dv_tile=config.decode.dv_tile,
        ),
        {"num_warps": config.combine.warps} | ({"launch_pdl": True} if config.decode.pdl else {}),
    )  # fmt: skip
    return main, merge
