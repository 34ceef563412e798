"""FP8 (e4m3): tensors with a descale factor, and the cache row formats, named, byte-exact and checked on entry.

A descale factor turns the stored value into the real one: real = stored * descale. Values beyond 448 * descale
saturate, infinities too; NaN stays NaN, and neither widens a factor that is found from the values.

The row formats hold one MLA latent a token (a latent of `quantised` dims and, in two of them, a BF16 rope part). FP8
and BF16 dims are told apart because rope quantised with the latent's scale saturates. Sources: DeepSeek FlashMLA,
`tests/quant.py` (V3.2, MODEL1, V4.1: bytes and scales are the same as what its quantiser writes); vLLM's
`fp8_ds_mla` is V3.2's row; the flat row is TRT-LLM's and CUTLASS's.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from flash_mla.errors import BlockTableError, DeviceError, DTypeError, LayoutError, ShapeError
from flash_mla.kinds import explained, explained_class
from flash_mla.passed import traced
from flash_mla.problem import BLOCK, FP8

SOURCES = (torch.bfloat16, torch.float16, torch.float32)
"""What is quantised."""
E4M3_MAX = 448.0
TINY = torch.finfo(torch.float32).tiny
SCALE_MIN = 1e-4
"""Least scale of a tile before it is rounded up to a power of two (so 2^-13), as in DeepSeek's quantiser."""


@explained
def quantise(x: Tensor, descale: float | Tensor | None = None, *, per_head: bool = False) -> tuple[Tensor, Tensor]:
    """FP8 copy of `x` and the descale factor that reads it back.

    Args:
        x: [B, H, ...] BF16, FP16 or FP32.
        descale: a float above 0 or a tensor that broadcasts to [B, H]; None takes max|x| / 448 over the finite values.
        per_head: with descale None, one factor for each request and head instead of one for the tensor.

    Returns:
        x in e4m3, in x's shape; the factor, FP32 [] or [B, H] (a given tensor in its own shape).
    """
    _check_tensor("x", x)
    if x.dtype not in SOURCES or (per_head and x.dim() < 2):
        raise DTypeError(
            given=f"x {list(x.shape)} {x.dtype}, {per_head=}",
            required="BF16, FP16 or FP32; [B, H, ...] with per_head",
            cause="`x` is not what is quantised",
            fix="Cast it; dequantise what is FP8 already",
        )
    if descale is None:
        sizes = finite_abs(x)[..., None].flatten(2) if per_head else finite_abs(x).flatten()
        amax = sizes.amax(dim=-1) if sizes.shape[-1] else sizes.new_zeros(sizes.shape[:-1])
        factor = (amax / E4M3_MAX).clamp_min(TINY)
    else:
        check_divisor(descale)
        factor = _factor(descale, x)
    return _to_e4m3(x.float() / _per_row(factor, x)), factor


def finite_abs(x: Tensor) -> Tensor:
    """|x| in FP32; 0 where x is not finite."""
    return x.float().abs().nan_to_num(nan=0.0, posinf=0.0)


@explained
def dequantise(x: Tensor, descale: float | Tensor, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """The real values of e4m3 `x` [B, H, ...], in `dtype`; descale as in `quantise`."""
    return (x.float() * _per_row(_factor(descale, x), x)).to(dtype)


def mark_scaled(cache: Tensor) -> None:
    """Note on a cache that its values are not the real ones; `contract` then asks for the descale."""
    cache._needs_descale = True  # type: ignore[attr-defined]


def needs_descale(cache: Tensor) -> bool:
    """Whether `mark_scaled` was called on this tensor; views of it do not know."""
    return getattr(cache, "_needs_descale", False)


def _check_tensor(name: str, value: object, device: torch.device | None = None) -> None:
    if not isinstance(value, Tensor):
        raise ShapeError(
            given=f"{name} is a {type(value).__name__}",
            required=f"{name} is a torch.Tensor",
            cause=f"`{name}` is not a tensor",
            fix="See the function's docstring for the order of its arguments",
        )
    if device is not None and value.device != device:
        raise DeviceError(given=f"{name} on {value.device}, pages on {device}", required=f"every tensor on {device}")


def _check_sizes(**sizes: int) -> None:
    for name, size in sizes.items():
        if size < 0:
            raise ShapeError(f"{name} = {size}", f"{name} >= 0", f"`{name}` is negative", f"Pass a number of {name}")


def _check_slots(slots: object, device: torch.device) -> None:
    _check_tensor("slots", slots, device)
    if isinstance(slots, Tensor) and slots.dtype not in (torch.int32, torch.int64):
        raise DTypeError(
            given=f"slots {slots.dtype}",
            required="int32 or int64",
            cause="`slots` is not an integer tensor",
            fix="Call slots.to(torch.int64)",
        )


def _check_last(slots: Tensor, limit: int) -> None:
    """No slot is past the pages; reads them."""
    if (last := int(slots.max())) >= limit:
        raise BlockTableError(
            given=f"slot {last}",
            required=f"slots < {limit}, the rows that the pages have",
            cause="`slots` names a token past the pages",
            fix="Pass block * page + offset inside of the pages; a negative slot is dropped",
        )


def check_divisor(descale: float | Tensor, name: str = "descale") -> None:
    """What stored values are divided by is a finite number above 0; of a tensor no value is read."""
    if not isinstance(descale, Tensor) and not 0 < descale < math.inf:
        raise ShapeError(
            given=f"{name} = {descale!r}",
            required="a finite number above 0, or a tensor of such",
            cause="Values are divided by it to be stored",
            fix="Pass max|x| / 448, which fills the range of e4m3",
        )


def _to_e4m3(x: Tensor) -> Tensor:
    """e4m3 of FP32 x, saturating: the cast alone makes NaN of what is out of range."""
    return x.clamp(-E4M3_MAX, E4M3_MAX).to(FP8)


def _factor(descale: float | Tensor, x: Tensor) -> Tensor:
    """descale in FP32 beside x [B, H, ...]: [], [H] or [B|1, H|1]."""
    factor = torch.as_tensor(descale, dtype=torch.float32, device=x.device)
    leading = zip(factor.shape[::-1], x.shape[1::-1], strict=False)
    if factor.dim() > min(x.dim(), 2) or any(size not in (1, of) for size, of in leading):
        raise ShapeError(
            given=f"descale {list(factor.shape)}, x {list(x.shape)}",
            required="a float, or a descale that broadcasts to x's first two dims",
            cause="A factor belongs to a request and a head",
            fix="Pass a float, [H] or [B, H]",
        )
    return factor


def _per_row(factor: Tensor, x: Tensor) -> Tensor:
    """factor [] | [H] | [B|1, H|1] in the dims of x [B, H, ...]."""
    return factor[(...,) + (None,) * (x.dim() - 2)] if factor.dim() and x.dim() > 2 else factor


def gather_rows(rows: Tensor, slots: Tensor) -> Tensor:
    """The bytes of rows [pages, page, n] at slots [N], row `slot % page` of page `slot // page`: [N, n]."""
    pages, page, size = rows.shape
    # NOTE: index_select copies element by element; 8 bytes at a time took 0.16 ms for 2048 rows of 656 bytes, 1 at a
    # time 0.89 ms
    if not any(x % 8 for x in (size, rows.stride(0), rows.stride(1), rows.storage_offset())):
        rows = rows.view(torch.int64)
    between = rows.stride(0) // rows.stride(1) if pages > 1 else page  # rows from one page to the next
    if pages > 1 and rows.stride(0) % rows.stride(1):
        return rows[slots // page, slots % page].view(torch.uint8)
    if between != page:
        slots = slots // page * between + slots % page
    flat = rows.as_strided(((pages - 1) * between + page, rows.shape[-1]), (rows.stride(1), 1))
    return flat.index_select(0, slots).view(torch.uint8)


def decode_e4m3(codes: Tensor) -> Tensor:
    """e4m3 bytes -> their values in FP16, exactly.

    Its exponent and mantissa are FP16's upper ones, but for the bias (7, not 15): shifted into place they are the value
    times 2^-8. torch's own conversion takes 3.6 ms for the latents of 2048 rows on a CPU, this takes 0.5 ms.
    """
    signed = codes.contiguous().view(torch.int8)
    bits = signed.to(torch.int16).mul_(128).bitwise_and_(-0x4080)  # sign, 0, 7 bits: 0xBF80
    half = bits.view(torch.float16).mul_(256.0)
    magnitude = signed.bitwise_and(127)
    # on a GPU the question would wait for it
    if codes.device.type != "cpu" or (magnitude.numel() and magnitude.max() == 127):
        half.masked_fill_(magnitude == 127, math.nan)
    return half


class Parts(NamedTuple):
    """Bytes of rows [..]: e4m3 [.., quantised], scales [.., scale_bytes] with their pad, BF16 rope [.., 2 * rope]."""

    codes: Tensor
    scales: Tensor
    rope: Tensor


@explained_class
@dataclass(frozen=True)
class RowFormat:
    """How one token's latent lies in a page of an FP8 cache.

    Args:
        name: what it is called.
        quantised: leading dims, stored as e4m3.
        rope: trailing dims, stored as BF16 (0: all dims are quantised).
        tile: dims that share one stored scale; None: no scale in the row, one descale for the whole cache.
        scale_dtype: of the stored scales, which are powers of two; FP32, or e8m0 (a bare exponent byte).
        scale_bytes: bytes of a row's scales, its pad included.
        page_split: a page holds the data of all its rows, then the scales of all; otherwise a row is
            e4m3 | scales | rope.
        page_multiple: a page's pitch is rounded up to a multiple of so many bytes.

    Pages are [num_blocks, page, 1, row_bytes], of any 1-byte dtype, with rows one after another from a multiple of
    `unit` bytes on, and a block stride of at least `page_bytes(page)` unless there is one page only. With `page_split`
    a row of that tensor is no token's row: the page's bytes are the unit. `slots` number tokens through the pages:
    block * page + offset.
    """

    name: str
    quantised: int
    rope: int
    tile: int | None = None
    scale_dtype: torch.dtype = torch.float32
    scale_bytes: int = 0
    page_split: bool = False
    page_multiple: int = 1

    @property
    def head_dim(self) -> int:
        """D: dims of a row before quantisation."""
        return self.quantised + self.rope

    @property
    def row_bytes(self) -> int:
        """Bytes a token, scales included."""
        return self.quantised + 2 * self.rope + self.scale_bytes

    @property
    def unit(self) -> int:
        """Bytes of a row's widest number, on which rows must begin: 4 with FP32 scales, 2 with a rope, else 1."""
        return max(self.scale_dtype.itemsize if self.tile else 1, 2 if self.rope else 1)

    def page_bytes(self, page: int = BLOCK) -> int:
        """Bytes from one page to the next."""
        _check_sizes(page=page)
        return -(-page * self.row_bytes // self.page_multiple) * self.page_multiple

    def empty(self, num_blocks: int, page: int = BLOCK, device: torch.device | str | None = None) -> Tensor:
        """Uninitialised pages [num_blocks, page, 1, row_bytes] e4m3, at the format's page pitch, on `device`."""
        _check_sizes(num_blocks=num_blocks)
        memory = torch.empty(num_blocks, self.page_bytes(page), dtype=torch.uint8, device=device)
        return memory[:, : page * self.row_bytes].view(num_blocks, page, 1, self.row_bytes).view(FP8)

    def quantise(self, rows: Tensor, descale: float | Tensor | None = None) -> Tensor:
        """New pages that hold rows [num_blocks, page, 1, D] BF16.

        Args:
            rows: [num_blocks, page, 1, D] BF16.
            descale: one factor for the whole cache, in the flat format; the others store their scales.
        """
        _check_tensor("rows", rows)
        if rows.dim() != 4 or rows.shape[2] != 1:
            raise self._rows_error(rows, "[num_blocks, page, 1, D]")
        values = self.encode(rows[:, :, 0], descale)
        pages = self.empty(rows.shape[0], rows.shape[1], rows.device)
        for part, value in zip(self.parts(pages), values, strict=True):
            part.copy_(value)
        return pages

    def dequantise(self, pages: Tensor, descale: float | Tensor | None = None) -> Tensor:
        """The rows of pages, [num_blocks, page, 1, D] BF16; descale as in `quantise`."""
        self.check(pages)
        return self._decode(self.parts(pages), descale)[:, :, None]

    def append(
        self,
        pages: Tensor,
        slots: Tensor,
        k_nope: Tensor,
        k_rope: Tensor,
        descale: float | Tensor | None = None,
        *,
        check_values: bool = True,
    ) -> None:
        """Quantise N rows into their pages by one kernel, which writes the bytes that `quantise` does.

        Args:
            pages: [num_blocks, page, 1, row_bytes], written in place.
            slots: [N] int32 or int64, all different; the row of a negative slot is dropped (a serving engine's pad).
            k_nope: [N, D - 64] BF16, the latent.
            k_rope: [N, 64] BF16, its rope part.
            descale: as in `quantise`.
            check_values: read `slots`, which waits for the GPU, and refuse one past the pages; False: such a row is
                dropped, nothing waits, and a CUDA graph may capture the call.
        """
        self.check(pages)
        for name, part in (("k_nope", k_nope), ("k_rope", k_rope)):
            _check_tensor(name, part, pages.device)
            if part.dim() != 2 or len(part) != len(k_nope) or part.dtype != torch.bfloat16:
                raise self._rows_error(part, f"{name} [N, ..], the same N in both,")
        N, D = len(k_nope), k_nope.shape[1] + k_rope.shape[1]
        _check_slots(slots, pages.device)
        if D != self.head_dim or slots.shape != (N,):
            raise self._rows_error(k_nope, f"k_nope and k_rope of D columns in all, not {D}, beside slots [{N}],")
        limit = pages.shape[0] * pages.shape[1]
        if check_values and N:
            _check_last(slots, limit)
        check_divisor(self._descale(descale))
        if isinstance(descale, Tensor):
            descale = descale.to(pages.device, torch.float32)
        elif descale is not None:  # filled on the device: a copy from the host could not be captured
            descale = torch.full((), descale, dtype=torch.float32, device=pages.device)
        # NOTE: an operator, since this module lies below the backends (see `ops`)
        size = 0 if self.tile is None else self.scale_dtype.itemsize
        torch.ops.flash_mla.append_rows(*self.parts(pages), slots, k_nope, k_rope, descale, self.tile or 0, size)

    def read(self, pages: Tensor, slots: Tensor, descale: float | Tensor | None = None) -> Tensor:
        """The rows of slots [..], [.., D] BF16; for a negative slot, that of slot 0 (the caller masks it).

        descale: as in `quantise`. A slot past the pages is an error on a CPU; a GPU, which is not waited for, gives the
        last row.
        """
        self.check(pages)
        _check_slots(slots, pages.device)
        limit = pages.shape[0] * pages.shape[1]
        named = slots.clamp_min(0)
        if slots.numel() and (not limit or pages.device.type == "cpu"):
            _check_last(named, limit)
        flat = named.clamp_max(max(limit - 1, 0)).flatten()
        data, scales = self._stretches(pages)
        codes, *between, rope = gather_rows(data, flat).split(self._columns(), dim=-1)
        gathered = Parts(codes, between[0] if between else gather_rows(scales, flat), rope)
        return self._decode(gathered, descale).view(*slots.shape, self.head_dim)

    def check(self, pages: Tensor) -> None:
        """Refuse a tensor that cannot be pages of this format.

        Sizes alone do not tell every format from every other: name the one that wrote the cache.
        """
        _check_tensor("pages", pages)
        if pages.element_size() != 1:
            raise DTypeError(
                given=f"pages of {pages.dtype}",
                required=f"{self.name}: a 1-byte dtype (float8_e4m3fn, uint8 or int8)",
                cause="A row format is bytes",
                fix="Pass `pages.view(torch.uint8)`",
            )
        if pages.dim() != 4 or pages.shape[2] != 1 or pages.shape[3] != self.row_bytes:
            raise ShapeError(
                given=f"pages {list(pages.shape)}",
                required=f"{self.name}: [num_blocks, page, 1, {self.row_bytes}]",
                cause=f"A row of {self.name} is {self.row_bytes} bytes, for one KV head",
                fix="Name the format that the cache was written in",
            )
        num_blocks, page = pages.shape[:2]
        if not traced(pages) and pages.data_ptr() % self.unit:
            raise LayoutError(
                given=f"pages that begin {pages.data_ptr() % self.unit} bytes past a multiple of {self.unit}",
                required=f"{self.name}: rows that begin on {self.unit} bytes",
                cause=f"A row holds numbers of {self.unit} bytes, which a GPU reads whole",
                fix="Allocate the pages with the format's empty(num_blocks), or slice them at a multiple",
            )
        pitched = num_blocks < 2 or self._is_pitch(pages.stride(0), page)
        if not pitched or not pages[:1].is_contiguous():
            raise LayoutError(
                given=f"pages {list(pages.shape)} with strides {list(pages.stride())}",
                required=f"{self.name}: contiguous rows, pages {self.page_bytes(page)} bytes apart "
                f"(or more, by a multiple of {max(self.page_multiple, self.unit)})",
                cause="The rows of a page do not lie one after another at the format's pitch",
                fix="Allocate the pages with the format's empty(num_blocks)",
            )

    def _is_pitch(self, stride: int, page: int) -> bool:
        return stride >= self.page_bytes(page) and stride % max(self.page_multiple, self.unit) == 0

    def parts(self, pages: Tensor) -> Parts:
        """Byte views [num_blocks, page, ..] of what checked pages, [num_blocks, page, row_bytes] too, hold."""
        if pages.element_size() != 1 or pages.dim() < 3 or pages.shape[2:].numel() != self.row_bytes:
            self.check(pages)
        data, scales = self._stretches(pages)
        codes, *between, rope = data.split(self._columns(), dim=-1)
        return Parts(codes, between[0] if between else scales, rope)

    def _stretches(self, pages: Tensor) -> tuple[Tensor, Tensor]:
        """Byte views of a page's rows [num_blocks, page, ..] and, where they lie apart, of its scales (else empty)."""
        num_blocks, page = pages.shape[:2]
        memory = pages.view(torch.uint8).view(num_blocks, page * self.row_bytes)
        apart = self.scale_bytes if self.page_split else 0
        data, scales = memory.split([page * (self.row_bytes - apart), page * apart], dim=-1)
        return data.unflatten(1, (page, self.row_bytes - apart)), scales.unflatten(1, (page, apart))

    def _columns(self) -> list[int]:
        """How the bytes of a row in `_stretches` are cut: codes, scales if they lie there, rope."""
        return [self.quantised, *([] if self.page_split else [self.scale_bytes]), 2 * self.rope]

    def encode(self, rows: Tensor, descale: float | Tensor | None = None) -> Parts:
        """The bytes of rows [.., D] BF16; descale as in `quantise`."""
        if rows.dtype != torch.bfloat16 or rows.shape[-1] != self.head_dim:
            raise self._rows_error(rows, f"[.., {self.head_dim}]")
        # NOTE: contiguous, for else a rope of no dims has no bytes to view
        latent, rope = rows.contiguous().split([self.quantised, self.rope], dim=-1)
        if self.tile is None:
            check_divisor(self._descale(descale))
            stored = _to_e4m3(latent.float() / self._descale(descale))
            scales = stored.view(torch.uint8)[..., :0]
        else:
            self._descale(descale)
            tiles = latent.float().unflatten(-1, (-1, self.tile))
            scale = (finite_abs(tiles).amax(dim=-1) / E4M3_MAX).clamp_min(SCALE_MIN).log2().ceil().exp2()
            stored = _to_e4m3(tiles / scale[..., None]).flatten(-2)
            scales = scale.to(self.scale_dtype).view(torch.uint8)
            scales = F.pad(scales, (0, self.scale_bytes - scales.shape[-1]))
        return Parts(stored.view(torch.uint8), scales, rope.contiguous().view(torch.uint8))

    def _decode(self, parts: Parts, descale: float | Tensor | None) -> Tensor:
        """Rows [.., D] BF16 of their bytes."""
        latent = decode_e4m3(parts.codes)
        factor = self._descale(descale)
        if self.tile is None:
            latent = latent.float() * factor
        else:
            scales = parts.scales.contiguous().view(self.scale_dtype)[..., : self.quantised // self.tile]
            latent = (latent.unflatten(-1, (-1, self.tile)) * scales.float()[..., None]).flatten(-2)
        if not self.rope:
            return latent.bfloat16()
        return torch.cat([latent.bfloat16(), parts.rope.contiguous().view(torch.bfloat16)], dim=-1)

    def _descale(self, descale: float | Tensor | None) -> float | Tensor:
        """The cache's one factor (1 if not given); refused where rows store their own scales."""
        if descale is None:
            return 1.0
        if self.tile is not None or (isinstance(descale, Tensor) and descale.numel() != 1):
            raise ShapeError(
                given=f"descale {list(descale.shape) if isinstance(descale, Tensor) else descale}",
                required=f"{self.name}: " + ("one factor for the cache" if self.tile is None else "no descale"),
                cause="The flat format has one factor for the whole cache; in the others, each row stores its scales",
                fix="Pass one float to the flat format, nothing to the others",
            )
        return descale

    def _rows_error(self, rows: Tensor, required: str) -> ShapeError:
        return ShapeError(
            given=f"rows {list(rows.shape)} {rows.dtype}",
            required=f"{self.name}: {required} bfloat16, D = {self.head_dim} ({self.quantised} FP8 + {self.rope} BF16)",
            cause="The rows are not what this format quantises",
            fix="Pass the latent and its rope part in BF16, or name another format",
        )


FP8_DS_MLA = RowFormat("fp8_ds_mla", quantised=512, rope=64, tile=128, scale_bytes=16)
"""DeepSeek V3.2 and vLLM's `fp8_ds_mla`: 656 bytes, 512 e4m3 | 4 FP32 scales (one per 128) | 64 BF16 rope."""

MODEL1 = RowFormat(
    "model1",
    quantised=448,
    rope=64,
    tile=64,
    scale_dtype=torch.float8_e8m0fnu,
    scale_bytes=8,
    page_split=True,
    page_multiple=576,
)
"""DeepSeek's MODEL1 (V4): 584 bytes; 448 e4m3 | 64 BF16 rope of all rows, then 7 e8m0 scales (one per 64) + 1 pad."""

V41 = RowFormat("v4.1", quantised=512, rope=0, tile=32, scale_dtype=torch.float8_e8m0fnu, scale_bytes=16)
"""DeepSeek V4.1: 528 bytes, 512 e4m3 (rope too) | 16 e8m0 scales (one per 32).

A cache of before 2026.09.30 is as large but splits its pages as MODEL1 does; it cannot be told apart, and is misread.
"""

FLAT = RowFormat("flat", quantised=576, rope=0)
"""576 e4m3, rope too, and one descale for the whole cache."""

FP8_TOKEN = RowFormat("fp8_token", quantised=512, rope=64, tile=512, scale_bytes=4, page_split=True, page_multiple=16)
"""A scale a token: 644 bytes; 512 e4m3 | 64 BF16 rope of all rows, then one FP32 scale a row, a power of two.

SnapMLA's row (arXiv 2602.10718): its scale multiplies a key's whole score, and in P V its whole row, so that a kernel
which multiplies e4m3 never unpacks it. A page of 64 holds rows of 640 bytes, each on 16 bytes.
"""

FORMATS = {format_.name: format_ for format_ in (FP8_DS_MLA, MODEL1, V41, FLAT, FP8_TOKEN)}
"""The row formats by name."""
