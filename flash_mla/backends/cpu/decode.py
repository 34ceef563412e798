"""Decode on the CPU: runs of blocks in place, the rest gathered in bounded slices."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor

from flash_mla.backends.cpu.attend import (
    BIAS_BYTES,
    attend,
    compute_dtype,
    grouped_rows,
    merge_two,
    store,
    to_bias,
)
from flash_mla.backends.cpu.surroundings import undisturbed
from flash_mla.merge import merge
from flash_mla.problem import BLOCK, FP8, DecodeArgs, DecodeProblem

# NOTE: an op call costs about 15 us; 8 blocks of a 32/8 GQA cache are 4 MiB, some 200 us of reading.
MIN_RUN = 8
# NOTE: scattered pages of 4 requests x 4096 tokens took 35, 22, 17, 15, 16 and 38 ms at 1, 2, 4, 8, 16 and 64 MiB
# (Zen 4, two threads); one buffer serves all slices of a call: fresh memory costs a page fault each 4 KiB.
GATHER_BYTES = 8 << 20

Part = tuple[slice, Tensor, Tensor]
"""Requests, and their (out [b, Hk, rows, Dv], lse [b, Hk, rows]) over some of their keys."""


@dataclass
class Reads:
    """How one request's blocks are read."""

    length: int
    runs: list[tuple[int, int]] = field(default_factory=list)
    """(first physical block, blocks) read in place: full blocks that every query sees whole."""
    loose: list[int] = field(default_factory=list)
    """Logical blocks to gather."""


def refuse(problem: DecodeProblem) -> str | None:
    """It runs everything that the contract admits."""
    return None


def config(problem: DecodeProblem) -> None:
    """Nothing is chosen ahead: the runs of blocks decide."""
    return


@undisturbed
def launch(problem: DecodeProblem, config: None, args: DecodeArgs) -> None:
    """Plan each request's reads, attend to them, merge, store."""
    if problem.tail:
        problem, args = problem._replace(tail=False), args._replace(mask=args.whole_mask(longest(problem, args)))
    if problem.alias:
        args = args._replace(v=args.k[..., : problem.Dv])
    if problem.batch_invariant and problem.B > 1:
        # a request alone is read in the same slices in every batch
        alone = problem._replace(B=1)
        for b in range(problem.B):
            launch(alone, config, request_of(args, b))
        return
    table = args.block_table.long().clamp(0, max(problem.Nblk - 1, 0))
    reads = plan_reads(problem, args, table)
    q = grouped_rows(problem, args).flatten(2, 3)  # [B, Hk, ratio * S_q, D]
    parts = [part for run, requests in shared_runs(reads) for part in run_in_place(problem, args, q, requests, *run)]
    groups = list(gather_groups(problem, reads))
    buffers = gather_buffers(problem, args, groups)
    parts += [run_gathered(problem, args, q, *group, reads, table, buffers) for group in groups]
    out, lse = merge_parts(problem, parts)
    rows = (problem.ratio, problem.S_q)
    store(args, slice(0, problem.B), out.unflatten(2, rows), lse.unflatten(2, rows))
    args.mark_empty()


def longest(problem: DecodeProblem, args: DecodeArgs) -> int:
    """Keys of the longest request, inside what the table covers."""
    return min(max(int(args.seq_lens.max()), 1), problem.table_blocks * problem.page)


def request_of(args: DecodeArgs, b: int) -> DecodeArgs:
    """The arguments of request b alone."""
    own: dict[str, Any] = {name: x[b : b + 1] for name, x in args._asdict().items() if isinstance(x, Tensor)}
    return args._replace(**own | {"attn_sink": args.attn_sink})


# --- Plan -------------------------------------------------------------------------------------------------------------


def plan_reads(problem: DecodeProblem, args: DecodeArgs, table: Tensor) -> list[Reads]:
    """Split each request's blocks into runs of consecutive ids and loose blocks."""
    keys = problem.table_blocks * problem.page
    if args.mask is not None:
        keys = min(keys, args.mask.shape[-1])
    in_place = readable_in_place(problem, args)
    return [
        plan_request(min(max(length, 0), keys), ids, problem.S_q, problem.page, in_place)
        for length, ids in zip(args.seq_lens.tolist(), table.numpy(), strict=True)
    ]


def plan_request(length: int, ids: np.ndarray, S_q: int, page: int, in_place: bool) -> Reads:
    """The reads of one request of `length` tokens, whose logical block i is physical block ids[i]."""
    # NOTE: numpy, since torch's small ops took 130 us a call here, a tenth of a B 1, S 1024 decode.
    reads = Reads(length)
    # causality hides at most the last S_q - 1 keys from a query: every query sees the blocks before them whole
    full = max(length - S_q + 1, 0) // page if in_place else 0
    order = ids[:full].argsort(kind="stable")
    ids = ids[order]
    starts = np.flatnonzero(np.diff(ids, prepend=-2) != 1).tolist()
    for start, end in pairwise([*starts, full]):
        if (end - start) * page >= MIN_RUN * BLOCK:
            reads.runs.append((int(ids[start]), end - start))
        else:
            reads.loose += order[start:end].tolist()
    reads.loose += range(full, -(-length // page))
    return reads


def readable_in_place(problem: DecodeProblem, args: DecodeArgs) -> bool:
    """Whether consecutive blocks are one strided view that the op takes, with no mask to permute."""
    evenly = all(strides[2] == problem.page * strides[3] for strides in (problem.k_strides, problem.v_strides))
    plain = (
        problem.rope_strides is None
        and not problem.batch_invariant  # runs depend on where pages lie
        and args.mask is None
        and compute_dtype(problem) == problem.dtype == problem.kv_dtype
    )
    return evenly and plain and (problem.alias or problem.D == problem.Dv)


def shared_runs(reads: list[Reads]) -> Iterator[tuple[tuple[int, int], slice]]:
    """Each run with the neighbouring requests that share it: a uniform batch of slabs, or a common prefix."""
    owners: dict[tuple[int, int], list[int]] = {}
    for b, request in enumerate(reads):
        for run in request.runs:
            owners.setdefault(run, []).append(b)
    for run, members in owners.items():
        first = members[0]
        for b, after in zip(members, [*members[1:], -1], strict=True):
            if after != b + 1:
                yield run, slice(first, b + 1)
                first = after


def gather_groups(problem: DecodeProblem, reads: list[Reads]) -> Iterator[tuple[slice, slice]]:
    """Neighbouring requests and a range of their loose blocks, as many as GATHER_BYTES and BIAS_BYTES allow."""
    columns = problem.D + (0 if problem.alias else problem.Dv)
    block_bytes = problem.Hk * problem.page * columns * compute_dtype(problem).itemsize
    bias_bytes = problem.Hq * problem.S_q * problem.page * torch.float32.itemsize
    budget = max(1, min(GATHER_BYTES // block_bytes, BIAS_BYTES // bias_bytes))
    widths = [len(request.loose) for request in reads]
    first = 0
    while first < len(reads):
        last, widest = first + 1, widths[first]
        while last < len(reads) and max(widest, widths[last]) * (last + 1 - first) <= budget:
            widest = max(widest, widths[last])
            last += 1
        step = max(1, budget // (last - first))
        for start in range(0, widest, step):
            yield slice(first, last), slice(start, min(start + step, widest))
        first = last


# --- In place ---------------------------------------------------------------------------------------------------------


def run_in_place(
    problem: DecodeProblem, args: DecodeArgs, q: Tensor, requests: slice, start: int, blocks: int
) -> Iterator[Part]:
    """Attend to one run, cut along the keys where requests and heads alone would leave threads idle."""
    threads = torch.get_num_threads()
    if (requests.stop - requests.start) * problem.Hk >= threads:
        k, v = (cache[requests, :, start : start + blocks].flatten(2, 3) for cache in (args.k, args.v))
        out, lse = attend(q[requests], k, None if problem.alias else v, problem.Dv, args.softmax_scale)
        yield requests, out, lse
        return
    cuts = min(-(-threads // problem.Hk), blocks // MIN_RUN)
    each, rest = divmod(blocks, cuts)
    for b in range(requests.start, requests.stop):
        one = slice(b, b + 1)
        for first, pieces, size in ((start, cuts, each), (start + cuts * each, 1, rest)):
            if size:
                k, v = (  # [Hk, pieces, keys, D]
                    cache[b, :, first : first + pieces * size].unflatten(1, (pieces, size)).flatten(2, 3)
                    for cache in (args.k, args.v)
                )
                rows = q[b].unsqueeze(1).expand(-1, pieces, -1, -1)
                out, lse = attend(rows, k, None if problem.alias else v, problem.Dv, args.softmax_scale)
                out, lse = merge(out.float().transpose(0, 1), lse.transpose(0, 1))
                yield one, out[None], lse[None]


# --- Gathered ---------------------------------------------------------------------------------------------------------


def gather_buffers(problem: DecodeProblem, args: DecodeArgs, groups: list[tuple[slice, slice]]) -> list[Tensor]:
    """Memory for the blocks of K, and of V where it is apart, of the largest group."""
    most = max(((requests.stop - requests.start) * (c.stop - c.start) for requests, c in groups), default=0)
    caches = [args.k, *(() if problem.alias else (args.v,)), *(() if args.k_rope is None else (args.k_rope,))]
    return [torch.empty(most * x.shape[1] * problem.page * x.shape[-1], dtype=storage_dtype(x)) for x in caches]


def run_gathered(
    problem: DecodeProblem,
    args: DecodeArgs,
    q: Tensor,
    requests: slice,
    columns: slice,
    reads: list[Reads],
    table: Tensor,
    buffers: list[Tensor],
) -> Part:
    """Copy some loose blocks of each request side by side, zero the rows that are not its own, and attend."""
    members = reads[requests]
    # a request with fewer loose blocks than its neighbours is padded with blocks past its end
    logical = torch.full((len(members), columns.stop - columns.start), problem.table_blocks)
    for i, request in enumerate(members):
        loose = request.loose[columns]
        logical[i, : len(loose)] = torch.tensor(loose, dtype=torch.long)
    ids = table[requests].gather(1, logical.clamp(max=problem.table_blocks - 1))
    position = (logical[:, :, None] * problem.page + torch.arange(problem.page)).flatten(1)  # [n, keys]
    lengths = torch.tensor([request.length for request in members])
    valid = position < lengths[:, None]
    k = gather_pages(args.k, requests, ids, valid, buffers[0], q.dtype)
    v = None if problem.alias else gather_pages(args.v, requests, ids, valid, buffers[1], q.dtype)
    if args.k_rope is not None:
        k = torch.cat([k, gather_pages(args.k_rope, requests, ids, valid, buffers[-1], q.dtype)], -1)
    bias = hidden_keys(problem, args, requests, position, lengths, valid)
    return requests, *attend(q[requests], k, v, problem.Dv, args.softmax_scale, bias)


def storage_dtype(cache: Tensor) -> torch.dtype:
    """What blocks are copied as: FP8 as bytes, since torch selects no FP8 rows."""
    return torch.uint8 if cache.dtype == FP8 else cache.dtype


def gather_pages(
    cache: Tensor, requests: slice, ids: Tensor, valid: Tensor, buffer: Tensor, dtype: torch.dtype
) -> Tensor:
    """The rows of pages `ids` [n, width] as [n, Hk, width * page, D] in `dtype`; 0 where not valid."""
    # NOTE: index_select copies whole blocks, fastest from one flat list of them (2 MiB: 0.05 ms; per head 0.07 ms;
    # advanced indexing took 3.7 ms for 8 MiB). From strided memory it would copy all of the cache first.
    shape = (len(ids), cache.shape[1], ids.shape[1], *cache.shape[3:])
    rows = buffer[: math.prod(shape)].view(shape)
    stored = cache.view(buffer.dtype)
    Hk, Nblk = cache.shape[1:3]
    flat = stored[0].is_contiguous()
    for i in range(len(ids)):
        blocks = stored[requests.start + i]
        if flat:
            index = (torch.arange(Hk)[:, None] * Nblk + ids[i]).flatten()
            torch.index_select(blocks.flatten(0, 1).flatten(1), 0, index, out=rows[i].flatten(0, 1).flatten(1))
        else:
            torch.stack([blocks[:, page] for page in ids[i].tolist()], 1, out=rows[i])
    rows = rows.flatten(2, 3)
    for i in (~valid.all(dim=1)).nonzero().flatten().tolist():
        rows[i].masked_fill_(~valid[i, :, None], 0)
    return rows.view(cache.dtype).to(dtype)


def hidden_keys(
    problem: DecodeProblem, args: DecodeArgs, requests: slice, position: Tensor, lengths: Tensor, valid: Tensor
) -> Tensor | None:
    """The bias [n, Hk|1, rows, keys] of the mask or of causality, and of the length; None where nothing is hidden."""
    if args.mask is None:
        last = lengths[:, None] - problem.S_q + torch.arange(problem.S_q)  # [n, S_q]
        keep = position[:, None, :] <= last[:, :, None]
        if keep.all():
            return None
        bias = to_bias(keep)[:, None]
    else:
        mask = args.mask[requests, :1] if args.mask.stride(1) == 0 else args.mask[requests]
        index = position.clamp(max=mask.shape[-1] - 1)[:, None, None].expand(*mask.shape[:3], -1)
        bias = to_bias(mask.gather(-1, index)).masked_fill_(~valid[:, None, None], -math.inf)
    if bias.shape[1] == 1:  # the same for all heads
        return bias.expand(-1, problem.ratio, -1, -1).flatten(1, 2)[:, None]
    return bias.unflatten(1, (problem.Hk, problem.ratio)).flatten(2, 3)


def merge_parts(problem: DecodeProblem, parts: list[Part]) -> tuple[Tensor, Tensor]:
    """out [B, Hk, rows, Dv] and lse [B, Hk, rows] of all parts; 0 and -inf where a request has none."""
    if len(parts) == 1 and parts[0][0] == slice(0, problem.B):
        return parts[0][1:]
    rows = problem.ratio * problem.S_q
    out = torch.zeros(problem.B, problem.Hk, rows, problem.Dv, dtype=torch.float32)
    lse = torch.full((problem.B, problem.Hk, rows), -math.inf, dtype=torch.float32)
    for requests, *part in parts:
        out[requests], lse[requests] = merge_two((out[requests], lse[requests]), (part[0], part[1]))
    return out, lse
