"""What is around attention: PagedKVCache against a list of rows, FP8 and row formats, block layouts, merge."""

from __future__ import annotations

import copy
import math
import pickle
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

import flash_mla
from flash_mla import BlockSparseLayout, CacheFullError, FlashMLAError, PagedKVCache, SequenceLengthError, ShapeError
from flash_mla.merge import merge
from flash_mla.quant import FORMATS, dequantise, quantise

from . import oracle
from .attention import Fault, illegal, legal
from .case import Case, raw
from .draw import BLOCK, FP8, Draw

# --- PagedKVCache -----------------------------------------------------------------------------------------------------


class Model:
    """What a PagedKVCache must hold: rows [Hk, n, D] of K and V for each request."""

    def __init__(self, batch: int, Hk: int, D: int, Dv: int, dtype: torch.dtype, device: str) -> None:
        empty = [torch.empty(Hk, 0, width, dtype=dtype, device=device) for width in (D, Dv)]
        self.rows = [(empty[0], empty[1]) for _ in range(batch)]

    def failures(self, cache: PagedKVCache) -> list[str]:
        """How the cache differs."""
        lengths = tuple(k.shape[1] for k, _ in self.rows)
        if cache.lengths != lengths or cache.seq_lens.tolist() != list(lengths):
            return [f"lengths {cache.lengths}, seq_lens {cache.seq_lens.tolist()}, not {lengths}"]
        failures = []
        used: set[tuple[int, int]] = set()
        for b, rows in enumerate(self.rows):
            row = cache.block_table[b].tolist()
            blocks = row[: -(-lengths[b] // BLOCK)]
            used |= {(b if cache.k_cache.stride(0) else 0, block) for block in blocks}
            for name, view, want in zip("kv", (cache.k_cache, cache.v_cache), rows, strict=True):
                for t in range(0, lengths[b], BLOCK):
                    n = min(BLOCK, lengths[b] - t)
                    got = view[b, :, row[t // BLOCK], :n]
                    if not torch.equal(bits(got), bits(want[:, t : t + n])):
                        failures.append(f"request {b}: {name} of tokens {t}.. is not what was appended")
                        break
        slabs = 1 if not cache.k_cache.stride(0) else len(lengths)
        free = slabs * cache.k_cache.shape[2] - len(used)
        if cache.num_free_blocks != free:
            failures.append(f"{cache.num_free_blocks} blocks free, not {free}")
        return failures


def bits(tensor: Tensor) -> Tensor:
    return tensor.contiguous().view(torch.uint8)


def snapshot(cache: PagedKVCache) -> tuple[Any, ...]:
    """All that an operation that raises must leave as it was."""
    tensors = (cache.k_cache, cache.v_cache, cache.block_table, cache.seq_lens)
    return (cache.lengths, cache.num_free_blocks, *(raw(x).clone() for x in tensors))


def same(a: tuple[Any, ...], b: tuple[Any, ...]) -> bool:
    return a[:2] == b[:2] and all(torch.equal(x, y) for x, y in zip(a[2:], b[2:], strict=True))


def paged_cache(draw: Draw, backend: str | None) -> Case:
    """A dozen operations of one PagedKVCache, each held against the model."""
    batch, Hk = draw.between(1, 4), draw.among((1, 2))
    latent = draw.chance(0.3)
    D = draw.among((8, 64, 96))
    Dv = draw.among([n for n in (8, 64, 96) if n <= D or not latent])
    dtype = draw.among((torch.float32, torch.bfloat16, torch.float16, FP8))
    tokens = draw.among((64, 100, 300))
    pool = None if draw.chance(0.4) else draw.among((3, 8, 20))
    cache = PagedKVCache(
        batch,
        Hk,
        D,
        max_seq_len=tokens,
        v_head_dim=Dv,
        latent=latent,
        pool_blocks=pool,
        dtype=dtype,
        device=draw.device,
    )
    for storage in (cache.k_cache, cache.v_cache):
        raw(storage).zero_()
    model = Model(batch, Hk, D, Dv, dtype, draw.device)
    log: list[str] = []

    def run() -> list[str]:
        nonlocal cache
        for _ in range(12):
            before = snapshot(cache)
            operation = draw.among(OPERATIONS)
            try:
                text, cache = operation(draw, cache, model)
                log.append(text)
            except FlashMLAError as error:
                log.append(f"{operation.__name__} refused: {type(error).__name__}")
                if not same(before, snapshot(cache)):
                    return [f"{'; '.join(log)}: a refused operation changed the cache"]
            except Exception as error:
                raise type(error)(f"{operation.__name__} after {'; '.join(log)}: {error}") from error
            if failures := model.failures(cache):
                return [f"{'; '.join(log)}: {failures[0]}"]
        return []

    return legal_cache(draw, run, cache)


def legal_cache(draw: Draw, run: Callable[[], list[str]], cache: PagedKVCache) -> Case:
    return Case("PagedKVCache", run, {"cache": repr(cache)}, lambda failures: failures)


def some(draw: Draw, batch: int) -> list[int]:
    return draw.value.sample(range(batch), draw.value.randint(1, batch))


def append(draw: Draw, cache: PagedKVCache, model: Model) -> tuple[str, PagedKVCache]:
    requests = some(draw, len(model.rows))
    T = draw.between(0, 70)
    _, Hk, _, _, D = cache.k_cache.shape
    Dv = cache.v_cache.shape[-1]
    latent = cache.v_cache.data_ptr() == cache.k_cache.data_ptr()
    dtype = cache.k_cache.dtype
    k, v = (draw.normal(len(requests), Hk, T, width, dtype=dtype) for width in (D, Dv))
    counts = [draw.value.randint(0, T) for _ in requests] if draw.chance(0.4) else None
    given = counts if counts is None or draw.chance(0.5) else torch.tensor(counts)
    everyone = requests == list(range(len(model.rows))) and draw.chance(0.5)
    cache.append(k, None if latent else v, given, None if everyone else requests)
    for r, b in enumerate(requests):
        n = T if counts is None else counts[r]
        new = (k[r, :, :n], k[r, :, :n, :Dv] if latent else v[r, :, :n])
        model.rows[b] = tuple(torch.cat([old, add], 1) for old, add in zip(model.rows[b], new, strict=True))  # type: ignore[assignment]
    return f"append {T} {counts} to {requests}", cache


def fork(draw: Draw, cache: PagedKVCache, model: Model) -> tuple[str, PagedKVCache]:
    source, target = (draw.value.randrange(len(model.rows)) for _ in range(2))
    cache.fork(source, target)
    model.rows[target] = model.rows[source]
    return f"fork {source} to {target}", cache


def reorder(draw: Draw, cache: PagedKVCache, model: Model) -> tuple[str, PagedKVCache]:
    index = [draw.value.randrange(len(model.rows)) for _ in model.rows]
    cache.reorder(torch.tensor(index) if draw.chance(0.5) else index)
    model.rows = [model.rows[i] for i in index]
    return f"reorder {index}", cache


def free(draw: Draw, cache: PagedKVCache, model: Model) -> tuple[str, PagedKVCache]:
    requests = some(draw, len(model.rows))
    cache.free(requests)
    for b in requests:
        model.rows[b] = tuple(x[:, :0] for x in model.rows[b])  # type: ignore[assignment]
    return f"free {requests}", cache


def truncate(draw: Draw, cache: PagedKVCache, model: Model) -> tuple[str, PagedKVCache]:
    requests = some(draw, len(model.rows))
    lengths = [draw.value.randint(0, cache.lengths[b]) for b in requests]
    cache.truncate(lengths, requests)
    for b, n in zip(requests, lengths, strict=True):
        model.rows[b] = tuple(x[:, :n] for x in model.rows[b])  # type: ignore[assignment]
    return f"truncate {requests} to {lengths}", cache


def grow(draw: Draw, cache: PagedKVCache, model: Model) -> tuple[str, PagedKVCache]:
    blocks = draw.between(1, 3)
    cache.grow(blocks)
    return f"grow {blocks}", cache


def copied(draw: Draw, cache: PagedKVCache, model: Model) -> tuple[str, PagedKVCache]:
    """Go on with a copy; the original is then emptied, which must not matter."""
    kind = draw.among(("pickle", "deepcopy", "copy"))
    if kind == "pickle":
        new = pickle.loads(pickle.dumps(cache))
    else:
        new = copy.deepcopy(cache) if kind == "deepcopy" else copy.copy(cache)
    cache.clear()
    raw(cache.k_cache).fill_(0x7F)
    return kind, new


def refused(draw: Draw, cache: PagedKVCache, model: Model) -> tuple[str, PagedKVCache]:
    """An operation that must raise one of ours; it does not return otherwise."""
    batch = len(model.rows)
    _, Hk, _, _, D = cache.k_cache.shape
    limit = cache.block_table.shape[1] * BLOCK
    rows = draw.normal(batch, Hk, 2, D, dtype=cache.k_cache.dtype)
    latent = cache.v_cache.data_ptr() == cache.k_cache.data_ptr()
    v = None if latent else draw.normal(batch, Hk, 2, cache.v_cache.shape[-1], dtype=cache.k_cache.dtype)
    calls: dict[str, tuple[Callable[[], Any], tuple[type[FlashMLAError], ...]]] = {
        "append past the end": (lambda: cache.extend(limit + 1), (SequenceLengthError, CacheFullError)),
        "append other heads": (lambda: cache.append(rows[:, :0], v), (ShapeError,)),
        "append a list": (lambda: cache.append([1], v), (ShapeError,)),
        "append text": (lambda: cache.append("k"), (ShapeError,)),
        "append float64": (lambda: cache.append(rows.double(), v), (flash_mla.DTypeError,)),
        "append on another device": (lambda: cache.append(rows.to("meta"), v), (flash_mla.DeviceError,)),
        "append to nobody": (lambda: cache.append(rows, v, requests=[batch]), (ShapeError,)),
        "append to one twice": (lambda: cache.extend(1, [0, 0]), (ShapeError,)),
        "append more than there is": (lambda: cache.append(rows, v, num_tokens=[3] * batch), (ShapeError,)),
        "negative counts": (lambda: cache.extend([-1] * batch), (ShapeError,)),
        "counts of text": (lambda: cache.extend("many"), (ShapeError,)),
        "counts of floats": (lambda: cache.extend([1.5] * batch), (ShapeError,)),
        "requests that are a number": (lambda: cache.free(0), (ShapeError,)),
        "requests of text": (lambda: cache.free("0"), (ShapeError,)),
        "requests that are None in fork": (lambda: cache.fork(None, 0), (ShapeError,)),
        "free a negative": (lambda: cache.free([-1]), (ShapeError,)),
        "reorder too few": (lambda: cache.reorder([0] * (batch + 1)), (ShapeError,)),
        "reorder a number": (lambda: cache.reorder(0), (ShapeError,)),
        "grow by 0": (lambda: cache.grow(0), (ShapeError,)),
        "grow by text": (lambda: cache.grow("2"), (ShapeError,)),
        "grow by a float": (lambda: cache.grow(1.5), (ShapeError,)),
    }
    name = draw.among([*calls])
    call, errors = calls[name]
    try:
        call()
    except errors:
        raise
    except FlashMLAError as error:
        raise AssertionError(f"{name}: {type(error).__name__}") from error
    raise AssertionError(f"{name}: not refused")


OPERATIONS = (append, append, append, append, fork, reorder, free, grow, copied, refused, refused)
if hasattr(PagedKVCache, "truncate"):
    OPERATIONS = (*OPERATIONS, truncate)


# --- FP8 --------------------------------------------------------------------------------------------------------------


def fp8(draw: Draw, backend: str | None) -> Case:
    """quantise and dequantise, values without bound."""
    B, H = draw.between(1, 3), draw.between(1, 3)
    x = draw.normal(B, H, draw.between(0, 4), 8, dtype=draw.among((torch.float32, torch.bfloat16, torch.float16)))
    x = x * draw.among((1.0, 1e-6, 1e4, 0.0))
    special = draw.among((None, math.inf, -math.inf, math.nan))
    if special is not None and x.numel():
        x.view(-1)[draw.value.randrange(x.numel())] = special
    factor = draw.among((None, None, 0.5, "tensor"))
    per_head = factor is None and draw.chance(0.5)
    descale = draw.uniform(B, H, low=0.1, high=3.0) if factor == "tensor" else factor
    arguments: dict[str, Any] = {"x": x, "descale": descale, "per_head": per_head}

    def verify(result: Any) -> list[str]:
        codes, used = result
        values, truth = dequantise(codes, used, torch.float32), x.float()
        step = torch.as_tensor(used).float()
        step = step[(...,) + (None,) * 2] if step.dim() else step
        failures = []
        if not (values.isnan() == truth.isnan()).all():
            failures.append("NaN came or went")
        finite = truth.isfinite()
        limit = (448 * step).expand_as(truth)
        want = torch.minimum(torch.maximum(truth, -limit), limit)
        error = (values - want).abs()
        bound = want.abs() / 16 + step * 2.0**-9
        if (error[finite] > bound.expand_as(error)[finite] * 1.01).any():
            failures.append("a finite value is off by more than half a step")
        if not torch.equal(values[truth.isinf()], want[truth.isinf()]):
            failures.append("an infinity did not saturate")
        return failures

    return Case("quantise", lambda: quantise(**arguments), arguments, verify)


def row_format(draw: Draw, backend: str | None) -> Case:
    """A row format: quantise, read back, append, read; or a call that it refuses."""
    fmt = FORMATS[draw.among([*FORMATS])]
    pages, page = draw.between(1, 3), draw.among((1, 16, 64))
    rows = draw.normal(pages, page, 1, fmt.head_dim, dtype=torch.bfloat16)
    cache = fmt.quantise(rows)
    if draw.chance(0.5):
        slots = draw.index([0])
        nope, rope = rows[0, :1, 0, : fmt.head_dim - 64], rows[0, :1, 0, fmt.head_dim - 64 :]
        x: dict[str, Any] = {"pages": cache, "slots": slots, "k_nope": nope, "k_rope": rope}
        faults: list[Fault] = [
            (
                "a slot past the pages",
                (flash_mla.BlockTableError,),
                lambda x: x.update(slots=draw.index([pages * page])),
            ),
            ("slots of two dims", (ShapeError,), lambda x: x.update(slots=slots[None])),
            ("floating slots", (flash_mla.DTypeError,), lambda x: x.update(slots=slots.float())),
            ("slots that are a list", (ShapeError,), lambda x: x.update(slots=[0])),
            (
                "rows of float32",
                (ShapeError, flash_mla.DTypeError),
                lambda x: x.update(k_nope=nope.float(), k_rope=rope.float()),
            ),
            ("rows of other columns", (ShapeError,), lambda x: x.update(k_nope=nope[:, 8:])),
            ("rows that are a list", (ShapeError,), lambda x: x.update(k_nope=[1])),
            ("pages of BF16", (flash_mla.DTypeError,), lambda x: x.update(pages=cache.view(torch.uint8).bfloat16())),
            ("pages of 3 dims", (ShapeError,), lambda x: x.update(pages=cache[:, :, 0])),
            ("pages of stride 0", (flash_mla.LayoutError,), lambda x: x.update(pages=cache[:1].expand(3, -1, -1, -1))),
            ("pages that are a list", (ShapeError,), lambda x: x.update(pages=[1])),
        ]
        return illegal(draw, "append", x, faults, fmt)
    order = draw.integers(5, low=0, high=pages * page)

    def run() -> Tensor:
        return torch.cat([fmt.dequantise(cache).flatten(0, 2), fmt.read(cache, order.to(draw.device))])

    def verify(result: Tensor) -> list[str]:
        want = torch.cat([rows.flatten(0, 2), rows.flatten(0, 2)[order]]).float()
        error = ((result.float() - want).abs() / want.abs().clamp_min(0.05)).max().item()
        return [] if error < 0.09 else [f"{fmt.name}: rows off by {error:.2f}"]

    return Case("RowFormat", run, {"pages": cache, "rows": rows}, verify)


def appended(draw: Draw, backend: str | None) -> Case:
    """Rows put into their pages, some dropped: the bytes that the format's encoding gives, and no other byte."""
    fmt = FORMATS[draw.among([*FORMATS])]
    pages, page = draw.between(1, 4), draw.among((1, 2, 16, 64))
    N = draw.between(0, pages * page)
    rows = draw.normal(N, fmt.head_dim, dtype=torch.bfloat16, scale=draw.among((1.0, 1.0, 1e-30, 1e4, 0.0)))
    if rows.numel() and draw.chance(0.3):
        rows.view(-1)[draw.value.randrange(rows.numel())] = draw.among((math.inf, -math.inf))
    slots = torch.randperm(pages * page, generator=draw.generator)[:N]
    dropped = draw.bits(N)
    cache = draw.poison(pages, fmt.page_bytes(page), dtype=FP8)[:, : page * fmt.row_bytes]
    cache = cache.view(pages, page, 1, fmt.row_bytes)
    want = cache.clone().view(torch.uint8)
    place = [x[~dropped].to(draw.device) for x in (slots // page, slots % page)]
    for part, value in zip(fmt.parts(want), fmt.encode(rows[~dropped.to(draw.device)]), strict=True):
        part[tuple(place)] = value
    parts = rows.split([fmt.head_dim - 64, 64], dim=1)
    nope, rope = (draw.inside(x) if draw.chance(0.3) else x for x in parts)
    x: dict[str, Any] = {
        "pages": cache,
        "slots": draw.index(slots.masked_fill(dropped, draw.among((-1, -(2**31))))),
        "k_nope": nope,
        "k_rope": rope,
        "check_values": draw.chance(0.5),
    }

    def verify(_: None) -> list[str]:
        same = torch.equal(cache.view(torch.uint8), want)
        return [] if same else [f"{fmt.name}: other bytes than the encoding's"]

    return legal(draw, "append", x, verify, [cache], fmt)


# --- Layouts and merge ------------------------------------------------------------------------------------------------


def block_layout(draw: Draw, backend: str | None) -> Case:
    """A constructor of BlockSparseLayout against its element mask."""
    P = draw.between(1, 400)
    i, j = torch.arange(P)[:, None], torch.arange(P)
    window, first = draw.between(1, 200), draw.between(1, 100)
    causal = draw.chance(0.5)
    near = (i - j < window) & (j <= i) if causal else (i - j).abs() < window
    everywhere = ((i < first) | (j < first)) & ((j <= i) if causal else True)
    dense = draw.bits(P, P)
    name, arguments, mask = draw.among(
        (
            ("causal", {"P": P}, j <= i),
            ("sliding_window", {"P": P, "window": window, "causal": causal}, near),
            ("local_global", {"P": P, "window": window, "global_tokens": first, "causal": causal}, near | everywhere),
            ("from_dense_mask", {"mask": dense}, dense),
        )
    )
    if name != "from_dense_mask":
        arguments["device"] = draw.device
    if draw.chance(0.3) and name != "from_dense_mask":
        wrong = draw.among((0, -1, "64", 1.5, None))
        which = draw.among([key for key in arguments if key not in ("causal", "device")])
        return illegal(
            draw,
            name,
            arguments,
            [(f"{which} {wrong}", (ShapeError,), lambda x: x.update({which: wrong}))],
            BlockSparseLayout,
        )

    def verify(layout: Any) -> list[str]:
        n = -(-P // BLOCK)
        want = torch.zeros(n, n, dtype=torch.bool)
        for r in range(n):
            for c in range(n):
                want[r, c] = mask[r * BLOCK : (r + 1) * BLOCK, c * BLOCK : (c + 1) * BLOCK].any()
        return [] if torch.equal(layout.blocks[0, 0].cpu(), want) else [f"other blocks than the mask's: {layout}"]

    return legal(draw, name, arguments, verify, [], BlockSparseLayout)


def merged(draw: Draw, backend: str | None) -> Case:
    """merge of the parts of one softmax."""
    parts, M, L, D = draw.between(1, 4), draw.between(1, 5), draw.between(0, 20), 8
    q, k, v = (draw.normal(1, n, D).cpu() for n in (M, L, D and L))
    cuts = sorted(draw.value.randint(0, L) for _ in range(parts - 1))
    edges = [0, *cuts, L]
    made = [oracle.attention(q.double(), k[:, a:b].double(), v[:, a:b].double(), 1.0) for a, b in pairwise(edges)]
    arguments = {
        "outs": torch.stack([part.out for part in made]).float().to(draw.device),
        "lses": torch.stack([part.lse for part in made]).float().to(draw.device),
    }

    def verify(result: Any) -> list[str]:
        out, lse = result
        truth = oracle.attention(q.double(), k.double(), v.double(), 1.0)
        return oracle.judge(out[None], lse[None], [truth], torch.float32)

    return Case("merge", lambda: merge(**arguments), arguments, verify)
