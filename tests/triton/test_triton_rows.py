"""The kernel that appends FP8 rows, in Triton's interpreter or on a GPU: the bytes that `quant` writes, no other."""

from __future__ import annotations

import os

import pytest
import torch
from torch import Tensor

from flash_mla.quant import FORMATS, RowFormat

triton = pytest.importorskip("triton")

from flash_mla.backends.triton import append  # noqa: E402
from flash_mla.problem import AppendRowsArgs  # noqa: E402

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
pytestmark = pytest.mark.skipif(not (INTERPRETED or torch.cuda.is_available()), reason="needs TRITON_INTERPRET=1")
DEVICE = "cpu" if INTERPRETED else "cuda"
FILL = 0xA5


def hostile(N: int, D: int) -> Tensor:
    """Rows whose sizes range over BF16's, with zeros of both signs, infinities, NaN of both signs, halves of e4m3."""
    g = torch.Generator().manual_seed(N + D)
    rows = torch.randn(N, D, generator=g) * torch.randint(-90, 90, (N, 1), generator=g).float().exp2()
    rows[1] = torch.randn(D, generator=g)
    rows[2], rows[3, ::2], rows[3, 1::2] = 0.0, -0.0, 0.0
    rows[4, ::7], rows[4, 3::7] = torch.inf, -torch.inf
    rows[5, ::5] = torch.nan
    rows[6] = torch.inf
    rows[7, 11], rows[7, 200] = torch.finfo(torch.bfloat16).max, -torch.nan
    # every code and the ties between codes, below and above the least normal number; the largest is exact
    codes = torch.arange(127, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    rows[8, :127], rows[8, 127:253] = codes, -(codes[1:] + codes[:-1]) / 2
    rows[9] = torch.randint(0, 2**16, (D,), generator=g, dtype=torch.int32).to(torch.int16).view(torch.bfloat16).float()
    bits = rows.bfloat16()
    bits.view(torch.int16)[5, 10] = -1  # NaN with its sign, which FP32 need not keep
    return bits


def filled(form: RowFormat, blocks: int, page: int, device: str) -> Tensor:
    """Pages whose memory, the padding between them too, holds FILL."""
    pages = form.empty(blocks, page, device).view(torch.uint8)
    pages.untyped_storage().fill_(FILL)
    return pages


def bytes_of(pages: Tensor) -> Tensor:
    """All bytes of the memory that pages lie in."""
    return pages.as_strided((pages.untyped_storage().nbytes(),), (1,), 0).cpu()


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("page", [5, 64])
@pytest.mark.parametrize("form", FORMATS.values(), ids=FORMATS)
def test_every_byte_is_that_of_quantise(form: RowFormat, page: int, dtype: torch.dtype) -> None:
    blocks, N = 3, 13
    rows = hostile(N, form.head_dim)
    order = torch.randperm(blocks * page, generator=torch.Generator().manual_seed(page))[:N]
    descale = 0.3 if form.tile is None else None
    wanted = filled(form, blocks, page, "cpu")
    form.append(wanted, order, rows[:, :-64], rows[:, -64:], descale)

    outside = torch.tensor([-1, blocks * page, 2**31 - 1, -(2**31)])
    if dtype == torch.int64:
        outside = torch.cat([outside, torch.tensor([2**32 + 1, -(2**40)])])
    slots = torch.cat([outside, order]).to(DEVICE, dtype)
    given = torch.cat([rows[: len(outside)], rows]).to(DEVICE)
    pages = filled(form, blocks, page, DEVICE)
    factor = None if descale is None else torch.tensor(descale, device=DEVICE)
    size = 0 if form.tile is None else form.scale_dtype.itemsize
    parts = form.parts(pages)
    append.launch_rows(AppendRowsArgs(*parts, slots, given[:, :-64], given[:, -64:], factor, form.tile or 0, size))
    assert torch.equal(bytes_of(pages), bytes_of(wanted))


@pytest.mark.skipif(INTERPRETED, reason="the public function runs the kernel on a GPU")
@pytest.mark.parametrize("form", FORMATS.values(), ids=FORMATS)
def test_append_runs_the_kernel_and_can_be_captured(form: RowFormat) -> None:
    rows = hostile(13, form.head_dim).to(DEVICE)
    descale = 0.3 if form.tile is None else None
    wanted = filled(form, 2, 64, "cpu")
    order = torch.randperm(128)[:13]
    form.append(wanted, order, rows[:, :-64].cpu(), rows[:, -64:].cpu(), descale)
    pages, slots = filled(form, 2, 64, DEVICE), order.to(DEVICE)
    form.append(pages, slots, rows[:, :-64], rows[:, -64:], descale)
    assert torch.equal(bytes_of(pages), bytes_of(wanted))
    pages.untyped_storage().fill_(FILL)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        form.append(pages, slots, rows[:, :-64], rows[:, -64:], descale, check_values=False)
    graph.replay()
    assert torch.equal(bytes_of(pages), bytes_of(wanted))
