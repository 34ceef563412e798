"""The portable GPU backend: problems and arguments to the Triton kernels' own.

It runs wherever Triton does (NVIDIA from sm_80, AMD, Intel), and on CPU tensors under TRITON_INTERPRET=1, which is how
it is tested without a GPU.
"""

from __future__ import annotations

import dataclasses
import functools
import warnings
from contextlib import nullcontext
from typing import NamedTuple, Union

import torch
from torch import Tensor

from flash_mla.problem import (
    FP8,
    AppendArgs,
    Args,
    DecodeArgs,
    DecodeProblem,
    PrefillArgs,
    PrefillProblem,
    Problem,
    SparseArgs,
    SparseProblem,
)

try:
    import triton
    from triton.runtime.errors import OutOfResources

    from flash_mla.backends import triton_sparse
    from flash_mla.kernels.triton import append as append_rows
    from flash_mla.kernels.triton import combine, decode, prefill, sparse
    from flash_mla.kernels.triton.launcher import Launcher
    from flash_mla.kernels.triton.target import Target
    from flash_mla.kernels.triton.tiles import MASK_BYTES, smaller
except ImportError as error:
    MISSING: str | None = f"triton cannot be imported: {error}"
else:
    MISSING = None
    if triton.knobs.runtime.interpret:
        from flash_mla.kernels.triton import interpreter

        interpreter.repair()

MAX_D = 576
MAX_ROW_STRIDE = 2**25
"""64 rows of it stay inside the 32-bit offsets that a kernel uses within one block."""


class DecodeConfig(NamedTuple):
    """The two kernels of a decode call; combine is None where no item is split."""

    decode: decode.Config
    combine: combine.Config | None


Config = Union[DecodeConfig, "prefill.Config", "sparse.Config"]


def interpreted() -> bool:
    """Whether Triton's kernels run in its interpreter, on CPU tensors."""
    return MISSING is None and triton.knobs.runtime.interpret


def available() -> str | None:
    """Why this machine cannot run Triton kernels, or None."""
    if MISSING:
        return MISSING
    if interpreted():
        return None
    if torch.cuda.is_available() or (hasattr(torch, "xpu") and torch.xpu.is_available()):
        return None
    return "no GPU that Triton can compile for is present, and TRITON_INTERPRET=1 is not set"


@functools.cache
def target(device: torch.device) -> Target:
    """What the kernels' configs need to know of a device."""
    if device.type == "cpu":
        # three multiprocessors: small tests then split requests across programs
        return Target(backend="interpreter", arch=0, smem=99 * 1024, multiprocessors=3)
    with device_of(device):
        driver = triton.runtime.driver.active
        properties = driver.utils.get_device_properties(driver.get_current_device())
        current = driver.get_current_target()
    arch = current.arch if isinstance(current.arch, int) else 0
    return Target(current.backend, arch, properties["max_shared_mem"], properties["multiprocessor_count"])


def device_of(device: torch.device) -> torch.cuda.device | torch.xpu.device | nullcontext[None]:
    """A context in which launches go to this device."""
    if device.type == "cuda":
        return nullcontext() if device.index == torch.cuda.current_device() else torch.cuda.device(device)
    if device.type == "xpu":
        return torch.xpu.device(device)
    return nullcontext()


def refuse(problem: Problem) -> str | None:
    """Why the Triton kernels cannot run this problem, or None."""
    if reason := available():
        return reason
    if problem.device.type not in (("cpu",) if interpreted() else ("cuda", "xpu")):
        wanted = "CPU tensors under TRITON_INTERPRET=1" if interpreted() else "GPU tensors"
        return f"tensors are on {problem.device}; Triton's kernels take {wanted}"
    if target(problem.device).backend == "cuda" and target(problem.device).arch < 80:
        return f"needs compute capability 8.0 or later; this GPU has {target(problem.device).arch / 10}"
    if isinstance(problem, SparseProblem):
        return triton_sparse.refuse(problem)
    if isinstance(problem, DecodeProblem) and not (problem.Nblk and problem.table_blocks):
        return "the cache or the block table has no block"
    for name, columns in (("D", problem.D), ("Dv", problem.Dv)):
        if columns > MAX_D or columns % 8:
            return f"{name} must be a multiple of 8, at most {MAX_D}; it is {columns}"
    for name, strides in (("K", problem.k_strides), ("V", problem.v_strides)):
        if strides[-2] > MAX_ROW_STRIDE:
            return f"{name}'s rows are {strides[-2]} elements apart; at most {MAX_ROW_STRIDE} fit the kernels' offsets"
    return None


def config(problem: Problem, on: Target | None = None) -> Config:
    """The kernels' tiles for a problem, on its device or on the target given."""
    on = on or target(problem.device)
    if isinstance(problem, SparseProblem):
        return triton_sparse.config(problem, on)
    if isinstance(problem, PrefillProblem):
        return prefill.config(
            P=problem.P, D=problem.D, Dv=problem.Dv, paged=problem.paged, alias=problem.alias,
            mask=MASK_BYTES[problem.mask], block_mask=problem.block_mask, itemsize=problem.dtype.itemsize, target=on,
        )  # fmt: skip
    chosen = decode.config(
        B=problem.B, Hq=problem.Hq, Hk=problem.Hk, S_q=problem.S_q, D=problem.D, Dv=problem.Dv,
        table_blocks=problem.table_blocks, alias=problem.alias, mask=MASK_BYTES[problem.mask],
        itemsize=problem.dtype.itemsize, target=on,
    )  # fmt: skip
    if on.backend == "hip" and problem.mask == "float":
        # NOTE: Triton 3.6's AMD pipeliner destroys the mask's load ("operation destroyed but still has uses")
        chosen = dataclasses.replace(chosen, stages=1)
    if chosen.programs < 2:
        return DecodeConfig(chosen, None)
    return DecodeConfig(chosen, combine.config(items=problem.B * problem.Hk, programs=chosen.programs, Dv=problem.Dv))


SMALLER: dict[tuple[Problem, Config], Config] = {}
"""Configs that a device refused (shared memory, where a Triton takes more than `config` knows of), and what ran."""


def launch(problem: Problem, config: Config, args: Args) -> None:
    """Fill args.out and args.lse. Allocates workspace only and reads no value."""
    if not args.out.numel():
        return
    with device_of(problem.device):
        while True:
            chosen = SMALLER.get((problem, config), config) if SMALLER else config
            try:
                return launch_config(problem, chosen, args)
            except OutOfResources as refusal:
                SMALLER[problem, config] = after(chosen, refusal)


def after(config: Config, refusal: OutOfResources) -> Config:
    """What to launch instead of a refused config, reported; the refusal is raised where nothing smaller is left."""
    instead: Config | None
    if isinstance(config, DecodeConfig):
        kernel = smaller(config.decode)
        instead = None if kernel is None else config._replace(decode=kernel)
    else:
        instead = smaller(config)
    if instead is None:
        raise refusal
    warnings.warn(f"flash_mla: {refusal}; {instead} runs in place of {config}", RuntimeWarning, stacklevel=2)
    return instead


def launch_config(problem: Problem, config: Config, args: Args) -> None:
    """Launch the kernels of one config."""
    if isinstance(args, SparseArgs):
        assert isinstance(problem, SparseProblem)
        assert isinstance(config, sparse.Config)
        triton_sparse.launch(problem, config, args)
    elif isinstance(args, DecodeArgs):
        assert isinstance(problem, DecodeProblem)
        assert isinstance(config, DecodeConfig)
        launch_decode(problem, config, args)
    else:
        assert isinstance(problem, PrefillProblem)
        assert isinstance(config, prefill.Config)
        launch_prefill(problem, config, args)


def stored(tensor: Tensor, widen: str) -> Tensor:
    """FP8 as the kernel reads it: bytes where the GPU does not convert e4m3."""
    return tensor.view(torch.uint8) if widen == "fp8_bits" else tensor


@functools.lru_cache(maxsize=256)
def bound(
    problem: DecodeProblem,
    config: DecodeConfig,
    lse: bool,
    flip: bool,
    table_dtype: torch.dtype,
    lens_dtype: torch.dtype,
) -> list[tuple[Launcher, Launcher | None]]:
    """The slot for the launchers of one problem; empty until its first call fills it."""
    return []


def launch_decode(problem: DecodeProblem, config: DecodeConfig, args: DecodeArgs) -> None:
    """One kernel, and the combine where requests are split."""
    rows = problem.S_q * problem.ratio
    partial = None
    if config.decode.programs:
        numel = decode.partial_numel(config.decode, rows)
        partial = torch.empty(numel, dtype=torch.float32, device=problem.device)
    if args.mask is None and args.q_descale is None and args.k_descale is None and args.v_descale is None:
        slot = bound(
            problem, config, args.lse is not None, args.softmax_scale < 0, args.block_table.dtype, args.seq_lens.dtype
        )  # fmt: skip
        if not slot:
            slot.append(decode_launchers(problem, config, args))
        main, merge = slot[0]
    else:
        # a mask's length, and with it its strides, changes from step to step: nothing to bind
        main, merge = decode_launchers(problem, config, args)
    widen = config.decode.widen
    main(
        (
            stored(args.q, widen), stored(args.k, widen), stored(args.v, widen), args.block_table, args.seq_lens,
            args.mask, args.q_descale, args.k_descale, args.v_descale, args.attn_sink, args.out, args.lse, partial,
        ),
        (abs(args.softmax_scale),),
    )  # fmt: skip
    if merge is not None:
        merge((args.seq_lens, partial, args.attn_sink, args.out, args.lse))


def decode_launchers(
    problem: DecodeProblem, config: DecodeConfig, args: DecodeArgs
) -> tuple[Launcher, Launcher | None]:
    """The decode kernel and its combine, bound to all but their tensors."""
    rows = problem.S_q * problem.ratio
    main = Launcher(
        decode.decode_kernel,
        decode.grid(config.decode, rows, problem.B * problem.Hk),
        decode.constants(
            config.decode, q=args.q, k=args.k, v=args.v, block_table=args.block_table, mask=args.mask,
            q_descale=args.q_descale, k_descale=args.k_descale, v_descale=args.v_descale,
            flip=args.softmax_scale < 0,
        ),
        {"num_warps": config.decode.warps, "num_stages": config.decode.stages},
    )  # fmt: skip
    if config.combine is None:
        return main, None
    merge = Launcher(
        combine.combine_kernel,
        combine.grid(config.combine, rows, problem.Dv, config.decode.programs),
        combine.constants(
            config.combine, B=problem.B, Hk=problem.Hk, table_blocks=problem.table_blocks, S_q=problem.S_q,
            ratio=problem.ratio, Dv=problem.Dv, pdl=config.decode.pdl,
            partial_rows=-(-rows // config.decode.tile_m) * config.decode.tile_m, dv_tile=config.decode.dv_tile,
        ),
        {"num_warps": config.combine.warps} | ({"launch_pdl": True} if config.decode.pdl else {}),
    )  # fmt: skip
    return main, merge


def launch_prefill(problem: PrefillProblem, config: prefill.Config, args: PrefillArgs) -> None:
    """One kernel, and before it the list of kept blocks where there is a block mask."""
    kept = num_kept = None
    if args.block_mask is not None:
        kept, num_kept = prefill.compact(
            args.block_mask, P=problem.P, S_kv=problem.S_kv, causal=problem.causal, seq_lens=args.seq_lens,
            start_pos=args.start_pos,
        )  # fmt: skip
    arguments = prefill.arguments(
        config, S_kv=problem.S_kv, q=stored(args.q, config.widen), k=stored(args.k, config.widen),
        v=stored(args.v, config.widen), block_table=args.block_table, seq_lens=args.seq_lens, start_pos=args.start_pos,
        mask=args.mask, kept=kept, num_kept=num_kept, q_descale=args.q_descale, k_descale=args.k_descale,
        v_descale=args.v_descale, attn_sink=args.attn_sink, softmax_scale=args.softmax_scale, out=args.out,
        lse=args.lse, causal=problem.causal,
    )  # fmt: skip
    grid = prefill.grid(config, problem.B, problem.Hq, problem.P)
    prefill.prefill_kernel[grid](*arguments, num_warps=config.warps, num_stages=config.stages)


def append(args: AppendArgs) -> None:
    """Write AppendArgs' rows into the pages; rows whose place lies outside the table or the cache are dropped."""
    bytes_of = {name: getattr(args, name) for name in ("k", "v", "k_cache", "v_cache")}
    if args.k.dtype == FP8:  # a copy: the bytes do
        bytes_of = {name: None if x is None else x.view(torch.uint8) for name, x in bytes_of.items()}
    B, Hk, P, _ = args.k.shape
    with device_of(args.k.device):
        append_rows.append_kernel[append_rows.grid(B, Hk, P)](
            *append_rows.arguments(
                **bytes_of, block_table=args.block_table, start_pos=args.start_pos, num_tokens=args.num_tokens
            )
        )
