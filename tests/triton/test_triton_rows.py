"""The kernels that append FP8 rows, on the CPU, in Triton's interpreter or on a GPU: `quantise`'s bytes, no other."""

from __future__ import annotations

import os

import pytest
import torch
from torch import Tensor

from flash_mla.quant import FORMATS, RowFormat

triton = pytest.importorskip("triton")

from flash_mla.backends.cpu import append as cpu  # noqa: E402
from flash_mla.backends.triton import append as triton_append  # noqa: E402
from flash_mla.problem import AppendRowsArgs  # noqa: E402

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
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


def reference(form: RowFormat, blocks: int, page: int, order: Tensor, rows: Tensor, descale: float | None) -> Tensor:
    """Pages whose slots `order` hold the rows, by torch's ops."""
    pages = filled(form, blocks, page, "cpu")
    for part, value in zip(form.parts(pages), form.encode(rows, descale), strict=True):
        part[order // page, order % page] = value
    return pages


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("page", [5, 64])
@pytest.mark.parametrize("form", FORMATS.values(), ids=FORMATS)
@pytest.mark.parametrize("way", ["cpu", "torch", "triton"])
def test_every_byte_is_that_of_quantise(
    way: str, form: RowFormat, page: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    if way == "triton" and not (INTERPRETED or torch.cuda.is_available()):
        pytest.skip("needs TRITON_INTERPRET=1")
    if way == "torch":
        monkeypatch.setattr(cpu.engine, "missing", lambda: "a test")
    device = DEVICE if way == "triton" else "cpu"
    blocks, N = 3, 13
    rows = hostile(N, form.head_dim)
    order = torch.randperm(blocks * page, generator=torch.Generator().manual_seed(page))[:N]
    descale = 0.3 if form.tile is None else None

    outside = torch.tensor([-1, blocks * page, 2**31 - 1, -(2**31)])
    if dtype == torch.int64:
        outside = torch.cat([outside, torch.tensor([2**32 + 1, -(2**40)])])
    slots = torch.cat([outside, order]).to(device, dtype)
    given = torch.cat([rows[: len(outside)], rows]).to(device)
    pages = filled(form, blocks, page, device)
    factor = None if descale is None else torch.tensor(descale, device=device)
    size = 0 if form.tile is None else form.scale_dtype.itemsize
    args = AppendRowsArgs(*form.parts(pages), slots, given[:, :-64], given[:, -64:], factor, form.tile or 0, size)
    (triton_append if way == "triton" else cpu).launch_rows(args)
    assert torch.equal(bytes_of(pages), bytes_of(reference(form, blocks, page, order, rows, descale)))


@pytest.mark.parametrize("form", FORMATS.values(), ids=FORMATS)
def test_a_team_of_threads_writes_the_same_bytes(form: RowFormat) -> None:
    rows, order = hostile(2000, form.head_dim), torch.randperm(2048)[:2000]
    pages = filled(form, 32, 64, "cpu")
    form.append(pages, order, rows[:, :-64], rows[:, -64:], 0.3 if form.tile is None else None)
    wanted = reference(form, 32, 64, order, rows, 0.3 if form.tile is None else None)
    assert torch.equal(bytes_of(pages), bytes_of(wanted))


@pytest.mark.skipif(INTERPRETED or not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("form", FORMATS.values(), ids=FORMATS)
def test_append_can_be_captured(form: RowFormat) -> None:
    rows, order = hostile(13, form.head_dim), torch.randperm(128)[:13]
    descale = 0.3 if form.tile is None else None
    wanted = bytes_of(reference(form, 2, 64, order, rows, descale))
    pages, slots, rows = filled(form, 2, 64, DEVICE), order.to(DEVICE), rows.to(DEVICE)
    form.append(pages, slots, rows[:, :-64], rows[:, -64:], descale)
    assert torch.equal(bytes_of(pages), wanted)
    pages.untyped_storage().fill_(FILL)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        form.append(pages, slots, rows[:, :-64], rows[:, -64:], descale, check_values=False)
    graph.replay()
    assert torch.equal(bytes_of(pages), wanted)
