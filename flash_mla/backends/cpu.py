"""The CPU backend: torch's flash attention op over pages where they lie.

Softmax does not care about the order of keys, so a request's pages need not be put in order. Decode sorts the pages that
a request uses by physical id; each run of consecutive ids is one strided view of the cache, and one call of
`aten::_scaled_dot_product_flash_attention_for_cpu` (which returns out and lse) with the query heads of a group as its
rows reads K and V once for all of them. What cannot be read in place is gathered in slices of at most GATHER_BYTES: the
last pages of a request (slots past its length may hold NaN), short runs, and dtypes or head dims the op does not take.
Partial results meet in `merge`.

MLA's V is the first Dv columns of K: the op is called with V = K and the last columns of its output are dropped, so each
row is read once.

Prefill runs one request at a time through the same op; masks and block layouts go through tiles of query rows, so that
no [P, P] bias exists.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from flash_mla.merge import apply_sink, merge
from flash_mla.problem import BLOCK, FP8, AppendArgs, DecodeArgs, DecodeProblem, PrefillArgs, PrefillProblem

# NOTE: one op call costs about 15 us; a run of 8 blocks of a 32/8 GQA cache holds 4 MiB, some 200 us of reading.
MIN_RUN = 8
GATHER_BYTES = 8 << 20
BIAS_BYTES = 16 << 20

flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu


def available() -> str | None:
    """The CPU is always there."""
    return None


def refuse(problem: DecodeProblem | PrefillProblem) -> str | None:
    """Runs everything that the contract admits, on CPU tensors."""
    return None if problem.device.type == "cpu" else f"the tensors are on {problem.device}, not on the CPU"


def config(problem: DecodeProblem | PrefillProblem) -> None:
    """There is nothing to choose ahead: the runs of pages decide."""
    return None


def launch(problem: DecodeProblem | PrefillProblem, config: None, args: DecodeArgs | PrefillArgs) -> None:
    """Fill args.out and args.lse."""
    if isinstance(problem, DecodeProblem):
        assert isinstance(args, DecodeArgs)
        decode(problem, args)
    else:
        assert isinstance(args, PrefillArgs)
        prefill(problem, args)


# --- Steps ------------------------------------------------------------------------------------------------------------


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """FP8 computes in BF16, which holds every e4m3 value; the others as they are."""
    return torch.bfloat16 if dtype == FP8 else dtype


def attend(
    q: Tensor, k: Tensor, v: Tensor | None, Dv: int, scale: float, bias: Tensor | None = None, causal: bool = False
) -> tuple[Tensor, Tensor]:
    """One call of the op: q [N, H, M, D], k [N, H, S, D], v [N, H, S, Dv] or None where V is K's first Dv columns.

    bias is FP32, broadcasts to [N, H, M, S] and is added to the scaled scores. Returns out [N, H, M, Dv] and the
    natural-log lse [N, H, M]; rows whose bias is -inf throughout give 0 and -inf.
    """
    D = q.shape[-1]
    if v is None:
        v = k
    elif Dv < D:
        v = F.pad(v, (0, D - Dv))
    elif Dv > D:
        q, k = F.pad(q, (0, Dv - D)), F.pad(k, (0, Dv - D))
    out, lse = flash(q, k, v, is_causal=causal, attn_mask=bias, scale=scale)
    if bias is not None:
        # the op reports lse 0 where every key is masked
        lse = lse.masked_fill((bias == -math.inf).all(-1), -math.inf)
    return out[..., :Dv], lse


def to_bias(mask: Tensor) -> Tensor:
    """Bool (True = attend) or floating -> FP32 addend."""
    if mask.dtype == torch.bool:
        return torch.zeros(mask.shape).masked_fill_(~mask, -math.inf)
    return mask.float()


def scaled_rows(problem: DecodeProblem | PrefillProblem, args: DecodeArgs | PrefillArgs) -> Tensor:
    """q as [B, Hk, ratio, rows, D] in the compute dtype, with the descales of Q and K folded in."""
    q = args.q.unflatten(1, (problem.Hk, problem.ratio))
    dtype = compute_dtype(problem.dtype)
    if args.q_descale is None and args.k_descale is None:
        return q.to(dtype)
    factor = torch.ones(problem.B, problem.Hk)
    for descale in (args.q_descale, args.k_descale):
        if descale is not None:
            factor = factor * descale
    return (q.float() * factor[:, :, None, None, None]).to(dtype)


def finish(args: DecodeArgs | PrefillArgs, out: Tensor, lse: Tensor) -> None:
    """Apply V's descale and the sink, and write; out [B, Hk, ratio, rows, Dv], lse [B, Hk, ratio, rows]."""
    if args.v_descale is not None:
        out = out.float() * args.v_descale[:, :, None, None, None]
    if args.attn_sink is not None:
        out = apply_sink(out.float(), lse, args.attn_sink.view(1, *lse.shape[1:3], 1))
    args.out.copy_(out.flatten(1, 2))
    if args.lse is not None:
        args.lse.copy_(lse.flatten(1, 2))


# --- Decode -----------------------------------------------------------------------------------------------------------


@dataclass
class Request:
    """One request's share of a decode call."""

    b: int
    length: int
    runs: list[tuple[int, int]] = field(default_factory=list)
    """(first block, blocks) to read in place: full blocks that every query sees whole."""
    loose: list[int] = field(default_factory=list)
    """Logical blocks to gather."""


def decode(problem: DecodeProblem, args: DecodeArgs) -> None:
    """The whole call: plan each request's reads, run them, merge."""
    table = args.block_table.clamp(0, max(problem.Nblk - 1, 0)).long()
    limit = (
        problem.table_blocks * BLOCK if args.mask is None else min(problem.table_blocks * BLOCK, args.mask.shape[-1])
    )
    lengths = args.seq_lens.clamp(0, limit).tolist()
    in_place = args.mask is None and readable_in_place(problem, args)
    requests = [plan_reads(b, length, table[b], problem.S_q, in_place) for b, length in enumerate(lengths)]

    q = scaled_rows(problem, args).flatten(2, 3)  # [B, Hk, ratio * S_q, D]
    parts: list[tuple[slice, Tensor, Tensor]] = []
    for (start, blocks), group in shared_runs(requests):
        parts += run_in_place(problem, args, q, group, start, blocks)
    for group, columns in gather_groups(problem, args, requests):
        parts.append((group, *run_gathered(problem, args, q, group, columns, requests, table)))
    out, lse = merge_parts(problem, parts)
    finish(args, out.unflatten(2, (problem.ratio, problem.S_q)), lse.unflatten(2, (problem.ratio, problem.S_q)))


def readable_in_place(problem: DecodeProblem, args: DecodeArgs) -> bool:
    """Whether consecutive blocks form one strided view that the op takes."""
    rows_even = all(t.stride(2) == BLOCK * t.stride(3) for t in (args.k, args.v))
    return problem.dtype != FP8 and rows_even and (problem.alias or problem.Dv == problem.D)


def plan_reads(b: int, length: int, table: Tensor, S_q: int, in_place: bool) -> Request:
    """Split the request's blocks into runs of consecutive ids and loose blocks."""
    # causality touches the last S_q - 1 keys: blocks before them are seen whole by every query
    full = max(length - S_q + 1, 0) // BLOCK if in_place else 0
    request = Request(b, length)
    if full:
        ids, order = table[:full].sort()
        first = 0
        breaks = (ids.diff() != 1).nonzero().flatten().tolist()
        for last in [*breaks, full - 1]:
            if last + 1 - first >= MIN_RUN:
                request.runs.append((int(ids[first]), last + 1 - first))
            else:
                request.loose += order[first : last + 1].tolist()
            first = last + 1
    request.loose += range(full, -(-length // BLOCK))
    return request


def shared_runs(requests: list[Request]) -> Iterator[tuple[tuple[int, int], slice]]:
    """Equal runs of neighbouring requests, together: (run, requests)."""
    owners: dict[tuple[int, int], list[int]] = {}
    for request in requests:
        for run in request.runs:
            owners.setdefault(run, []).append(request.b)
    for run, members in owners.items():
        first = members[0]
        for here, after in zip(members, [*members[1:], -1], strict=True):
            if after != here + 1:
                yield run, slice(first, here + 1)
                first = after


def run_in_place(
    problem: DecodeProblem, args: DecodeArgs, q: Tensor, group: slice, start: int, blocks: int
) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """Attend a run of blocks, cut along the keys where requests and heads alone would leave threads idle."""
    count = group.stop - group.start
    threads = torch.get_num_threads()
    if count * problem.Hk >= threads:
        k, v = (t[group, :, start : start + blocks].flatten(2, 3) for t in (args.k, args.v))
        yield group, *attend(q[group], k, None if problem.alias else v, problem.Dv, args.softmax_scale)
        return
    cuts = min(-(-threads // problem.Hk), blocks // MIN_RUN)
    for b in range(group.start, group.stop):
        one = slice(b, b + 1)
        done = start
        for parts, each in ((cuts, blocks // cuts), (1, blocks % cuts)):
            if not each:
                continue
            k, v = (
                t[b, :, done : done + parts * each].unflatten(1, (parts, each)).flatten(2, 3)  # [Hk, parts, keys, D]
                for t in (args.k, args.v)
            )
            rows = q[b].unsqueeze(1).expand(-1, parts, -1, -1)
            out, lse = attend(rows, k, None if problem.alias else v, problem.Dv, args.softmax_scale)
            yield one, *(t.unsqueeze(0) for t in merge(out.float().transpose(0, 1), lse.transpose(0, 1)))
            done += parts * each


def gather_groups(problem: DecodeProblem, args: DecodeArgs, requests: list[Request]) -> Iterator[tuple[slice, slice]]:
    """Neighbouring requests and the columns of their loose blocks that fit GATHER_BYTES and BIAS_BYTES together."""
    widths = [len(request.loose) for request in requests]
    block_bytes = problem.Hk * BLOCK * (problem.D + (0 if problem.alias else problem.Dv))
    block_bytes *= compute_dtype(problem.dtype).itemsize
    bias_bytes = problem.Hq * problem.S_q * BLOCK * 4
    budget = max(1, min(GATHER_BYTES // block_bytes, BIAS_BYTES // bias_bytes))
    first = 0
    while first < len(requests):
        # grow the group while its padding stays small and its first columns fit
        last, widest = first + 1, widths[first]
        while last < len(requests) and max(widest, widths[last]) * (last + 1 - first) <= budget:
            widest = max(widest, widths[last])
            last += 1
        step = max(1, budget // (last - first))
        for column in range(0, widest, step):
            yield slice(first, last), slice(column, min(column + step, widest))
        first = last


def run_gathered(
    problem: DecodeProblem,
    args: DecodeArgs,
    q: Tensor,
    group: slice,
    columns: slice,
    requests: list[Request],
    table: Tensor,
) -> tuple[Tensor, Tensor]:
    """Copy the group's loose blocks side by side, zero what is not theirs, and attend."""
    members = requests[group]
    width = columns.stop - columns.start
    keys = torch.full((len(members), width), problem.table_blocks, dtype=torch.long)
    for i, request in enumerate(members):
        loose = torch.tensor(request.loose[columns], dtype=torch.long)
        keys[i, : len(loose)] = loose
    ids = (
        table.gather(1, torch.arange(0))
        if not problem.table_blocks
        else table[group].gather(1, keys.clamp(max=problem.table_blocks - 1))
    )
    position = (keys[:, :, None] * BLOCK + torch.arange(BLOCK)).flatten(1)  # [n, width * 64]
    lengths = torch.tensor([request.length for request in members])
    valid = position < lengths[:, None]
    k = gather(args.k, group, ids, valid, problem.dtype)
    v = None if problem.alias else gather(args.v, group, ids, valid, problem.dtype)
    bias = gathered_bias(problem, args, group, position, lengths, valid)
    return attend(q[group], k, v, problem.Dv, args.softmax_scale, bias)


def gather(cache: Tensor, group: slice, ids: Tensor, valid: Tensor, dtype: torch.dtype) -> Tensor:
    """Rows of the blocks `ids` [n, width] -> [n, Hk, width * 64, D], with 0 where not valid."""
    # NOTE: index_select copies whole blocks (0.3 ms for 8 MiB); advanced indexing took 3.7 ms.
    stored = cache.view(torch.uint8) if dtype == FP8 else cache
    rows = torch.empty(*ids.shape[:1], cache.shape[1], ids.shape[1], *cache.shape[3:], dtype=stored.dtype)
    for i, b in enumerate(range(group.start, group.stop)):
        torch.index_select(stored[b], 1, ids[i], out=rows[i])
    rows = rows.flatten(2, 3)
    for i, all_valid in enumerate(valid.all(-1).tolist()):
        if not all_valid:
            rows[i].masked_fill_(~valid[i, :, None], 0)
    return rows.view(FP8).to(torch.bfloat16) if dtype == FP8 else rows


def gathered_bias(
    problem: DecodeProblem, args: DecodeArgs, group: slice, position: Tensor, lengths: Tensor, valid: Tensor
) -> Tensor | None:
    """What hides keys from rows: the mask, causality among the S_q queries, the length. [n, Hk|1, rows, keys]."""
    if args.mask is None:
        last = lengths[:, None] - problem.S_q + torch.arange(problem.S_q)  # [n, S_q]
        keep = position[:, None] <= last[:, :, None]
        if keep.all():
            return None
        bias = to_bias(keep)[:, None]
    else:
        mask = args.mask[group, :1] if args.mask.stride(1) == 0 else args.mask[group]
        index = position.clamp(max=mask.shape[-1] - 1)[:, None, None].expand(*mask.shape[:3], -1)
        bias = to_bias(mask.gather(-1, index)).masked_fill_(~valid[:, None, None], -math.inf)
    if bias.shape[1] == 1:
        bias = bias.expand(-1, problem.ratio, -1, -1).flatten(1, 2)
        return bias[:, None]  # the same for every KV head
    return bias.unflatten(1, (problem.Hk, problem.ratio)).flatten(2, 3)


def merge_parts(problem: DecodeProblem, parts: list[tuple[slice, Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """Partial results of slices of the batch -> out [B, Hk, rows, Dv], lse [B, Hk, rows]."""
    if len(parts) == 1 and parts[0][0] == slice(0, problem.B):
        return parts[0][1:]
    rows = problem.ratio * problem.S_q
    out = torch.zeros(problem.B, problem.Hk, rows, problem.Dv)
    lse = torch.full((problem.B, problem.Hk, rows), -math.inf)
    for group, part, part_lse in parts:
        merged = merge(torch.stack([out[group], part.float()]), torch.stack([lse[group], part_lse]))
        out[group], lse[group] = merged
    return out, lse


# --- Prefill ----------------------------------------------------------------------------------------------------------


def prefill(problem: PrefillProblem, args: PrefillArgs) -> None:
    """One request at a time; K and V as they lie, or gathered from their pages."""
    rows = scaled_rows(problem, args)  # [B, Hk, ratio, P, D]
    dtype = compute_dtype(problem.dtype)
    for b in range(problem.B):
        start = 0 if args.start_pos is None else int(args.start_pos[b])
        keys = start + problem.P if problem.paged else problem.S_kv
        if args.seq_lens is not None:
            keys = min(keys, max(int(args.seq_lens[b]), 0))
        k = request_rows(problem, args.k, args.block_table, b, keys).to(dtype)
        v = None if problem.alias else request_rows(problem, args.v, args.block_table, b, keys).to(dtype)
        if args.mask is None and args.block_mask is None:
            out, lse = attend_plain(problem, args, rows[b], k, v, start)
        else:
            out, lse = attend_tiles(problem, args, b, rows[b], k, v, start)
        one = PrefillArgs(
            *(t[b : b + 1] if i in PER_REQUEST and isinstance(t, Tensor) else t for i, t in enumerate(args))
        )
        finish(one, out[None], lse[None])


PER_REQUEST = {PrefillArgs._fields.index(name) for name in ("q", "q_descale", "k_descale", "v_descale", "out", "lse")}


def request_rows(problem: PrefillProblem, x: Tensor, table: Tensor | None, b: int, keys: int) -> Tensor:
    """[Hk, keys, D] of request b: a view where its rows lie evenly, else a gathered copy."""
    if table is None:
        return x[b, :, :keys]
    ids = table[b, : -(-keys // BLOCK)].long().clamp(0, max(x.shape[2] - 1, 0))
    consecutive = bool((ids.diff() == 1).all()) and x.stride(2) == BLOCK * x.stride(3)
    if consecutive and len(ids):
        blocks = x[b, :, int(ids[0]) : int(ids[0]) + len(ids)]
    elif x.dtype == FP8:
        blocks = x[b].view(torch.uint8).index_select(1, ids).view(FP8)
    else:
        blocks = x[b].index_select(1, ids)
    return blocks.flatten(1, 2)[:, :keys]


def attend_plain(
    problem: PrefillProblem, args: PrefillArgs, q: Tensor, k: Tensor, v: Tensor | None, start: int
) -> tuple[Tensor, Tensor]:
    """Causal or full attention of one request: q [Hk, ratio, P, D], k [Hk, S, D]."""
    shared = lambda x: None if x is None else x.unsqueeze(1).expand(-1, problem.ratio, -1, -1)  # noqa: E731
    keys = k.shape[1]

    def part(rows: Tensor, first: int, last: int, causal: bool) -> tuple[Tensor, Tensor]:
        values = None if v is None else v[:, first:last]
        return attend(rows, shared(k[:, first:last]), shared(values), problem.Dv, args.softmax_scale, None, causal)

    if not keys:
        return q.new_zeros(*q.shape[:3], problem.Dv), torch.full(q.shape[:3], -math.inf)
    if not problem.causal:
        return part(q, 0, keys, False)
    # rows whose own position is among the keys, then rows past the last key, which see all of them
    inside = max(min(keys - start, problem.P), 0)
    pieces = []
    if inside:
        diagonal = part(q[:, :, :inside], start, start + inside, True)
        if start:
            before = part(q[:, :, :inside], 0, start, False)
            diagonal = merge(
                torch.stack([before[0].float(), diagonal[0].float()]), torch.stack([before[1], diagonal[1]])
            )
        pieces.append(diagonal)
    if inside < problem.P:
        pieces.append(part(q[:, :, inside:], 0, keys, False))
    return pieces[0] if len(pieces) == 1 else tuple(torch.cat(x, 2) for x in zip(*pieces, strict=True))  # type: ignore[return-value]


def attend_tiles(
    problem: PrefillProblem, args: PrefillArgs, b: int, q: Tensor, k: Tensor, v: Tensor | None, start: int
) -> tuple[Tensor, Tensor]:
    """Masked or block-sparse attention of one request, a tile of query rows after another.

    A tile is one block row where a block mask is given, so that blocks which it drops are neither read nor computed.
    """
    out = q.new_zeros(*q.shape[:3], problem.Dv)
    lse = torch.full(q.shape[:3], -math.inf)
    mask = None if args.mask is None else args.mask[b].unflatten(0, (problem.Hk, problem.ratio))
    blocks = None if args.block_mask is None else args.block_mask[b].unflatten(0, (problem.Hk, problem.ratio))
    for heads, ratios in head_groups(mask, blocks, problem):
        shared = heads.stop - heads.start > 1 or ratios.stop - ratios.start > 1
        bias_heads = 1 if shared else 1
        tile = BLOCK if blocks is not None else max(BLOCK, BIAS_BYTES // (4 * bias_heads * max(k.shape[1], 1)))
        for row in range(0, problem.P, tile):
            rows = slice(row, min(row + tile, problem.P))
            last = min(k.shape[1], start + rows.stop) if problem.causal else k.shape[1]
            kept = None if blocks is None else blocks[heads.start, ratios.start, row // BLOCK, : -(-last // BLOCK)]
            index = key_index(kept, last)
            count = last if index is None else len(index)
            if not count:
                continue
            pick = lambda x: x[heads, :last] if index is None else x[heads].index_select(1, index)  # noqa: B023, E731
            wide = lambda x: x.unsqueeze(1).expand(-1, ratios.stop - ratios.start, -1, -1)  # noqa: B023, E731
            bias = None
            if mask is not None:
                cut = mask[heads.start, ratios.start, rows]
                bias = to_bias(cut[:, :last] if index is None else cut.index_select(1, index))
            if problem.causal:
                bias = hide_future(bias, index, start + row, rows.stop - row, count)
            part, part_lse = attend(
                q[heads, ratios, rows],
                wide(pick(k)),
                None if v is None else wide(pick(v)),
                problem.Dv,
                args.softmax_scale,
                None if bias is None else bias[None, None],
            )
            out[heads, ratios, rows], lse[heads, ratios, rows] = part, part_lse
    return out, lse


def head_groups(mask: Tensor | None, blocks: Tensor | None, problem: PrefillProblem) -> Iterator[tuple[slice, slice]]:
    """Heads that see the same mask and layout: all of them where both broadcast, else one query head at a time."""
    broadcast = all(t is None or (t.stride(0) == 0 and t.stride(1) == 0) or problem.Hq == 1 for t in (mask, blocks))
    if broadcast:
        yield slice(0, problem.Hk), slice(0, problem.ratio)
        return
    for h in range(problem.Hk):
        for r in range(problem.ratio):
            yield slice(h, h + 1), slice(r, r + 1)


def key_index(kept: Tensor | None, last: int) -> Tensor | None:
    """The key rows of the kept blocks; None where they are 0..last-1."""
    if kept is None or kept.all():
        return None
    index = (kept.nonzero() * BLOCK + torch.arange(BLOCK)).flatten()
    return index[index < last]


def hide_future(bias: Tensor | None, index: Tensor | None, first: int, rows: int, count: int) -> Tensor | None:
    """Add causality to a tile whose first row stands at position `first`."""
    position = torch.arange(count) if index is None else index
    future = position[None] > first + torch.arange(rows)[:, None]
    if bias is None:
        return to_bias(~future)
    return bias.masked_fill_(future, -math.inf)


# --- Append -----------------------------------------------------------------------------------------------------------


def append(args: AppendArgs) -> None:
    """Write new rows into their pages."""
    B, _, P, _ = args.k.shape
    token = torch.arange(P)
    position = token + (
        torch.zeros(B, 1, dtype=torch.long) if args.start_pos is None else args.start_pos.long()[:, None]
    )
    written = torch.ones(B, P, dtype=torch.bool) if args.num_tokens is None else token < args.num_tokens[:, None]
    b, i = written.nonzero(as_tuple=True)
    block = args.block_table[b, position[b, i] // BLOCK].long()
    slot = position[b, i] % BLOCK
    for rows, cache in ((args.k, args.k_cache), (args.v, args.v_cache)):
        if rows is not None and cache is not None:
            stored = (lambda x: x.view(torch.uint8)) if rows.dtype == FP8 else (lambda x: x)
            stored(cache).transpose(1, 3)[b, slot, block] = stored(rows).transpose(1, 2)[b, i]
