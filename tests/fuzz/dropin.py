"""Calls of flash_mla.deepseek."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from flash_mla import (
    BlockCountError,
    DTypeError,
    HeadGroupingError,
    LayoutError,
    MaskShapeError,
    SequenceLengthError,
    ShapeError,
    deepseek,
)

from . import oracle
from .attention import Fault, illegal, legal
from .case import Case
from .draw import BLOCK, FP8, NEVER, Draw

FLOATS = (torch.float32, torch.bfloat16, torch.float16)


def faults_of(draw: Draw, x: dict[str, Any], q: str = "q") -> list[Fault]:
    """What every function of the package refuses."""
    return [
        ("q is a list", (ShapeError,), lambda x: x.update({q: [1.0]})),
        (
            "q of integers",
            (DTypeError,),
            lambda x: x.update({q: torch.zeros(x[q].shape, dtype=torch.int32, device=draw.device)}),
        ),
        ("q of 2 dims", (ShapeError,), lambda x: x.update({q: torch.zeros(4, 64, device=draw.device)})),
    ]


def with_out(draw: Draw, x: dict[str, Any], size: tuple[int, ...], dtype: torch.dtype) -> list[Tensor]:
    """Sometimes an `out` in the arguments, and what the call may therefore write; a slice or off 16 bytes, too."""
    if not draw.chance(0.2):
        return []
    out = draw.poison(*size, dtype=dtype)
    x["out"] = draw.inside(out, contiguous=draw.chance(0.5)) if draw.chance(0.5) else out
    return [x["out"]]


def scale_fault(draw: Draw, name: str) -> Fault:
    value = draw.among((math.nan, math.inf, "0.1", [0.1]))
    return f"{name} {value}", (ShapeError,), lambda x: x.update({name: value})


# --- Dense decode -----------------------------------------------------------------------------------------------------


def dense(draw: Draw, backend: str | None) -> Case:
    """flash_mla_with_kvcache over a pool, and its FP8 form."""
    fp8 = draw.maybe(0.25)
    dtype = FP8 if fp8 else draw.pick(FLOATS)
    D, Dv, _ = draw.head_dims()
    Dv = min(D, Dv)
    B = draw.pick((1, 2, 2, 3)) if not draw.maybe(0.02) else 0
    Hk = draw.pick((1, 1, 1, 2))
    Hq = Hk * draw.pick((1, 4, 8, 16))
    S_q = draw.pick((1, 1, 1, 2, 4)) if not draw.maybe(0.02) else 0
    page = draw.pick((64, 64, 128))
    lengths = [draw.between(0, draw.among((1, 150, 400))) for _ in range(B)]
    counts = [-(-n // page) for n in lengths]
    pages = sum(counts) + draw.between(0, 2)
    width = max(counts, default=0) + draw.between(0, 1)
    table = torch.full((B, width), draw.among((NEVER, -1)))
    order = torch.randperm(pages, generator=draw.generator)
    for b, count in enumerate(counts):
        taken = sum(counts[:b])
        table[b, :count] = order[taken : taken + count]
    layout = draw.pick(("dense", "padded heads", "offset"))
    pool = draw.poison(pages, page, Hk + (layout == "padded heads"), D, dtype=dtype)[:, :, :Hk]
    if layout == "offset":
        pool = draw.inside(pool, contiguous=True)
    for b, length in enumerate(lengths):
        for t in range(length):
            pool[int(table[b, t // page]), t % page] = draw.normal(Hk, D, dtype=dtype)
    q = draw.normal(B, S_q, Hq, D, dtype=dtype)
    causal = draw.pick((False, True))
    x: dict[str, Any] = {
        "q": draw.inside(q) if draw.maybe(0.2) else q,
        "k_cache": pool,
        "block_table": draw.index(table),
        "cache_seqlens": draw.index(lengths),
        "head_dim_v": Dv,
        "softmax_scale": draw.scale(D),
        "causal": causal,
        "backend": backend,
    }
    name = "flash_mla_with_kvcache"
    sink = None
    if fp8:
        name = "flash_mla_with_kvcache_fp8"
        for factor in ("descale_q", "descale_k"):
            size = draw.among(((), (1,), (B,)))
            x[factor] = None if size == () else draw.uniform(*size, low=0.25, high=2.0)
    elif draw.maybe(0.2):
        sink = x["attn_sink"] = draw.normal(Hq)
    if draw.chance(0.3):
        other = torch.float16 if dtype != torch.float16 else torch.bfloat16
        faults = [
            *faults_of(draw, x),
            scale_fault(draw, "softmax_scale"),
            ("a cache of another dtype", (DTypeError,), lambda x: x.update(k_cache=pool.to(other))),
            ("a cache of 5 dims", (ShapeError,), lambda x: x.update(k_cache=pool[None])),
            ("no table", (ShapeError,), lambda x: x.update(block_table=None)),
            ("lengths of another batch", (ShapeError,), lambda x: x.update(cache_seqlens=draw.index([0] * (B + 1)))),
            ("pages of 48 tokens", (BlockCountError,), lambda x: x.update(k_cache=pool[:, :48])),
            ("head_dim_v past d", (ShapeError,), lambda x: x.update(head_dim_v=D + 8)),
            ("head_dim_v of text", (ShapeError,), lambda x: x.update(head_dim_v="64")),
        ]
        if Hk > 1:
            faults.append(
                (
                    "heads that are no multiple",
                    (HeadGroupingError,),
                    lambda x: x.update(q=torch.cat([q, q[:, :, :1]], 2)),
                )
            )
        return illegal(draw, name, x, faults, deepseek)

    def verify(result: Any) -> list[str]:
        out, lse = result
        scale = D**-0.5 if x["softmax_scale"] is None else x["softmax_scale"]
        truth = []
        for b, length in enumerate(lengths):
            rows = (
                torch.stack([oracle.float64(pool[int(table[b, t // page]), t % page]) for t in range(length)], 1)
                if length
                else torch.zeros(Hk, 0, D, dtype=torch.float64)
            )
            keep = torch.arange(length) <= length - S_q + torch.arange(S_q)[:, None] if causal else None
            factors = [1.0 if x.get(n) is None else float(x[n].expand(B)[b]) for n in ("descale_q", "descale_k")]
            truth.append(
                oracle.attention(
                    oracle.float64(q[b]).transpose(0, 1) * factors[0],
                    rows * factors[1],
                    rows[..., :Dv] * factors[1],
                    scale,
                    keep,
                    None,
                    sink,
                )
            )
        return oracle.judge(out.transpose(1, 2), lse, truth, dtype, math.inf)

    writes = [] if fp8 else with_out(draw, x, (B, S_q, Hq, Dv), dtype)
    return legal(draw, name, x, verify, writes, deepseek)


# --- Sparse -----------------------------------------------------------------------------------------------------------

LATENT = {"fp8_ds_mla": 576, "model1": 512, "v4.1": 512, "flat": 576, "fp8_token": 576}
UNIT = {"fp8_ds_mla": 4, "model1": 2, "v4.1": 1, "flat": 1, "fp8_token": 4}
"""Bytes on which rows begin."""
PITCH = UNIT | {"model1": 576, "fp8_token": 16}
"""Bytes of which a page's pitch is a multiple."""
APART = ("model1", "fp8_token")
"""Formats whose scales lie behind a page's rows."""


def pool_of(draw: Draw, name: str | None, pages: int, page: int, D: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """A cache [pages, page, 1, D or bytes] and its rows in float64 [pages * page, D]."""
    if name is None:
        cache = draw.normal(pages, page, 1, D, dtype=dtype)
        if draw.chance(0.2):
            cache = draw.inside(cache)
        return cache, oracle.float64(cache).reshape(pages * page, D)
    codes = {"model1": 448, "flat": 576}.get(name, 512)
    stored = draw.integers(pages, page, codes, low=0, high=256).to(torch.uint8)
    stored[(stored & 0x7F) == 0x7F] = 0x3F  # no NaN
    if name == "flat":
        # magnitudes of up to 448 would make every softmax one-hot
        stored = (stored & 0x80) | (stored & 0x7F).clamp_max(0x40)
    values = oracle.float64(stored.view(FP8))
    rope_rows = torch.randn(pages, page, D - codes, generator=draw.generator).bfloat16()
    rope = rope_rows.view(torch.uint8) if D > codes else stored[..., :0]
    tiles = {"fp8_ds_mla": 4, "model1": 7, "v4.1": 16, "flat": 0, "fp8_token": 1}[name]
    exponents = draw.integers(pages, page, tiles, low=-9, high=-5)
    scales = torch.exp2(exponents.double())
    if tiles:
        values = values * scales.repeat_interleave(codes // tiles, -1)
    bare, wide = (exponents + 127).to(torch.uint8), scales.float().view(torch.uint8)
    parts = {
        "fp8_ds_mla": (stored, wide, rope),
        "v4.1": (stored, bare),
        "flat": (stored,),
        "model1": (stored, rope),
        "fp8_token": (stored, rope),
    }[name]
    bytes_of_pages = torch.cat(parts, -1).flatten(1)
    if name in APART:
        pad = torch.full((pages, page, 1), 0xFF, dtype=torch.uint8)
        apart = torch.cat([bare, pad], -1) if name == "model1" else wide
        bytes_of_pages = torch.cat([bytes_of_pages, apart.flatten(1)], 1)
    size = bytes_of_pages.shape[1]
    # pages lie apart, and the first begins anywhere
    unit = PITCH[name]
    pitch = -(-size // unit) * unit + unit * draw.among((0, 0, 1, 16, 41))
    start = UNIT[name] * draw.among((0, 0, 0, 1, 3, 8))
    memory = torch.full((start + pages * pitch,), 0xFF, dtype=torch.uint8)
    memory[start:].view(pages, pitch)[:, :size] = bytes_of_pages
    cache = memory.to(draw.device)[start:].view(pages, pitch)[:, :size].view(pages, page, 1, size // page)
    latent = values.to(torch.float32).bfloat16().double()
    kind = draw.among((torch.uint8, FP8, torch.int8))
    return cache.view(kind), torch.cat([latent, oracle.float64(rope_rows)], -1).flatten(0, 1)


def picks(draw: Draw, size: Sequence[int], rows: int) -> Tensor:
    """Indices with holes, repeats, and some past the pool."""
    index = draw.integers(*size, low=0, high=max(rows, 1))
    holes = torch.rand(*size, generator=draw.generator) < draw.among((0.0, 0.1, 0.6, 1.0))
    index = index.masked_fill(holes, draw.among((-1, -(2**31), rows, NEVER)))
    return index if rows else torch.full(tuple(size), -1)


def rows_named(rows: Tensor, index: Tensor, count: int) -> Tensor:
    """The keys [n, D] that the leftmost `count` of `index` name."""
    named = index[: max(count, 0)]
    return rows[named[(named >= 0) & (named < rows.shape[0])]]


def lengths_of(draw: Draw, B: int, topk: int) -> list[int]:
    return [draw.among((0, topk, draw.between(0, topk), topk + 5, -3)) for _ in range(B)]


def sparse_decode(draw: Draw, backend: str | None) -> Case:
    """flash_mla_with_kvcache with indices, over one cache or two."""
    name = draw.pick((None, None, "fp8_ds_mla", *LATENT))
    dtype = torch.bfloat16 if name else draw.pick(FLOATS)
    D = LATENT[name] if name else draw.pick((576, 512, 128, 64))
    Dv = min(D, 512) if name else draw.pick((D, D // 2)) if D != 576 else 512
    B = draw.pick((1, 1, 2, 3)) if not draw.maybe(0.02) else 0
    S_q = draw.pick((1, 1, 2)) if not draw.maybe(0.02) else 0
    Hq = draw.pick((1, 8, 16, 64, 128))
    caches = []
    for _ in range(draw.pick((1, 1, 2))):
        pages, page = draw.between(1, 4) if draw.chance(0.97) else 0, draw.pick((1, 16, 64, 64))
        topk = draw.pick((1, 2, 3, 16, 64, 65, 128, 200)) if not draw.maybe(0.02) else 0
        cache, rows = pool_of(draw, name, pages, page, D, dtype)
        index = picks(draw, (B, S_q, topk), rows.shape[0])
        caches.append(
            (cache, rows, index, lengths_of(draw, B, topk) if draw.maybe(0.4) else [topk] * B, draw.maybe(0.4))
        )
    x: dict[str, Any] = {
        "q": draw.normal(B, S_q, Hq, D, dtype=dtype),
        "k_cache": caches[0][0],
        "block_table": None,
        "cache_seqlens": None,
        "head_dim_v": Dv,
        "softmax_scale": draw.scale(D),
        "is_fp8_kvcache": name is not None,
        "indices": draw.index(caches[0][2]),
        "attn_sink": draw.normal(Hq) if draw.maybe(0.2) else None,
        "topk_length": draw.index(caches[0][3]),
        "backend": backend,
    }
    if len(caches) > 1:
        x["extra_k_cache"], x["extra_indices_in_kvcache"] = caches[1][0], draw.index(caches[1][2])
        x["extra_topk_length"] = draw.index(caches[1][3])
    if draw.chance(0.25):
        faults = [
            *faults_of(draw, x),
            scale_fault(draw, "softmax_scale"),
            ("causal with indices", (ShapeError,), lambda x: x.update(causal=True)),
            (
                "indices of another batch",
                (ShapeError,),
                lambda x: x.update(indices=draw.index(torch.zeros(B + 1, S_q, 4, dtype=torch.int64))),
            ),
            ("floating indices", (DTypeError,), lambda x: x.update(indices=x["indices"].float())),
            ("topk_length of another batch", (ShapeError,), lambda x: x.update(topk_length=draw.index([1] * (B + 1)))),
            (
                "two KV heads",
                (HeadGroupingError,),
                lambda x: x.update(k_cache=torch.cat([x["k_cache"], x["k_cache"]], 2)),
            ),
            ("head_dim_v past d", (ShapeError,), lambda x: x.update(head_dim_v=D + 8)),
            (
                "an extra cache without indices",
                (ShapeError,),
                lambda x: x.update(extra_k_cache=x["k_cache"], extra_indices_in_kvcache=None),
            ),
            (
                "a sink of other heads",
                (ShapeError,),
                lambda x: x.update(attn_sink=torch.zeros(Hq + 1, device=draw.device)),
            ),
        ]
        if name:
            faults.append(
                ("q of float16 over a row format", (ShapeError, DTypeError), lambda x: x.update(q=x["q"].half()))
            )
        if name and UNIT[name] > 1:
            row = x["k_cache"].shape[3]
            odd = torch.zeros(1 + 16 * row, dtype=torch.uint8, device=draw.device)[1:].view(1, 16, 1, row)
            faults.append(("rows that begin on an odd byte", (LayoutError,), lambda x: x.update(k_cache=odd)))
        return illegal(draw, "flash_mla_with_kvcache", x, faults, deepseek)

    def verify(result: Any) -> list[str]:
        out, lse = result
        scale = D**-0.5 if x["softmax_scale"] is None else x["softmax_scale"]
        truth = []
        for b in range(B):
            queries = []
            for i in range(S_q):
                keys = torch.cat([rows_named(rows, index[b, i], counts[b]) for _, rows, index, counts, _ in caches])
                queries.append(
                    oracle.attention(
                        oracle.float64(x["q"][b, i])[:, None],
                        keys[None],
                        keys[None, :, :Dv],
                        scale,
                        None,
                        None,
                        x["attn_sink"],
                    )
                )
            truth.append(
                oracle.Rows(*(torch.cat(parts, 1) for parts in zip(*queries, strict=True)))
                if queries
                else empty_rows(Hq, Dv)
            )
        return oracle.judge(out.transpose(1, 2), lse, truth, dtype, math.inf)

    writes = with_out(draw, x, (B, S_q, Hq, Dv), dtype)
    return legal(draw, "flash_mla_with_kvcache", x, verify, writes, deepseek)


def empty_rows(Hq: int, Dv: int) -> oracle.Rows:
    """Of a request without a query."""
    return oracle.Rows(*(torch.zeros(*size, dtype=torch.float64) for size in ((Hq, 0, Dv), (Hq, 0), (Hq, 0))))


def sparse_prefill(draw: Draw, backend: str | None) -> Case:
    """flash_mla_sparse_fwd."""
    dtype = draw.pick(FLOATS)
    D = draw.pick((576, 512, 128, 64))
    Dv = min(D, 512)
    S_q, S_kv = draw.between(0 if draw.chance(0.05) else 1, 9), draw.between(0 if draw.chance(0.05) else 1, 200)
    Hq, topk = draw.pick((1, 8, 64, 128)), draw.pick((1, 2, 3, 16, 64, 65, 128)) if not draw.maybe(0.02) else 0
    kv = draw.normal(S_kv, 1, D, dtype=dtype)
    index = picks(draw, (S_q, 1, topk), S_kv)
    counts = lengths_of(draw, S_q, topk) if draw.maybe(0.4) else None
    x: dict[str, Any] = {
        "q": draw.normal(S_q, Hq, D, dtype=dtype),
        "kv": kv,
        "indices": draw.index(index),
        "sm_scale": draw.scale(D) or D**-0.5,
        "d_v": Dv,
        "attn_sink": draw.normal(Hq) if draw.maybe(0.2) else None,
        "topk_length": None if counts is None else draw.index(counts),
        "backend": backend,
    }
    if draw.chance(0.25):
        faults = [
            *faults_of(draw, x),
            scale_fault(draw, "sm_scale"),
            ("kv of another dtype", (DTypeError,), lambda x: x.update(kv=kv.double())),
            ("kv of another d", (ShapeError,), lambda x: x.update(kv=torch.cat([kv, kv], -1))),
            (
                "indices of other tokens",
                (ShapeError,),
                lambda x: x.update(indices=draw.index(torch.zeros(S_q + 1, 1, 4, dtype=torch.int64))),
            ),
            ("topk_length of other tokens", (ShapeError,), lambda x: x.update(topk_length=draw.index([1] * (S_q + 1)))),
            ("d_v past d", (ShapeError,), lambda x: x.update(d_v=D + 8)),
            ("kv is a list", (ShapeError,), lambda x: x.update(kv=[1])),
        ]
        return illegal(draw, "flash_mla_sparse_fwd", x, faults, deepseek)

    def verify(result: Any) -> list[str]:
        out, top, lse = result
        truth = []
        for i in range(S_q):
            keys = rows_named(oracle.float64(kv[:, 0]), index[i, 0], topk if counts is None else counts[i])
            truth.append(
                oracle.attention(
                    oracle.float64(x["q"][i])[:, None],
                    keys[None],
                    keys[None, :, :Dv],
                    x["sm_scale"],
                    None,
                    None,
                    x["attn_sink"],
                )
            )
        failures = oracle.judge(out[:, :, None], lse[:, :, None], truth, dtype, math.inf)
        if truth:
            want = torch.stack([rows.top for rows in truth])[..., 0]
            error = (oracle.float64(top) - want).nan_to_num(nan=0.0).abs().max().item()
            if not torch.equal(top.isneginf().cpu(), want.isneginf()) or not error <= 1e-3 * max(
                1.0, want.nan_to_num(neginf=0.0).abs().max().item()
            ):
                failures.append(f"max_logits: error {error:.1e}")
        return failures

    writes = with_out(draw, x, (S_q, Hq, Dv), dtype)
    return legal(draw, "flash_mla_sparse_fwd", x, verify, writes, deepseek)


# --- Sequences laid end to end ----------------------------------------------------------------------------------------


def varlen(draw: Draw, backend: str | None) -> Case:
    """flash_attn_varlen_func and its packed forms, sometimes with gradients."""
    form = draw.pick(("func", "func", "qkvpacked_func", "kvpacked_func"))
    dtype = draw.pick(FLOATS)
    D, Dv, _ = draw.head_dims()
    Hk = draw.pick((1, 2))
    Hq = Hk if form == "qkvpacked_func" else Hk * draw.pick((1, 2, 4))
    n = draw.between(0 if draw.chance(0.05) else 1, 4)
    lengths_q = [draw.between(0, 90) for _ in range(n)]
    lengths_kv = lengths_q if form == "qkvpacked_func" or draw.chance(0.5) else [draw.between(0, 90) for _ in range(n)]
    starts_q, starts_kv = ([sum(part[:i]) for i in range(n + 1)] for part in (lengths_q, lengths_kv))
    q, k, v = (
        draw.normal(total, H, width, dtype=dtype)
        for total, H, width in ((starts_q[-1], Hq, D), (starts_kv[-1], Hk, D), (starts_kv[-1], Hk, Dv))
    )
    causal = draw.pick((False, True))
    gradient = draw.chance(0.25) and backend is None and draw.device == "cpu" and dtype == torch.float32
    common: dict[str, Any] = {"softmax_scale": draw.scale(D), "causal": causal}
    if form == "qkvpacked_func":
        x = {"qkv": torch.cat([q, k, v], -1), "cu_seqlens": draw.index(starts_q), "max_seqlen": 90, "head_dim_qk": D}
        cu, packed = ["cu_seqlens"], ["qkv"]
    else:
        x = {"q": q, "cu_seqlens_qo": draw.index(starts_q), "cu_seqlens_kv": draw.index(starts_kv)}
        x |= {"max_seqlen_qo": 90, "max_seqlen_kv": 90}
        x |= {"kv": torch.cat([k, v], -1), "head_dim_qk": D} if form == "kvpacked_func" else {"k": k, "v": v}
        cu, packed = ["cu_seqlens_qo", "cu_seqlens_kv"], ["q", "kv"] if form == "kvpacked_func" else ["q", "k", "v"]
    x |= common
    if form == "func":
        x["backend"] = backend
    name = f"flash_attn_varlen_{form}"
    if draw.chance(0.3):
        return illegal(draw, name, x, varlen_faults(draw, x, cu, packed), deepseek)
    if gradient:
        for part in packed:
            x[part].requires_grad_()

    def verify(result: Any) -> list[str]:
        out, lse = result
        scale = D**-0.5 if x["softmax_scale"] is None else x["softmax_scale"]
        inputs = [oracle.float64(t).requires_grad_(gradient) for t in (q, k, v)]
        truth = []
        for i in range(n):
            rows, keys = slice(starts_q[i], starts_q[i + 1]), slice(starts_kv[i], starts_kv[i + 1])
            S_q, S_kv = lengths_q[i], lengths_kv[i]
            keep = torch.arange(S_kv) <= S_kv - S_q + torch.arange(S_q)[:, None] if causal else None
            truth.append(
                oracle.attention(
                    *(t.transpose(0, 1) for t in (inputs[0][rows], inputs[1][keys], inputs[2][keys])), scale, keep
                )
            )
        if not truth:
            return []
        whole = oracle.Rows(*(torch.cat(parts, 1) for parts in zip(*truth, strict=True)))
        failures = oracle.judge(
            out.transpose(0, 1)[None], lse.t()[None], [oracle.Rows(*(t.detach() for t in whole))], dtype
        )
        if gradient and not failures and out.numel():
            failures += gradients(draw, out, whole.out.transpose(0, 1), [x[part] for part in packed], inputs, form)
        return failures

    made = legal(draw, name, x, verify, [], deepseek)
    if gradient and made.under in ("inference mode", "no_grad", "default device meta"):
        return Case(name, made.run, x, verify)
    return made


def gradients(
    draw: Draw, out: Tensor, want_out: Tensor, given: list[Tensor], inputs: list[Tensor], form: str
) -> list[str]:
    """Compare the backward with float64's."""
    weight = torch.randn(out.shape, generator=draw.generator)
    got = torch.autograd.grad(out, given, weight.to(out))
    want = torch.autograd.grad(want_out, inputs, weight.double())
    if form == "qkvpacked_func":
        want = (torch.cat(want, -1),)
    elif form == "kvpacked_func":
        want = (want[0], torch.cat(want[1:], -1))
    failures = []
    for i, (a, b) in enumerate(zip(got, want, strict=True)):
        error = (oracle.float64(a) - b).abs().max().item() if b.numel() else 0.0
        if not error <= 1e-4 * max(1.0, b.abs().max().item() if b.numel() else 0.0):
            failures.append(f"gradient {i}: error {error:.1e}")
    return failures


def varlen_faults(draw: Draw, x: dict[str, Any], cu: list[str], packed: list[str]) -> list[Fault]:
    name = draw.among(cu)
    starts = x[name].tolist()
    lengths_errors = (SequenceLengthError, ShapeError)
    faults: list[Fault] = [
        (
            f"{name} past the rows",
            lengths_errors,
            lambda x: x.update({name: draw.index([*starts[:-1], starts[-1] + 1 + draw.between(0, 2)])}),
        ),
        (
            f"{name} short of the rows",
            lengths_errors,
            lambda x: x.update({name: draw.index([*starts[:-1], starts[-1] - 1])}),
        ),
        (f"{name} floating", (DTypeError,), lambda x: x.update({name: x[name].float()})),
        (f"{name} of 2 dims", (ShapeError,), lambda x: x.update({name: x[name][None]})),
        (f"{name} is a list", (ShapeError,), lambda x: x.update({name: starts})),
        ("dropout", (ShapeError,), lambda x: x.update(dropout_p=0.1)),
        scale_fault(draw, "softmax_scale"),
        (f"{packed[-1]} is a list", (ShapeError,), lambda x: x.update({packed[-1]: [1]})),
        (f"{packed[-1]} of another dtype", (DTypeError,), lambda x: x.update({packed[-1]: x[packed[-1]].double()})),
    ]
    if len(starts) > 1:
        faults.append((f"{name} not from 0", lengths_errors, lambda x: x.update({name: draw.index([1, *starts[1:]])})))
    if len(starts) > 2:
        faults.append(
            (
                f"{name} decreasing",
                lengths_errors,
                lambda x: x.update({name: draw.index([0, starts[-1] + 7, *starts[2:]])}),
            )
        )
        if starts[-1]:
            faults.append(
                (f"{name} negative", lengths_errors, lambda x: x.update({name: draw.index([0, -5, *starts[2:]])}))
            )
    if len(cu) > 1:
        faults.append(
            (f"{name} of other sequences", (ShapeError,), lambda x: x.update({name: draw.index([*starts, starts[-1]])}))
        )
    return faults


# --- Indices ----------------------------------------------------------------------------------------------------------


def pool_indices(draw: Draw, backend: str | None) -> Case:
    """pool_indices."""
    b, s_q, topk = draw.among((0, 1, 3)), draw.between(0, 2), draw.between(0, 20)
    blocks, page = draw.between(0, 4), draw.among((1, 16, 64, 128))
    table = draw.integers(b, blocks, low=0, high=1000)
    positions = draw.integers(b, s_q, topk, low=-3, high=blocks * page + 5)
    x: dict[str, Any] = {"positions": draw.index(positions), "block_table": draw.index(table), "page": page}
    if draw.chance(0.4):
        faults: list[Fault] = [
            ("a page of 0", (ShapeError, BlockCountError), lambda x: x.update(page=0)),
            ("a page of text", (ShapeError, BlockCountError), lambda x: x.update(page="64")),
            (
                "positions of another batch",
                (ShapeError,),
                lambda x: x.update(positions=draw.index(torch.zeros(b + 1, 1, 2, dtype=torch.int64))),
            ),
            ("positions that are a list", (ShapeError,), lambda x: x.update(positions=[1])),
            ("floating positions", (DTypeError,), lambda x: x.update(positions=x["positions"].float())),
            ("a floating table", (DTypeError,), lambda x: x.update(block_table=x["block_table"].float())),
            ("a table of one dim", (ShapeError,), lambda x: x.update(block_table=x["block_table"].flatten())),
        ]
        return illegal(draw, "pool_indices", x, faults, deepseek)

    def verify(result: Any) -> list[str]:
        want = [
            [
                [int(table[r, p // page]) * page + p % page if 0 <= p < blocks * page else -1 for p in row]
                for row in rows
            ]
            for r, rows in enumerate(positions.tolist())
        ]
        same = result.dtype == torch.int32 and torch.equal(
            result.cpu(), torch.tensor(want, dtype=torch.int32).view(b, s_q, topk)
        )
        return [] if same else ["other indices"]

    return legal(draw, "pool_indices", x, verify, [], deepseek)


def ragged_indices(draw: Draw, backend: str | None) -> Case:
    """ragged_indices."""
    n, topk = draw.between(1, 4), draw.between(0, 9)
    lengths_q, lengths_kv = ([draw.between(0, 12) for _ in range(n)] for _ in range(2))
    starts_q, starts_kv = ([sum(part[:i]) for i in range(n + 1)] for part in (lengths_q, lengths_kv))
    positions = draw.integers(starts_q[-1], topk, low=-3, high=14)
    x: dict[str, Any] = {
        "positions": draw.index(positions),
        "cu_seqlens_q": draw.index(starts_q),
        "cu_seqlens_kv": draw.index(starts_kv),
    }
    if draw.chance(0.4):
        name = draw.among(("cu_seqlens_q", "cu_seqlens_kv"))
        errors = (ShapeError, SequenceLengthError, MaskShapeError, LayoutError)
        on_cpu: list[Fault] = [
            (
                "queries past the sequences",
                errors,
                lambda x: x.update(positions=draw.index(torch.zeros(starts_q[-1] + 2, topk, dtype=torch.int64))),
            ),
            (f"{name} not from 0", errors, lambda x: x.update({name: x[name] + 1})),
        ]
        faults: list[Fault] = [
            (f"{name} of other sequences", errors, lambda x: x.update({name: torch.cat([x[name], x[name][-1:]])})),
            (f"{name} floating", (DTypeError,), lambda x: x.update({name: x[name].float()})),
            (f"{name} is a list", (ShapeError,), lambda x: x.update({name: [0, 1]})),
        ]
        if draw.device == "cpu":  # a GPU is not waited for
            faults += on_cpu
        return illegal(draw, "ragged_indices", x, faults, deepseek)

    def verify(result: Any) -> list[str]:
        want = [
            [starts_kv[i] + p if 0 <= p < lengths_kv[i] else -1 for p in row]
            for i in range(n)
            for row in positions[starts_q[i] : starts_q[i + 1]].tolist()
        ]
        wanted = torch.tensor(want, dtype=torch.int32).view(starts_q[-1], 1, topk)
        return [] if result.dtype == torch.int32 and torch.equal(result.cpu(), wanted) else ["other indices"]

    return legal(draw, "ragged_indices", x, verify, [], deepseek)


__all__ = ["BLOCK", "dense", "pool_indices", "ragged_indices", "sparse_decode", "sparse_prefill", "varlen"]
