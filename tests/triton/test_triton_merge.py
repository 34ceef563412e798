"""The kernel that merges what ranks exchanged, against merge.py in float64."""

from __future__ import annotations

import math
import os

import pytest
import torch

from flash_mla.distributed.exchange import pack, unpack
from flash_mla.merge import apply_sink, merge

INTERPRET = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cuda" if torch.cuda.is_available() and not INTERPRET else "cpu"
pytestmark = pytest.mark.skipif(DEVICE == "cpu" and not INTERPRET, reason="no GPU, and TRITON_INTERPRET=1 is not set")


@pytest.mark.parametrize("sink", [False, True])
@pytest.mark.parametrize(("dtype", "budget"), [(torch.float32, 1e-6), (torch.bfloat16, 4e-3), (torch.float16, 5e-4)])
@pytest.mark.parametrize("parts", [2, 5])
def test_merge_of_exchanged_parts(parts: int, dtype: torch.dtype, budget: float, sink: bool) -> None:
    """As `unpack` leaves them, with rows that some ranks, or all, see no key of."""
    from flash_mla.backends.triton import merge as kernel

    torch.manual_seed(parts)
    B, Hq, S_q, Dv = 2, 3, 2, 72
    outs, lses = torch.randn(parts, B, Hq, S_q, Dv).to(dtype), 30 * torch.randn(parts, B, Hq, S_q)
    lses[torch.rand(lses.shape) < 0.3] = -math.inf
    lses[:, 0, 1] = -math.inf
    outs = outs.masked_fill((lses == -math.inf)[..., None], 0)
    logits = torch.randn(Hq) if sink else None
    packed = torch.stack([pack(out, lse) for out, lse in zip(outs, lses, strict=True)]).to(DEVICE)
    out, lse = kernel.launch(*unpack(packed, dtype), None if logits is None else logits.to(DEVICE))
    want, want_lse = merge(outs.double(), lses.double())
    if logits is not None:
        want = apply_sink(want, want_lse, logits.double()[:, None])
    assert out.dtype == dtype
    assert (out.cpu() - want).abs().max() <= budget * want.abs().max()
    torch.testing.assert_close(lse.cpu().double(), want_lse, atol=1e-5, rtol=1e-6)
    assert not out[0, 1].any()
