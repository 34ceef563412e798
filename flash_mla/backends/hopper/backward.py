"""The backward of prefill on Hopper: what `kernels/hopper/backward/` takes, and its launch."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from flash_mla.backends.hopper.device import HALVES, LOG2_E, int32, on_device
from flash_mla.backends.hopper.strides import refuse_steps
from flash_mla.kernels.hopper.backward.config import CONSUMERS, TILE, TILE_N, TILE_Q, WIDTHS, Config
from flash_mla.kernels.hopper.limits import TMA_BYTES
from flash_mla.problem import BackwardArgs, BackwardProblem, PrefillProblem, SparseProblem

WORKSPACE = 2**31
"""Bytes of dS at a time, unless one KV head's take more: so many KV heads are computed together."""

GROUP_ROWS = 2**15
"""Query rows, of all heads that are walked together, at least: their Q and dO, 16 to 20 MB, stay in L2, and the work
that remains for the last CTAs is even (within 1 % by simulation; 26 % at 16 heads of 4096 tokens, one by one)."""


def refuse_kind(forward: PrefillProblem | SparseProblem, widths: Sequence[tuple[int, int]]) -> str | None:
    """Why no backward kernel takes this dtype or these dims, of (D, Dv) in `widths`, or None."""
    if forward.dtype not in HALVES:
        return f"dtype {forward.dtype}: the backward takes BF16 and FP16"
    if (forward.D, forward.Dv) not in widths:
        taken = ", ".join(f"{D}/{Dv}" for D, Dv in widths)
        return f"D = {forward.D}, Dv = {forward.Dv}: the backward takes {taken}"
    return None


def refuse(problem: BackwardProblem) -> str | None:
    """Why the kernels cannot run this problem, or None."""
    forward = problem.forward
    if (reason := refuse_kind(forward, WIDTHS)) is not None:
        return reason
    if forward.mask != "none" or forward.block_mask:
        return "a mask or a block layout: the backward takes causal and full attention"
    if forward.scale_sign <= 0:
        return "softmax_scale is not above 0, as of a forward that is not Hopper's: not run on a GPU"
    if not (problem.dq and problem.dkv):
        return "only some gradients are wanted: dq comes from what dk's kernel leaves"
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed: its kernel prepares the rows"
    return None


def config(problem: BackwardProblem) -> Config:
    """The kernels' variant."""
    forward = problem.forward
    return Config(dtype=HALVES[forward.dtype], D=forward.D, Dv=forward.Dv, sink=forward.sink)


def group_of(heads: int, rows: int) -> int:
    """KV heads that are walked together, of so many in a launch with `rows` query rows each."""
    return -(-heads // max(1, heads * rows // GROUP_ROWS))


def is_readable(x: Tensor) -> bool:
    """Whether TMA reads x, and 16-byte stores reach it, as it lies; its rows are of a width in WIDTHS."""
    if x.is_contiguous():
        return x.data_ptr() % TMA_BYTES == 0
    steps = [stride for size, stride in zip(x.shape[:-1], x.stride()[:-1], strict=True) if size > 1]
    fits = x.stride(-1) == 1 and x.data_ptr() % TMA_BYTES == 0 and min(steps, default=1) > 0
    return fits and refuse_steps("", steps, x.itemsize) is None


def readable(x: Tensor) -> Tensor:
    """x itself, or a copy that is."""
    # NOTE: `contiguous` would return a contiguous tensor that begins off 16 bytes
    return x if is_readable(x) else x.clone(memory_format=torch.contiguous_format)


class Part(NamedTuple):
    """Launches for some of the KV heads: the ints of `Scalars`; CTAs of the keys' and the queries' kernel."""

    ints: tuple[int, ...]
    key_ctas: int
    query_ctas: int


def parts_of(problem: PrefillProblem, workspace: int) -> tuple[int, list[Part]]:
    """Tiles of dS in the workspace, and the launches that share it: as many KV heads at a time as fit so many bytes."""
    lines, ratio = problem.B * problem.Hk, problem.ratio
    across, down = -(-problem.S_kv // TILE_N), -(-problem.P // TILE_Q)
    head_tiles = ratio * across * down
    together = max(1, min(lines, workspace // (2 * TILE * head_tiles)))
    dims = problem.Hq, problem.Hk, problem.P, problem.S_kv
    flags = int(problem.causal), int(problem.seq_lens), int(problem.start_pos)
    parts = []
    for first in range(0, lines, together):
        heads = min(together, lines - first)
        ints = *dims, first, heads, group_of(heads, ratio * problem.P), *flags
        parts.append(Part(ints, heads * across, heads * ratio * -(-down // CONSUMERS)))
    return together * head_tiles, parts


def bind(problem: BackwardProblem, config: Config) -> Callable[[BackwardArgs], None]:
    """The launch, which fills the gradients. It allocates workspace: 2 to 4 FP32 a query row, and 2 bytes a pair of
    query and key for as many KV heads as WORKSPACE holds; what is not laid out as TMA needs is copied.

    The kernels are loaded here, and compiled the first time ever on a machine.
    """
    from flash_mla.backends.triton.backward import prepare
    from flash_mla.kernels.hopper import store
    from flash_mla.kernels.hopper.backward import keys_kernel, queries_kernel
    from flash_mla.kernels.hopper.backward.shared import Scalars, Tensors

    keys = store.load("backward_keys", config, keys_kernel.build)
    queries = store.load("backward_queries", replace(config, sink=False), queries_kernel.build)
    tiles, parts = parts_of(problem.forward, WORKSPACE)

    def launch(args: BackwardArgs) -> None:
        q, k, v, d_out = (readable(x) for x in (args.q, args.k, args.v, args.d_out))
        written = [x for x in args.gradients[:3] if x is not None]
        dq, dk, dv = (x if is_readable(x) else x.new_empty(x.shape) for x in written)
        prepared = prepare(problem, args)
        ds = torch.empty((tiles, TILE // 2), dtype=torch.int32, device=problem.device)
        tensors: dict[str, Any] = {
            "lse2": prepared.lse2,
            "shift": prepared.shift,
            "left": prepared.shift if prepared.left is None else prepared.left,
            "live": prepared.live,
            "seq_lens": prepared.live if args.seq_lens is None else int32(args.seq_lens),
            "start_pos": prepared.live if args.start_pos is None else int32(args.start_pos),
            "ds": ds,
        }
        shared, scales = Tensors(**tensors), (args.softmax_scale * LOG2_E, args.softmax_scale)
        for ints, key_ctas, query_ctas in parts:
            scalars = Scalars._make((*scales, *ints))
            keys(q, k, v, d_out, dk, dv, shared, scalars, key_ctas)
            queries(k, dq, shared, scalars, query_ctas)
        for x, result in zip(written, (dq, dk, dv), strict=True):
            if result is not x:
                x.copy_(result)

    return on_device(problem.device, launch)
