"""Drawn cases of `flash_mla.testing`, which knows their truth: gradients, and the index of sparse attention."""

from __future__ import annotations

from typing import Any

import torch

from flash_mla import testing

from .case import Case
from .draw import Draw

HALVES = (torch.bfloat16, torch.float16)
FLOATS = (torch.float32, *HALVES)


def drawn(draw: Draw, backend: str | None, kind: type, **chosen: Any) -> Case:
    """A case of one of the package's kinds."""
    case = kind("fuzz", device=draw.device, backend=backend, seed=draw.value.getrandbits(30), **chosen)
    # what a named backend does not run is no failure
    return Case(case.function, lambda: testing.run(case), chosen, lambda result: verdict(result, backend is not None))


def verdict(result: testing.Result, named: bool) -> list[str]:
    passed = result.passed or (named and result.refused is not None)
    return [] if passed else [str(result)]


def lengths_of(draw: Draw, count: int, most: int) -> tuple[int, ...]:
    return tuple(draw.between(0, most) for _ in range(count))


def least_keys(dtype: torch.dtype) -> int:
    """Keys that a query should see: of few, what a softmax gives back cancels, and rounding is what is left of it."""
    return 8 if dtype == torch.float32 else 40


def with_sink(draw: Draw, Hq: int) -> bool:
    """Its gradient is a number a head: of one head alone it may be small by chance, where its error is not."""
    return draw.maybe(0.3) and Hq >= 8


def training(draw: Draw, backend: str | None) -> Case:
    """The backward of flash_mla_prefill."""
    D, Dv = draw.pick(((128, 128), (128, 128), (192, 128), (64, 64), (40, 72), (256, 256)))
    B, dtype = draw.between(1, 3), draw.pick((*HALVES, *FLOATS))
    P = draw.between(least_keys(dtype), max(least_keys(dtype), draw.among((1, 70, 300))))
    # the masks that a kernel without them refuses are drawn less often than none
    kinds: dict[str, Any] = {"causal": draw.pick((True, False))}
    if draw.maybe(0.3):
        kinds |= {"mask": draw.pick(("bool", "float", "bool-heads", "float-heads"))}
    if draw.maybe(0.2):
        kinds |= {"sparse": draw.pick(("tensor", "heads", "layout"))}
    Hk = draw.pick((1, 2))
    Hq = Hk * draw.pick((1, 2, 4, 8))
    lengths = (P, *lengths_of(draw, B - 1, P)) if draw.maybe(0.3) else None
    return drawn(
        draw, backend, testing.GradientCase, P=P, B=B, D=D, Dv=Dv, Hk=Hk, Hq=Hq, lengths=lengths,
        dtype=dtype, sliced=draw.maybe(0.2), sink=with_sink(draw, Hq),
        softmax_scale=draw.among((None, None, 0.2)), d_out=draw.among(("contiguous", "strided", "expanded")),
        d_lse=draw.chance(0.5), **kinds,
    )  # fmt: skip


def sparse_training(draw: Draw, backend: str | None) -> Case:
    """The backward of flash_mla_sparse_fwd."""
    D, Dv = draw.pick(((576, 512), (576, 512), (512, 512), (72, 40)))
    Hq, dtype = draw.pick((1, 3, 8, 16, 64, 128)), draw.pick((*HALVES, *FLOATS))
    least = least_keys(dtype)
    return drawn(
        draw, backend, testing.SparseGradientCase, S_q=draw.between(1, draw.among((3, 60))),
        S_kv=draw.between(least, max(least, draw.among((5, 300)))), Hq=Hq, D=D, Dv=Dv,
        topk=draw.pick((64, 65, 200)), dtype=dtype, lengths=draw.maybe(0.4),
        sink=with_sink(draw, Hq), softmax_scale=draw.among((0.05, 0.02, -0.04)), expanded=draw.chance(0.3),
    )  # fmt: skip


def varlen_training(draw: Draw, backend: str | None) -> Case:
    """The backward of flash_attn_varlen_func."""
    D, Dv = draw.pick(((128, 128), (192, 128), (64, 64), (40, 72)))
    n, Hk, dtype = draw.between(0, 3), draw.pick((1, 2)), draw.pick((*HALVES, *FLOATS))
    # one sequence has a query and a key, for the truth to have a graph
    lengths_q, lengths_kv = ((draw.between(least_keys(dtype), 150), *lengths_of(draw, n, 150)) for _ in range(2))
    return drawn(
        draw, backend, testing.VarlenCase, lengths_q=lengths_q, lengths_kv=lengths_kv,
        Hk=Hk, Hq=Hk * draw.pick((1, 2, 4)), D=D, Dv=Dv, dtype=dtype,
        causal=draw.pick((True, False)),
    )  # fmt: skip


def ragged_index(draw: Draw, backend: str | None) -> Case:
    """mqa_logits and prefill_indices."""
    return drawn(
        draw, backend, testing.RaggedIndexCase, S_q=draw.between(1, 60), S_kv=draw.between(200, 700),
        H=draw.pick((1, 3, 8, 64)), D=draw.pick((16, 128)), topk=draw.pick((1, 2, 64, 400)),
    )  # fmt: skip


def paged_index(draw: Draw, backend: str | None) -> Case:
    """paged_mqa_logits and decode_indices."""
    # the budget is a share of the greatest score, and its 64 terms are each as great: of a few keys none may be
    lengths = (300, *lengths_of(draw, draw.between(0, 4), draw.among((3, 900))))
    return drawn(
        draw, backend, testing.PagedIndexCase, lengths=lengths, S_q=draw.pick((1, 2, 5)), H=draw.pick((1, 5, 32, 64)),
        page=draw.pick((64, 64, 192)), topk=draw.pick((1, 64, 512)),
    )  # fmt: skip


def topk(draw: Draw, backend: str | None) -> Case:
    """topk_indices, ties, infinities and NaN among the scores."""
    return drawn(draw, backend, testing.TopkCase, N=draw.between(1, draw.among((70, 9000))), topk=draw.pick((1, 512)))
