"""Calls of the package's own functions: decode, prefill, prefill into the cache, metadata."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import flash_mla
from flash_mla import (
    BlockCountError,
    BlockTableError,
    DeviceError,
    DTypeError,
    FlashMLAError,
    HeadGroupingError,
    LayoutError,
    MaskShapeError,
    SequenceLengthError,
    ShapeError,
)

from . import oracle
from .case import Case, called_before, surroundings
from .draw import BLOCK, DTYPES, FP8, NEVER, Draw

Fault = tuple[str, tuple[type[FlashMLAError], ...], Callable[[dict[str, Any]], Any]]
"""What is wrong, the errors that say so, and what changes the arguments so."""


# --- Caches and tables ------------------------------------------------------------------------------------------------


def page_view(draw: Draw, B: int, Hk: int, Nblk: int, D: int, dtype: torch.dtype, layout: str) -> Tensor:
    """[B, Hk, Nblk, 64, D] of NaN."""
    if layout == "pool":
        return draw.poison(Hk, Nblk, BLOCK, D, dtype=dtype).expand(B, -1, -1, -1, -1)
    if layout == "sliced":
        larger = draw.poison(B + 1, Hk + 1, Nblk + 2, BLOCK, D, dtype=dtype)
        return larger[1:, :-1, 1:-1]
    if layout == "offset":
        return draw.inside(draw.poison(B, Hk, Nblk, BLOCK, D, dtype=dtype), contiguous=True)
    return draw.poison(B, Hk, Nblk, BLOCK, D, dtype=dtype)


def make_table(draw: Draw, lengths: list[int], layout: str, unique: bool, least: int = 0) -> tuple[Tensor, int]:
    """[B, width] int64 on the CPU, entries that no token uses hostile, and Nblk; in a pool, prefixes may be shared.

    Both width and Nblk are at least `least`.
    """
    counts = [-(-n // BLOCK) for n in lengths]
    spare = draw.between(0, 2)
    width = max(*counts, least, 0) + draw.between(0, 2)
    Nblk = max(sum(counts) if layout == "pool" else max(counts, default=0), least) + spare
    table = torch.full((len(lengths), width), draw.among((NEVER, -1, -(2**31), 0)))
    if layout == "pool":
        order = torch.randperm(Nblk, generator=draw.generator)
        taken = 0
        for b, count in enumerate(counts):
            table[b, :count] = order[taken : taken + count]
            taken += count
            if b and not unique and draw.chance(0.3):
                shared = min(count, counts[0])
                table[b, :shared] = table[0, :shared]
    else:
        for b, count in enumerate(counts):
            table[b, :count] = torch.randperm(Nblk, generator=draw.generator)[:count]
    return table, Nblk


def fill(cache: Tensor, table: Tensor, b: int, rows: Tensor, start: int = 0) -> None:
    """Put rows [Hk, n, D] at positions start.. of request b."""
    for i in range(rows.shape[1]):
        t = start + i
        cache[b, :, int(table[b, t // BLOCK]), t % BLOCK] = rows[:, i]


def magnitude(draw: Draw) -> float:
    return draw.among((1.0, 1.0, 1.0, 0.1, 4.0))


# --- Decode -----------------------------------------------------------------------------------------------------------


def decode(draw: Draw, backend: str | None) -> Case:
    """flash_mla_with_kvcache."""
    dtype = draw.pick(DTYPES)
    D, Dv, latent = draw.head_dims()
    B = draw.pick((0, 1, 1, 2, 2, 3, 5)) if not draw.maybe(0.02) else 0
    Hk = 1 if latent and draw.maybe(0.8) else draw.pick((1, 1, 2, 3))
    Hq = Hk * draw.pick((1, 1, 2, 4, 5, 8, 16) if not latent else (1, 4, 16, 16, 64, 128))
    S_q = draw.pick((1, 1, 1, 1, 2, 3, 4, 8)) if not draw.maybe(0.01) else 0
    layout = draw.pick(("slab", "slab", "pool", "sliced", "offset"))
    longest = draw.among((0, 1, 64, 150, 300, 700))
    lengths = [draw.between(0, longest) for _ in range(B)]
    table, Nblk = make_table(draw, lengths, layout, unique=False)
    k_cache = page_view(draw, B, Hk, Nblk, D, dtype, layout)
    alias = latent and Dv <= D
    v_cache = k_cache[..., :Dv] if alias else page_view(draw, B, Hk, Nblk, Dv, dtype, layout)
    size = magnitude(draw)
    for b, length in enumerate(lengths):
        fill(k_cache, table, b, draw.normal(Hk, length, D, dtype=dtype, scale=size))
        if not alias:
            fill(v_cache, table, b, draw.normal(Hk, length, Dv, dtype=dtype))
    q = draw.normal(B, Hq, S_q, D, dtype=dtype, scale=magnitude(draw))
    sink = draw.normal(Hq, scale=3.0) if draw.maybe(0.2) else None
    if sink is not None and draw.chance(0.2):
        sink[0] = draw.among((-math.inf, 80.0))
    L = max(lengths, default=0) + draw.between(0, 5)
    x: dict[str, Any] = {
        "q": draw.inside(q, contiguous=True) if draw.maybe(0.2) else q,
        "k_cache": k_cache,
        "v_cache": v_cache,
        "block_table": draw.index(table),
        "seq_lens": draw.index(lengths),
        "mask": draw.mask(B, Hq, S_q, L, lengths) if draw.maybe(0.25) else None,
        "softmax_scale": draw.scale(D),
        "attn_sink": sink,
        "return_lse": draw.maybe(0.8),
        "backend": backend,
    }
    if draw.maybe(0.25):
        x |= {name: draw.descale(B, Hk) for name in ("q_descale", "k_descale", "v_descale")}
    out_dtype = torch.bfloat16 if dtype == FP8 else dtype
    if draw.chance(0.25):
        x["out"] = draw.poison(B, Hq, S_q, Dv, dtype=out_dtype)
    if draw.chance(0.35):
        values = draw.chance(0.5)
        x["metadata"] = flash_mla.get_mla_metadata(
            q.shape,
            k_cache.shape,
            x["block_table"],
            x["seq_lens"],
            v_head_dim=draw.among((None, Dv)),
            check_values=values,
        )
    if draw.chance(0.35):
        x.pop("metadata", None)
        return illegal(draw, "flash_mla_with_kvcache", x, [*decode_faults(draw, x, lengths), *shared_faults(draw, x)])
    seen = lengths
    if "metadata" in x and draw.chance(0.4):
        seen = wild_lengths(draw, x, lengths, table)
    again = draw.chance(0.2)

    def verify(result: Any) -> list[str]:
        out, lse = result if x["return_lse"] else (result, None)
        truth = []
        scale = D**-0.5 if x["softmax_scale"] is None else x["softmax_scale"]
        for b, length in enumerate(seen):
            keep, bias = oracle.split_mask(x["mask"], b, B, length)
            if x["mask"] is None:
                keep = torch.arange(length) <= length - S_q + torch.arange(S_q)[:, None]
            row = table[b].tolist()
            factors = [oracle.factor(x.get(f"{name}_descale"), b, B, Hk) for name in "qkv"]
            truth.append(
                oracle.attention(
                    oracle.float64(q[b]) * factors[0].repeat_interleave(Hq // Hk, 0),
                    oracle.cached(k_cache, row, b, length) * factors[1],
                    oracle.cached(v_cache, row, b, length) * factors[2],
                    scale, keep, bias, sink,
                )
            )  # fmt: skip
        failures = oracle.judge(out, lse, truth, dtype)
        if x.get("out") is not None and out.data_ptr() != x["out"].data_ptr():
            failures.append("out= was not what came back")
        if again:
            second = flash_mla.flash_mla_with_kvcache(**x)
            failures += not_the_same(second[0] if x["return_lse"] else second, out)
        return failures

    return legal(draw, "flash_mla_with_kvcache", x, verify, [x["out"]] if x.get("out") is not None else [])


def wild_lengths(draw: Draw, x: dict[str, Any], lengths: list[int], table: Tensor) -> list[int]:
    """Change lengths in place after the metadata was made; returns what a kernel must make of them."""
    rows = x["block_table"].shape[1] * BLOCK
    kinds = [draw.among(("shorter", "same", "wild")) for _ in lengths]
    if x["seq_lens"].dtype == torch.int32 or draw.chance(0.5):
        kinds = ["same" if kind == "wild" else kind for kind in kinds]
    seen, given = [], []
    for _b, (kind, length) in enumerate(zip(kinds, lengths, strict=True)):
        new = draw.between(0, length) if kind == "shorter" else length
        if kind == "wild" and -(-length // BLOCK) * BLOCK == rows and length % BLOCK == 0:
            # the row is full: whatever is too long is the row
            seen.append(rows)
            given.append(draw.among((2**31 + 7, 2**32 + 3, 2**40)))
        elif kind == "wild":
            seen.append(0)
            given.append(draw.among((-1, -(2**31) - 5, -(2**40))))
        else:
            seen.append(new)
            given.append(new)
    x["seq_lens"].copy_(torch.tensor(given, dtype=torch.int64).to(x["seq_lens"].dtype))
    return seen


def decode_faults(draw: Draw, x: dict[str, Any], lengths: list[int]) -> list[Fault]:
    """What a decode call refuses."""
    q, k_cache, v_cache, table = x["q"], x["k_cache"], x["v_cache"], x["block_table"]
    B, Hq, S_q, D = q.shape
    _Hk, Nblk, Dv = k_cache.shape[1], k_cache.shape[2], v_cache.shape[4]
    alias = v_cache.data_ptr() == k_cache.data_ptr()
    faults: list[Fault] = cache_faults(draw, x)
    if S_q > 1 and Hq > 1 and B:
        strided = q.transpose(1, 2).contiguous().transpose(1, 2)
        faults.append(("q not contiguous", (LayoutError,), lambda x: x.update(q=strided)))
    if B:
        b = draw.value.randrange(B)

        def length(value: int) -> Callable[[dict[str, Any]], None]:
            def change(x: dict[str, Any]) -> None:
                x["seq_lens"] = x["seq_lens"].clone()
                x["seq_lens"][b] = value

            return change

        faults.append(("a negative length", (SequenceLengthError,), length(draw.among((-1, -(2**31))))))
        faults.append(("a length past the cache", (SequenceLengthError,), length(Nblk * BLOCK + draw.among((1, 64)))))
        if table.shape[1] < Nblk:
            faults.append(("a length past the table", (BlockCountError,), length(table.shape[1] * BLOCK + 1)))
        if lengths[b]:

            def entry(x: dict[str, Any]) -> None:
                x["block_table"] = x["block_table"].clone()
                used = -(-lengths[b] // BLOCK)
                x["block_table"][b, draw.value.randrange(used)] = draw.among((-1, Nblk, NEVER))

            faults.append(("a used entry outside the cache", (BlockTableError,), entry))
    if x.get("mask") is not None and max(lengths, default=0) > 0:
        short = x["mask"][..., : max(lengths) - 1]
        faults.append(("a mask shorter than the lengths", (MaskShapeError,), lambda x: x.update(mask=short)))
    faults.append(("seq_lens of another batch", (ShapeError,), lambda x: x.update(seq_lens=draw.index([0] * (B + 1)))))
    faults.append(("seq_lens floating", (DTypeError,), lambda x: x.update(seq_lens=x["seq_lens"].float())))
    if S_q:
        other = flash_mla.get_mla_metadata((B, Hq * 2, S_q, D), k_cache.shape, table, x["seq_lens"], check_values=False)
        faults.append(("metadata of other shapes", (ShapeError,), lambda x: x.update(metadata=other)))
    wrong = draw.among(("metadata", torch.zeros(2), 3, (1, 2)))
    faults.append(("metadata that is none", (ShapeError,), lambda x: x.update(metadata=wrong)))
    if not alias and Dv > 8:
        faults.append(
            ("v_cache with other blocks", (ShapeError,), lambda x: x.update(v_cache=torch.cat([v_cache, v_cache], 2)))
        )
    return faults


def cache_faults(draw: Draw, x: dict[str, Any]) -> list[Fault]:
    """What is wrong with caches and tables alike in decode and in prefill into the cache."""
    q, k_cache, table = x["q"], x["k_cache"], x["block_table"]
    v_cache = x["v_cache"]
    B, D = q.shape[0], q.shape[3]
    Hk, Nblk = k_cache.shape[1:3]
    other = torch.float16 if k_cache.dtype != torch.float16 else torch.bfloat16
    faults: list[Fault] = [
        ("k_cache of another dtype", (DTypeError,), lambda x: x.update(k_cache=k_cache.to(other))),
        ("float64", (DTypeError,), lambda x: x.update({n: x[n].double() for n in ("q", "k_cache", "v_cache")})),
        (
            "blocks of 32 tokens",
            (BlockCountError,),
            lambda x: x.update(k_cache=k_cache[..., :32, :], v_cache=v_cache[..., :32, :]),
        ),
        ("k_cache of another D", (ShapeError,), lambda x: x.update(k_cache=torch.cat([k_cache, k_cache], -1))),
        ("k_cache of 4 dims", (ShapeError,), lambda x: x.update(k_cache=k_cache.flatten(0, 1))),
        (
            "caches for more requests",
            (ShapeError,),
            lambda x: x.update(
                {
                    n: torch.cat([x[n], x[n][:1] if B else x[n].new_zeros(1, *x[n].shape[1:])])
                    for n in ("k_cache", "v_cache")
                }
            ),
        ),
        (
            "a table of another batch",
            (ShapeError,),
            lambda x: x.update(block_table=torch.cat([table, table.new_zeros(1, table.shape[1])])),
        ),
        ("a table of one dim", (ShapeError,), lambda x: x.update(block_table=table.flatten())),
        ("a floating table", (DTypeError,), lambda x: x.update(block_table=table.float())),
    ]
    if B > 1 and table.shape[1] > 1:
        strided = table.t().contiguous().t()
        faults.append(("a table that is not contiguous", (LayoutError,), lambda x: x.update(block_table=strided)))
    if k_cache.numel() and D > 1:
        rows = torch.empty(*k_cache.shape[:3], D, BLOCK, dtype=k_cache.dtype, device=draw.device).transpose(3, 4)
        faults.append(("rows that are not contiguous", (LayoutError,), lambda x: x.update(k_cache=rows)))
    if Hk > 1 and Nblk > 1 and B:
        serving = draw.poison(Nblk, BLOCK, Hk, D, dtype=k_cache.dtype).permute(2, 0, 1, 3).expand(B, -1, -1, -1, -1)
        faults.append(("an engine's pool", (LayoutError,), lambda x: x.update(k_cache=serving)))
    if B > 1 and Nblk > 1:
        turned = draw.poison(Nblk, B, Hk, BLOCK, D, dtype=k_cache.dtype).permute(1, 2, 0, 3, 4)
        faults.append(("strides that are not monotonic", (LayoutError,), lambda x: x.update(k_cache=turned)))
    return faults


def shared_faults(draw: Draw, x: dict[str, Any]) -> list[Fault]:
    """What every attention function refuses."""
    q = x["q"]
    B, Hq, rows, D = q.shape
    kv = "k_cache" if "k_cache" in x else "k"
    Hk = x[kv].shape[1]
    value = x["v_cache" if "v_cache" in x else "v"]
    mask_name = "mask" if "mask" in x else "attn_mask"
    out_dtype = torch.bfloat16 if q.dtype == FP8 else q.dtype
    size = (B, Hq, rows, value.shape[-1])
    not_numbers = draw.among((math.nan, math.inf, -math.inf, "0.1", [0.1], torch.ones(3), 1j, {}))
    wrong_type = draw.among(("q", 3, [1.0], 2.5, {"a": 1}))
    name = draw.among(("q_descale", "k_descale", "v_descale"))
    faults: list[Fault] = [
        ("q of 3 dims", (ShapeError,), lambda x: x.update(q=q.flatten(0, 1))),
        (f"{kv} is a {type(wrong_type).__name__}", (ShapeError,), lambda x: x.update({kv: wrong_type})),
        ("q is None", (ShapeError,), lambda x: x.update(q=None)),
        ("q is a list", (ShapeError,), lambda x: x.update(q=[1.0])),
        (
            "q of integers",
            (DTypeError,),
            lambda x: x.update(q=torch.zeros(q.shape, dtype=torch.int32, device=draw.device)),
        ),
        ("q of 0 dims", (ShapeError,), lambda x: x.update(q=torch.ones((), device=draw.device).to(q.dtype))),
        (f"softmax_scale {not_numbers}", (ShapeError,), lambda x: x.update(softmax_scale=not_numbers)),
        ("backend foo", (DeviceError,), lambda x: x.update(backend="foo")),
        (
            f"{name} of float16",
            (DTypeError,),
            lambda x: x.update({name: torch.ones(1, dtype=torch.float16, device=draw.device)}),
        ),
        (
            f"{name} of another shape",
            (ShapeError,),
            lambda x: x.update({name: torch.ones(B + 2, Hk + 1, device=draw.device)}),
        ),
        (f"{name} is text", (ShapeError, DTypeError), lambda x: x.update({name: "1"})),
        (f"{name} is NaN", (ShapeError,), lambda x: x.update({name: math.nan})),
        (
            "a tensor on another device",
            (DeviceError,),
            lambda x: x.update({kv: torch.empty(x[kv].shape, dtype=q.dtype, device="meta")}),
        ),
        (
            "a mask of integers",
            (MaskShapeError,),
            lambda x: x.update({mask_name: torch.ones(1, 1, 1, 4096, dtype=torch.int32, device=draw.device)}),
        ),
        (
            "a mask of 3 dims",
            (MaskShapeError,),
            lambda x: x.update({mask_name: torch.ones(1, 1, 4096, dtype=torch.bool, device=draw.device)}),
        ),
        (
            "a mask of other heads",
            (MaskShapeError,),
            lambda x: x.update({mask_name: torch.ones(1, Hq + 1, 1, 4096, dtype=torch.bool, device=draw.device)}),
        ),
        ("a mask that is text", (ShapeError, MaskShapeError), lambda x: x.update({mask_name: "causal"})),
        (
            "out of another shape",
            (ShapeError,),
            lambda x: x.update(out=torch.empty(*size[:3], size[3] + 8, dtype=out_dtype, device=draw.device)),
        ),
        (
            "out of another dtype",
            (DTypeError,),
            lambda x: x.update(out=torch.empty(size, dtype=torch.float64, device=draw.device)),
        ),
        ("out that is text", (ShapeError,), lambda x: x.update(out="out")),
    ]
    if "attn_sink" in x:
        faults += [
            (
                "a sink of other heads",
                (ShapeError,),
                lambda x: x.update(attn_sink=torch.zeros(Hq + 1, device=draw.device)),
            ),
            (
                "a sink of float16",
                (ShapeError, DTypeError),
                lambda x: x.update(attn_sink=torch.zeros(Hq, dtype=torch.float16, device=draw.device)),
            ),
            ("a sink that is a number", (ShapeError,), lambda x: x.update(attn_sink=1.0)),
        ]
    if Hk > 1 and "attn_mask" not in x:
        more = torch.cat([q, q[:, :1]], 1)
        faults.append(
            ("heads that are no multiple", (HeadGroupingError,), lambda x: x.update(q=more, out=None, mask=None))
        )
    if D > 8:
        faults.append(
            (
                "a D of no multiple of 8",
                (ShapeError,),
                lambda x: x.update({n: x[n][..., : D - 4].contiguous() for n in ("q", kv)}),
            )
        )
    if math.prod(size):
        larger = torch.empty(*size[:3], size[3] * 2, dtype=out_dtype, device=draw.device)
        faults.append(("out not contiguous", (LayoutError,), lambda x: x.update(out=larger[..., ::2])))
        for other in ("q", kv, "attn_sink", mask_name, "seq_lens", "block_table", "q_descale", "v_descale"):
            if isinstance(x.get(other), Tensor) and x[other].numel() and x[other].is_contiguous():
                faults.append(overlap(draw, other, size, out_dtype))
    return faults


def overlap(draw: Draw, name: str, size: tuple[int, ...], dtype: torch.dtype) -> Fault:
    """`out` over another tensor of the call: both become views of one memory."""

    def change(x: dict[str, Any]) -> None:
        tensor = x[name]
        need = math.prod(size) * dtype.itemsize
        start = -(-tensor.nbytes // 16) * 16
        memory = torch.zeros(start + need, dtype=torch.uint8, device=draw.device)
        own = memory[: tensor.nbytes].view(tensor.dtype).view(tensor.shape)
        own.copy_(tensor)
        x[name] = own
        # out starts on the tensor's last 16 bytes
        x["out"] = memory[start - 16 : start - 16 + need].view(dtype).view(size)

    return f"out over {name}", (LayoutError,), change


# --- Prefill ----------------------------------------------------------------------------------------------------------


def prefill(draw: Draw, backend: str | None) -> Case:
    """flash_mla_prefill."""
    dtype = draw.pick(DTYPES)
    D, Dv, _ = draw.head_dims()
    B = draw.pick((1, 1, 2, 3)) if not draw.maybe(0.02) else 0
    Hk = draw.pick((1, 1, 2, 3))
    Hq = Hk * draw.pick((1, 1, 2, 4, 5))
    P = draw.between(1, draw.among((1, 40, 130, 260))) if not draw.chance(0.02) else 0
    sliced = draw.maybe(0.3)
    made = [
        draw.normal(B, H, P, width, dtype=dtype, scale=magnitude(draw)) for H, width in ((Hq, D), (Hk, D), (Hk, Dv))
    ]
    if draw.maybe(0.25):  # the sequence outside the heads is no monotonic order of [B, H, P, D], but a broadcast is
        made[1] = made[1][:, :, :1].expand(-1, -1, P, -1) if P and draw.chance(0.3) else made[1]
    q, k, v = (draw.inside(x) if sliced else x for x in made)
    lengths = [draw.between(0, P) for _ in range(B)] if draw.maybe(0.3) else None
    keys = [P] * B if lengths is None else lengths
    if not any(x.stride(2) == 0 for x in (k, v)):
        for b, length in enumerate(keys):
            k[b, :, length:] = draw.poison(1, dtype=dtype)
            v[b, :, length:] = draw.poison(1, dtype=dtype)
    n = -(-P // BLOCK)
    blocks = None
    if draw.maybe(0.25):
        blocks = draw.bits(draw.pick((1, B)), draw.pick((1, Hq)), n, n).to(draw.device)
    as_layout = blocks is not None and draw.chance(0.5)
    mask = draw.mask(B, Hq, P, P, keys) if draw.maybe(0.3) else None
    sink = draw.normal(Hq, scale=3.0) if draw.maybe(0.15) else None
    x: dict[str, Any] = {
        "q": q,
        "k": k,
        "v": v,
        "sparse_layout": flash_mla.BlockSparseLayout(blocks) if as_layout and blocks is not None else blocks,
        "attn_mask": mask,
        "causal": draw.pick((None, None, True, False)),
        "softmax_scale": draw.scale(D),
        "seq_lens": None if lengths is None else draw.index(lengths),
        "attn_sink": sink,
        "return_lse": draw.maybe(0.8),
        "backend": backend,
    }
    if draw.maybe(0.25):
        x |= {name: draw.descale(B, Hk) for name in ("q_descale", "k_descale", "v_descale")}
    if draw.chance(0.2):
        x["out"] = draw.poison(B, Hq, P, Dv, dtype=torch.bfloat16 if dtype == FP8 else dtype)
    if draw.chance(0.3):
        return illegal(draw, "flash_mla_prefill", x, [*prefill_faults(draw, x), *shared_faults(draw, x)])
    causal = mask is None if x["causal"] is None else x["causal"]
    again = draw.chance(0.2)

    def verify(result: Any) -> list[str]:
        out, lse = result if x["return_lse"] else (result, None)
        truth = []
        scale = D**-0.5 if x["softmax_scale"] is None else x["softmax_scale"]
        for b, length in enumerate(keys):
            keep = torch.ones(1, P, length, dtype=torch.bool)
            if causal:
                keep = keep & (torch.arange(length) <= torch.arange(P)[:, None])
            if blocks is not None:
                grid = blocks.cpu().expand(B, Hq, n, n)[b]
                rows, columns = torch.arange(P) // BLOCK, torch.arange(length) // BLOCK
                keep = keep & grid[:, rows][:, :, columns]
            kept, bias = oracle.split_mask(mask, b, B, length)
            keep = keep if kept is None else keep & kept
            factors = [oracle.factor(x.get(f"{name}_descale"), b, B, Hk) for name in "qkv"]
            truth.append(
                oracle.attention(
                    oracle.float64(q[b]) * factors[0].repeat_interleave(Hq // Hk, 0),
                    oracle.float64(k[b, :, :length]) * factors[1],
                    oracle.float64(v[b, :, :length]) * factors[2],
                    scale, keep, bias, sink,
                )
            )  # fmt: skip
        failures = oracle.judge(out, lse, truth, dtype)
        if again:
            second = flash_mla.flash_mla_prefill(**x)
            failures += not_the_same(second[0] if x["return_lse"] else second, out)
        return failures

    return legal(draw, "flash_mla_prefill", x, verify, [x["out"]] if x.get("out") is not None else [])


def prefill_faults(draw: Draw, x: dict[str, Any]) -> list[Fault]:
    q, k, v = x["q"], x["k"], x["v"]
    B, Hq, P, D = q.shape
    Hk = k.shape[1]
    n = -(-P // BLOCK)
    other = torch.float16 if k.dtype != torch.float16 else torch.bfloat16
    faults: list[Fault] = [
        ("k of another dtype", (DTypeError,), lambda x: x.update(k=k.to(other))),
        (
            "k of another P",
            (ShapeError,),
            lambda x: x.update(k=torch.cat([k, k[:, :, :1] if P else k.new_zeros(B, Hk, 1, D)], 2)),
        ),
        ("v of other heads", (ShapeError,), lambda x: x.update(v=torch.cat([v, v], 1))),
        (
            "a layout for other blocks",
            (MaskShapeError,),
            lambda x: x.update(sparse_layout=torch.ones(1, 1, n + 1, n, dtype=torch.bool, device=draw.device)),
        ),
        (
            "a layout of numbers",
            (MaskShapeError,),
            lambda x: x.update(sparse_layout=torch.ones(1, 1, n, n, device=draw.device)),
        ),
        ("a layout that is text", (ShapeError, MaskShapeError), lambda x: x.update(sparse_layout="causal")),
        ("seq_lens of another batch", (ShapeError,), lambda x: x.update(seq_lens=draw.index([0] * (B + 1)))),
        ("seq_lens floating", (DTypeError,), lambda x: x.update(seq_lens=torch.zeros(B, device=draw.device))),
        ("causal is text", (ShapeError,), lambda x: x.update(causal="yes")),
    ]
    if B and draw.device == "cpu":
        faults.append(("a length past P", (SequenceLengthError,), lambda x: x.update(seq_lens=draw.index([P + 1] * B))))
    if P > 1:
        short = torch.ones(1, 1, 1, P - 1, dtype=torch.bool, device=draw.device)
        faults.append(("a mask shorter than P", (MaskShapeError,), lambda x: x.update(attn_mask=short)))
    if P > 1 and Hq > 1 and B:
        turned = q.transpose(1, 2).contiguous().transpose(1, 2)
        faults.append(("strides that are not monotonic", (LayoutError,), lambda x: x.update(q=turned)))
    if D > 1 and P > 1 and q.numel():
        turned_d = torch.empty(B, Hq, D, P, dtype=q.dtype, device=draw.device).transpose(2, 3)
        faults.append(("q not contiguous on D", (LayoutError,), lambda x: x.update(q=turned_d)))
    return faults


# --- Prefill into the cache -------------------------------------------------------------------------------------------


def mha(draw: Draw, backend: str | None) -> Case:
    """mha_fwd_kvcache."""
    dtype = draw.pick(DTYPES)
    D, Dv, latent = draw.head_dims()
    B = draw.pick((1, 1, 2, 3)) if not draw.maybe(0.02) else 0
    H = draw.pick((1, 2, 3))
    P = draw.between(1, draw.among((1, 40, 130, 200))) if not draw.chance(0.02) else 0
    alias = latent and Dv <= D and draw.maybe(0.5)
    write = not alias and draw.maybe(0.7)
    continued = draw.maybe(0.5)
    starts = [draw.between(0, 130) if continued else 0 for _ in range(B)]
    ends = [start + P for start in starts]
    layout = draw.pick(("slab", "slab", "pool", "sliced", "offset"))
    table, Nblk = make_table(draw, ends, layout, unique=write, least=-(-P // BLOCK))
    k_cache = page_view(draw, B, H, Nblk, D, dtype, layout)
    v_cache = k_cache[..., :Dv] if alias else page_view(draw, B, H, Nblk, Dv, dtype, layout)
    rows = [[draw.normal(H, end, width, dtype=dtype, scale=magnitude(draw)) for end in ends] for width in (D, Dv)]
    for b, (start, end) in enumerate(zip(starts, ends, strict=True)):
        fill(k_cache, table, b, rows[0][b][:, : start if write else end])
        if not alias:
            fill(v_cache, table, b, rows[1][b][:, : start if write else end])
    new = []
    for made, width in zip(rows, (D, Dv), strict=True):
        stacked = draw.poison(B, H, P, width, dtype=dtype)
        for b, start in enumerate(starts):
            stacked[b] = made[b][:, start:]
        new.append(draw.inside(stacked) if draw.chance(0.3) else stacked)
    q = draw.normal(B, H, P, D, dtype=dtype)
    L = max(ends, default=P) + draw.between(0, 4)
    mask = draw.mask(B, H, P, L, ends) if draw.maybe(0.25) else None
    x: dict[str, Any] = {
        "q": draw.inside(q) if draw.maybe(0.3) else q,
        "k_cache": k_cache,
        "v_cache": v_cache,
        "block_table": draw.index(table),
        "attn_mask": mask,
        "k": new[0] if write else None,
        "v": new[1] if write else None,
        "start_pos": draw.index(starts) if continued else None,
        "causal": draw.pick((None, None, True, False)),
        "softmax_scale": draw.scale(D),
        "return_lse": draw.maybe(0.8),
        "backend": backend,
    }
    if draw.maybe(0.2):
        x |= {name: draw.descale(B, H) for name in ("q_descale", "k_descale", "v_descale")}
    if draw.chance(0.2):
        x["out"] = draw.poison(B, H, P, Dv, dtype=torch.bfloat16 if dtype == FP8 else dtype)
    if draw.chance(0.35):
        faults = [*mha_faults(draw, x, ends, layout), *cache_faults(draw, x), *shared_faults(draw, x)]
        return illegal(draw, "mha_fwd_kvcache", x, faults)
    causal = mask is None if x["causal"] is None else x["causal"]
    # what the caches must hold afterwards
    full = [c.clone() if layout != "pool" else c[:1].clone().expand_as(c) for c in (k_cache, v_cache)]
    if write:
        for cache, made in zip(full, rows, strict=True):
            for b, start in enumerate(starts):
                fill(cache, table, b, made[b][:, start:], start)

    def verify(result: Any) -> list[str]:
        out, lse = result if x["return_lse"] else (result, None)
        truth = []
        scale = D**-0.5 if x["softmax_scale"] is None else x["softmax_scale"]
        for b, (start, end) in enumerate(zip(starts, ends, strict=True)):
            keep = torch.ones(1, P, end, dtype=torch.bool)
            if causal:
                keep = keep & (torch.arange(end) <= start + torch.arange(P)[:, None])
            kept, bias = oracle.split_mask(mask, b, B, end)
            keep = keep if kept is None else keep & kept
            factors = [oracle.factor(x.get(f"{name}_descale"), b, B, H) for name in "qkv"]
            truth.append(
                oracle.attention(
                    oracle.float64(q[b]) * factors[0],
                    oracle.cached(full[0], table[b].tolist(), b, end) * factors[1],
                    oracle.cached(full[1], table[b].tolist(), b, end) * factors[2],
                    scale, keep, bias,
                )
            )  # fmt: skip
        failures = oracle.judge(out, lse, truth, dtype)
        for name, cache, want in (("k_cache", k_cache, full[0]), ("v_cache", v_cache, full[1])):
            if not torch.equal(bytes_of(cache), bytes_of(want)):
                failures.append(f"{name} does not hold the rows that were written, and else what it held")
        return failures

    writes = [k_cache, v_cache] if write else []
    return legal(draw, "mha_fwd_kvcache", x, verify, [*writes, *([x["out"]] if x.get("out") is not None else [])])


def mha_faults(draw: Draw, x: dict[str, Any], ends: list[int], layout: str) -> list[Fault]:
    q, k_cache, v_cache, table = x["q"], x["k_cache"], x["v_cache"], x["block_table"]
    B, H, P, D = q.shape
    Nblk = k_cache.shape[2]
    faults: list[Fault] = [
        (
            "more query heads than KV heads",
            (HeadGroupingError,),
            lambda x: x.update(q=torch.cat([q, q], 1), out=None, attn_mask=None),
        ),
        ("start_pos of another batch", (ShapeError,), lambda x: x.update(start_pos=draw.index([0] * (B + 1)))),
        ("start_pos floating", (DTypeError,), lambda x: x.update(start_pos=torch.zeros(B, device=draw.device))),
    ]
    if B:
        faults.append(
            ("a negative start_pos", (SequenceLengthError,), lambda x: x.update(start_pos=draw.index([-1] * B)))
        )
        if P:
            covered = min(Nblk, table.shape[1]) * BLOCK
            faults.append(
                (
                    "a prompt past the cache",
                    (SequenceLengthError, BlockCountError),
                    lambda x: x.update(start_pos=draw.index([covered] * B)),
                )
            )
    if x["k"] is not None:
        faults.append(("k without v", (ShapeError,), lambda x: x.update(v=None)))
        faults.append(
            (
                "k of another P",
                (ShapeError,),
                lambda x: x.update(k=torch.cat([x["k"], x["k"]], 2) if P else x["k"].new_zeros(B, H, 1, D)),
            )
        )
        faults.append(("k of another dtype", (DTypeError,), lambda x: x.update(k=x["k"].double())))
        faults.append(("k is a list", (ShapeError,), lambda x: x.update(k=[1])))
        if P and B and k_cache.shape == v_cache.shape:
            faults.append(("V written over K", (ShapeError, LayoutError), lambda x: x.update(v_cache=k_cache)))
        if P and B and H > 1:
            flat = draw.poison(B, 1, Nblk, BLOCK, D, dtype=q.dtype).expand(-1, H, -1, -1, -1)
            faults.append(
                ("a written cache with stride 0 over heads", (LayoutError,), lambda x: x.update(k_cache=flat))
            )
        if P > BLOCK and B:

            def twice(x: dict[str, Any]) -> None:
                x["block_table"] = x["block_table"].clone()
                last = (ends[0] - 1) // BLOCK
                x["block_table"][0, last] = x["block_table"][0, last - 1]

            faults.append(("a block written twice in a row", (BlockTableError,), twice))
        if P and B > 1 and layout == "pool":

            def both(x: dict[str, Any]) -> None:
                x["block_table"] = x["block_table"].clone()
                x["block_table"][1, (ends[1] - 1) // BLOCK] = x["block_table"][0, (ends[0] - 1) // BLOCK]

            faults.append(("a block written by two requests", (BlockTableError,), both))
    if P and B:

        def entry(x: dict[str, Any]) -> None:
            x["block_table"] = x["block_table"].clone()
            x["block_table"][0, draw.value.randrange(-(-ends[0] // BLOCK))] = draw.among((-1, Nblk, NEVER))

        faults.append(("a used entry outside the cache", (BlockTableError,), entry))
    if x["attn_mask"] is not None and max(ends, default=0) > 1:
        short = x["attn_mask"][..., : max(ends) - 1]
        faults.append(("a mask shorter than the keys", (MaskShapeError,), lambda x: x.update(attn_mask=short)))
    return faults


# --- Metadata ---------------------------------------------------------------------------------------------------------


def metadata(draw: Draw, backend: str | None) -> Case:
    """get_mla_metadata."""
    B, Hk = draw.among((0, 1, 2, 3)), draw.among((1, 2, 4))
    Hq, S_q = Hk * draw.among((1, 2, 8)), draw.between(0 if draw.chance(0.1) else 1, 8)
    D, Dv, _ = draw.head_dims()
    lengths = [draw.between(0, 300) for _ in range(B)]
    table, Nblk = make_table(draw, lengths, draw.among(("slab", "pool")), unique=False)
    x: dict[str, Any] = {
        "q_shape": (B, Hq, S_q, D),
        "kv_shape": (B, Hk, Nblk, BLOCK, D),
        "block_table": draw.index(table),
        "seq_lens": draw.index(lengths),
        "v_head_dim": draw.among((None, Dv)),
        "check_values": draw.chance(0.7),
    }
    for name in ("q_shape", "kv_shape"):
        x[name] = draw.among((tuple, list, torch.Size))(x[name])
    if draw.chance(0.5):
        not_shapes = draw.among(
            ("abcd", (B, Hq, 1.5, D), (B, Hq, S_q), None, torch.zeros(4), (B, Hq, S_q, "64"), (-1, Hq, S_q, D), 4)
        )
        faults: list[Fault] = [
            (f"q_shape {not_shapes}", (ShapeError,), lambda x: x.update(q_shape=not_shapes)),
            ("kv_shape of another batch", (ShapeError,), lambda x: x.update(kv_shape=(B + 1, Hk, Nblk, BLOCK, D))),
            ("kv_shape of another D", (ShapeError,), lambda x: x.update(kv_shape=(B, Hk, Nblk, BLOCK, D + 8))),
            ("blocks of 16 tokens", (BlockCountError,), lambda x: x.update(kv_shape=(B, Hk, Nblk, 16, D))),
            ("a table that is a list", (ShapeError,), lambda x: x.update(block_table=table.tolist())),
            ("lengths that are a list", (ShapeError,), lambda x: x.update(seq_lens=lengths)),
            (
                "a D of no multiple of 8",
                (ShapeError,),
                lambda x: x.update(q_shape=(B, Hq, S_q, D + 4), kv_shape=(B, Hk, Nblk, BLOCK, D + 4)),
            ),
            ("a v_head_dim of text", (ShapeError,), lambda x: x.update(v_head_dim="64")),
        ]
        if Hk > 1:
            faults.append(
                ("heads that are no multiple", (HeadGroupingError,), lambda x: x.update(q_shape=(B, Hq + 1, S_q, D)))
            )
        if B:
            faults.append(
                (
                    "a negative length",
                    (SequenceLengthError,),
                    lambda x: x.update(seq_lens=draw.index([-1] * B), check_values=True),
                )
            )
            faults.append(
                (
                    "a length past the cache",
                    (SequenceLengthError,),
                    lambda x: x.update(seq_lens=draw.index([Nblk * BLOCK + 1] * B), check_values=True),
                )
            )
        return illegal(draw, "get_mla_metadata", x, faults)

    def verify(result: Any) -> list[str]:
        want = {"B": B, "Hq": Hq, "Hk": Hk, "S_q": S_q, "D": D, "Nblk": Nblk, "ratio": Hq // Hk}
        if x["check_values"]:
            want["max_seq_len"] = max(lengths, default=0)
        return [f"{name} is {getattr(result, name)}" for name, n in want.items() if getattr(result, name) != n]

    return legal(draw, "get_mla_metadata", x, verify, [])


# --- Both kinds -------------------------------------------------------------------------------------------------------


def bytes_of(tensor: Tensor) -> Tensor:
    return tensor.contiguous().view(torch.uint8)


def not_the_same(second: Tensor, first: Tensor) -> list[str]:
    return [] if torch.equal(bytes_of(second), bytes_of(first)) else ["the same call gave other bits"]


def legal(
    draw: Draw,
    name: str,
    x: dict[str, Any],
    verify: Callable[[Any], list[str]],
    writes: list[Tensor],
    of: Any = flash_mla,
) -> Case:
    under, inside = surroundings(draw)
    call = getattr(of, name)

    def run() -> Any:
        if before:
            called_before(draw, call, x)
        return call(**x)

    before = draw.chance(0.15)
    return Case(name, run, x, verify, writes=tuple(writes), inside=inside, under=under)


def illegal(draw: Draw, name: str, x: dict[str, Any], faults: list[Fault], of: Any = flash_mla) -> Case:
    fault, refused, change = draw.among(faults)
    change(x)
    return Case(name, lambda: getattr(of, name)(**x), x, refused=refused, fault=fault)
