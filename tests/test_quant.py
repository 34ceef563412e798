"""FP8 factors, and the row formats: bytes against a scalar encoder, bounds of a round trip, refusals."""

from __future__ import annotations

import math
import struct

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings

from flash_mla.errors import BlockTableError, DeviceError, DTypeError, LayoutError, ShapeError
from flash_mla.quant import FLAT, FORMATS, FP8_DS_MLA, FP8_TOKEN, MODEL1, V41, RowFormat, dequantise, quantise

FP8 = torch.float8_e4m3fn
formats = pytest.mark.parametrize("form", FORMATS.values(), ids=FORMATS)
STORED_SCALES = [FP8_DS_MLA, MODEL1, V41]


def latents(form: RowFormat, blocks: int = 2, page: int = 64, seed: int = 0) -> torch.Tensor:
    """Rows [blocks, page, 1, D] BF16 whose tiles range over fourteen binary orders of magnitude, some all zero."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(blocks, page, 1, form.head_dim, generator=generator)
    scale = torch.randint(-12, 12, (blocks, page, 1, form.head_dim // 32), generator=generator).float().exp2()
    scale[0, 0] = 0
    return (rows * scale.repeat_interleave(32, dim=-1)).bfloat16()


def e4m3_values() -> list[float]:
    """The value of each e4m3 byte below 0x7f, from the format's definition."""
    values = []
    for byte in range(0x7F):
        exponent, mantissa = byte >> 3, byte & 7
        values.append(math.ldexp(8 + mantissa, exponent - 10) if exponent else math.ldexp(mantissa, -9))
    return values


VALUES = e4m3_values()


def e4m3_byte(x: float) -> int:
    """The byte of the e4m3 number nearest to x, ties to the even byte."""
    nearest = min(range(0x7F), key=lambda byte: (abs(VALUES[byte] - abs(x)), byte & 1))
    return nearest | (0x80 if math.copysign(1, x) < 0 else 0)


def scale_exponent(tile: list[float]) -> int:
    """The least e with 2**e >= max(|tile| / 448, 1e-4)."""
    mantissa, exponent = math.frexp(max(max(map(abs, tile)) / 448, 1e-4))
    return exponent - (mantissa == 0.5)


def encode(row: list[float], quantised: int, tile: int, e8m0: bool) -> tuple[bytes, bytes, bytes]:
    """(e4m3 bytes, scale bytes, BF16 rope bytes) of one row, element by element."""
    latent, scales = bytearray(), bytearray()
    for start in range(0, quantised, tile):
        part = row[start : start + tile]
        exponent = scale_exponent(part)
        scales += bytes([exponent + 127]) if e8m0 else struct.pack("<f", 2.0**exponent)
        latent += bytes(e4m3_byte(x / 2.0**exponent) for x in part)
    rope = b"".join(struct.pack("<f", x)[2:] for x in row[quantised:])
    return bytes(latent), bytes(scales), rope


def memory_of(pages: torch.Tensor, block: int) -> bytes:
    """The bytes of one page, read from where it starts."""
    size = pages.shape[1] * pages.shape[3]
    flat = pages.view(torch.uint8).as_strided((size,), (1,), block * pages.stride(0))
    return bytes(flat.tolist())


def test_v32_rows_are_byte_for_byte_e4m3_then_scales_then_rope() -> None:
    rows = latents(FP8_DS_MLA, page=4)
    pages = FP8_DS_MLA.quantise(rows)
    assert pages.shape == (2, 4, 1, 656)
    for block in range(2):
        expected = b"".join(b"".join(encode(row, 512, 128, e8m0=False)) for row in rows[block, :, 0].tolist())
        assert memory_of(pages, block) == expected


def test_v41_rows_are_byte_for_byte_e4m3_then_exponents() -> None:
    rows = latents(V41, page=4)
    pages = V41.quantise(rows)
    assert pages.shape == (2, 4, 1, 528)
    for block in range(2):
        expected = b"".join(b"".join(encode(row, 512, 32, e8m0=True)) for row in rows[block, :, 0].tolist())
        assert memory_of(pages, block) == expected


def test_token_pages_are_byte_for_byte_all_rows_then_all_scales() -> None:
    rows = latents(FP8_TOKEN, page=4)
    pages = FP8_TOKEN.quantise(rows)
    assert pages.shape == (2, 4, 1, 644)
    for block in range(2):
        parts = [encode(row, 512, 512, e8m0=False) for row in rows[block, :, 0].tolist()]
        expected = b"".join(latent + rope for latent, _, rope in parts) + b"".join(scale for _, scale, _ in parts)
        assert memory_of(pages, block) == expected


def attention_error(kind: str, format_name: str | None) -> float:
    """Relative norm of the error of attention over rows in a format (None: BF16), against float64 over the rows.

    kind: "gaussian"; "heavy", rows of very different size; "outlier", four latent columns 50 times the others; "rope",
    rope columns 30 times the latent's.
    """
    g = torch.Generator().manual_seed(0)
    rows = torch.randn(1024, 576, generator=g, dtype=torch.float64)
    if kind == "heavy":
        rows *= torch.exp(1.5 * torch.randn(1024, 1, generator=g, dtype=torch.float64))
    if kind == "outlier":
        rows[:, [3, 100, 300, 511]] *= 50
    if kind == "rope":
        rows[:, 512:] *= 30
    q = torch.randn(64, 576, generator=g, dtype=torch.float64)
    q /= (q @ rows.T).std()
    exact = torch.softmax(q @ rows.T, -1) @ rows[:, :512]
    stored = rows.bfloat16()
    if format_name is not None:
        form = FORMATS[format_name]
        descale = float(rows.abs().max() / 448) if form.tile is None else None
        stored = form.dequantise(form.quantise(stored.view(16, 64, 1, 576), descale), descale).view(1024, 576)
    stored = stored.double()
    return float((torch.softmax(q @ stored.T, -1) @ stored[:, :512] - exact).norm() / exact.norm())


@pytest.mark.parametrize("kind", ["gaussian", "heavy", "outlier", "rope"])
def test_one_scale_a_token_is_as_accurate_as_four(kind: str) -> None:
    """e4m3's own rounding decides, not the number of scales: ten to twenty times BF16's error, BF16 rope or not."""
    names = (None, "fp8_token", "fp8_ds_mla", "flat")
    bf16, token, tiles, flat = (attention_error(kind, name) for name in names)
    print(f"{kind}: BF16 {bf16:.1e}, fp8_token {token:.1e}, fp8_ds_mla {tiles:.1e}, flat {flat:.1e}")
    assert bf16 < token < 1.05 * tiles
    assert token < 0.1
    if kind == "rope":  # quantised with the latent's scale, rope is what errs
        assert token < 0.8 * flat


def test_model1_pages_are_byte_for_byte_all_rows_then_all_scales() -> None:
    rows = latents(MODEL1, page=4)
    pages = MODEL1.quantise(rows)
    assert pages.shape == (2, 4, 1, 584)
    assert pages.stride(0) == 2880  # 4 * 584 = 2336, padded to a multiple of 576
    for block in range(2):
        parts = [encode(row, 448, 64, e8m0=True) for row in rows[block, :, 0].tolist()]
        expected = b"".join(latent + rope for latent, _, rope in parts)
        expected += b"".join(scales + b"\0" for _, scales, _ in parts)
        assert memory_of(pages, block) == expected


def test_pages_of_64_have_the_published_sizes() -> None:
    assert {form.name: (form.row_bytes, form.page_bytes()) for form in FORMATS.values()} == {
        "fp8_ds_mla": (656, 64 * 656),
        "model1": (584, 37440),
        "v4.1": (528, 64 * 528),
        "flat": (576, 64 * 576),
        "fp8_token": (644, 64 * 644),
    }
    assert MODEL1.empty(3).stride() == (37440, 584, 584, 1)


def test_scale_is_the_exact_power_of_two_for_every_bf16_amax() -> None:
    amax = torch.arange(0, 0x7F80, dtype=torch.int16).view(torch.bfloat16)  # each finite non-negative BF16
    amax = amax[amax <= 2.0**120]
    rows = torch.zeros(1, amax.numel(), 1, 512, dtype=torch.bfloat16)
    rows[0, :, 0, 0] = amax
    exponents = V41.quantise(rows).view(torch.uint8)[0, :, 0, 512]
    mantissa, exponent = torch.frexp((amax.double() / 448).clamp_min(1e-4))
    assert torch.equal(exponents.int(), exponent - (mantissa == 0.5).int() + 127)


@pytest.mark.parametrize("form", STORED_SCALES, ids=lambda form: form.name)
@settings(deadline=None, max_examples=20)
@given(seed=st.integers(0, 2**31))
def test_round_trip_bounds(form: RowFormat, seed: int) -> None:
    """e4m3 keeps 3 mantissa bits: half a step is |x|/16, and under the least normal number scale * 2^-10."""
    rows = latents(form, blocks=1, page=16, seed=seed)
    back = form.dequantise(form.quantise(rows))
    assert back.dtype == torch.bfloat16
    assert torch.equal(back[..., form.quantised :], rows[..., form.quantised :])
    x, y = (t[..., : form.quantised].double().unflatten(-1, (-1, form.tile)) for t in (rows, back))
    scale = 2 * (x.abs().amax(-1, keepdim=True) / 448).clamp_min(1e-4)
    assert ((x - y).abs() <= torch.maximum(x.abs() / 16, scale * 2.0**-10)).all()
    assert torch.equal(form.dequantise(form.quantise(back)), back)  # what was stored once is stored exactly


def test_flat_rows_have_one_factor_and_saturate() -> None:
    rows = latents(FLAT, page=8)
    pages = FLAT.quantise(rows, descale=0.5)
    assert pages.shape == (2, 8, 1, 576)
    back = FLAT.dequantise(pages, descale=0.5)
    inside = rows.abs() <= 224
    assert not inside.all()
    error = (rows.float() - back.float()).abs()
    assert (error[inside] <= torch.maximum(rows.float().abs() / 16, torch.tensor(2.0**-11))[inside]).all()
    assert torch.equal(back[~inside].abs(), torch.full_like(back[~inside], 224))
    assert torch.equal(FLAT.dequantise(pages).float() / 2, back.float())
    expected = bytes(e4m3_byte(max(-448.0, min(448.0, x / 0.5))) for x in rows[1].flatten().tolist())
    assert memory_of(pages, 1) == expected


@formats
@settings(deadline=None, max_examples=15)
@given(data=st.data())
def test_append_writes_the_named_slots_alone(form: RowFormat, data: st.DataObject) -> None:
    blocks, page = 3, 8
    slots = data.draw(st.lists(st.integers(0, blocks * page - 1), unique=True, max_size=12))
    dropped = data.draw(st.integers(0, 3))
    order = data.draw(st.permutations([*slots, *[-1 - i for i in range(dropped)]]))
    pages = form.empty(blocks, page)
    pages.view(torch.uint8).fill_(0xA5)
    before = [bytearray(memory_of(pages, block)) for block in range(blocks)]
    rows = latents(form, 1, len(order) or 1)[0, : len(order), 0]
    form.append(pages, torch.tensor(order, dtype=torch.int32), rows[:, :-64], rows[:, -64:])

    whole = torch.zeros(blocks * page, form.head_dim, dtype=torch.bfloat16)
    kept = [(slot, i) for i, slot in enumerate(order) if slot >= 0]
    for slot, i in kept:
        whole[slot] = rows[i]
    expected = form.quantise(whole.view(blocks, page, 1, -1))
    if kept:
        read = form.read(pages, torch.tensor([slot for slot, _ in kept]))
        assert torch.equal(read, form.dequantise(expected).view(blocks * page, -1)[[slot for slot, _ in kept]])
    data_bytes = form.quantised + 2 * form.rope
    for block in range(blocks):
        wanted, source = before[block], memory_of(expected, block)
        for slot, _ in kept:
            if slot // page == block:
                offset = slot % page
                if form.page_split:
                    spans = [
                        (offset * data_bytes, data_bytes),
                        (page * data_bytes + offset * form.scale_bytes, form.scale_bytes),
                    ]
                else:
                    spans = [(offset * form.row_bytes, form.row_bytes)]
                for start, size in spans:
                    wanted[start : start + size] = source[start : start + size]
        assert memory_of(pages, block) == bytes(wanted)


@formats
def test_append_without_a_look_at_values_drops_what_lies_outside(form: RowFormat) -> None:
    rows = latents(form, 1, 4)[0, :, 0]
    pages, wanted = (form.empty(2, 8).view(torch.uint8) for _ in range(2))
    for memory in (pages, wanted):
        memory.untyped_storage().fill_(0xA5)
    form.append(wanted, torch.tensor([15, 3]), rows[[0, 2], :-64], rows[[0, 2], -64:])
    form.append(pages, torch.tensor([15, 16, 3, 2**40]), rows[:, :-64], rows[:, -64:], check_values=False)
    assert [memory_of(pages, block) for block in range(2)] == [memory_of(wanted, block) for block in range(2)]


def test_read_takes_any_shape_of_slots() -> None:
    rows = latents(MODEL1)
    pages = MODEL1.quantise(rows)
    slots = torch.tensor([[[5, 127], [64, -1]]])
    back = MODEL1.dequantise(pages).view(-1, 512)
    assert torch.equal(MODEL1.read(pages, slots), back[torch.tensor([[[5, 127], [64, 0]]])])


def test_scales_that_are_no_power_of_two_are_read_as_they_are() -> None:
    pages = FP8_DS_MLA.quantise(latents(FP8_DS_MLA, page=4))  # vLLM stores amax / 448 itself
    pages.view(torch.uint8)[..., 512:528] = torch.full((4,), 0.3).view(torch.uint8)
    stored = pages[..., :512].float()
    assert torch.equal(FP8_DS_MLA.dequantise(pages)[..., :512], (stored * torch.tensor(0.3)).bfloat16())


@formats
def test_other_bytes_are_refused(form: RowFormat) -> None:
    pages = form.empty(2)
    other = next(one for one in FORMATS.values() if one is not form)
    with pytest.raises(ShapeError):
        form.dequantise(other.empty(2))
    with pytest.raises(ShapeError):
        form.dequantise(pages[:, :, 0])
    with pytest.raises(DTypeError):
        form.check(torch.empty(2, 64, 1, form.row_bytes, dtype=torch.bfloat16))
    with pytest.raises(LayoutError):
        form.check(pages[:, ::2])
    row = torch.zeros(1, form.head_dim, dtype=torch.bfloat16)
    before = [memory_of(pages, block) for block in range(2)]
    for error, slots, one in [
        (BlockTableError, torch.tensor([128]), row),
        (ShapeError, torch.tensor([1, 2]), row),
        (ShapeError, torch.tensor([1]), row.float()),
        (ShapeError, torch.tensor([1]), row[:, 1:]),
    ]:
        with pytest.raises(error, match=r"(?s)given:.*required:.*cause:.*fix:"):
            form.append(pages, slots, one[:, :-64], one[:, -64:])
    assert [memory_of(pages, block) for block in range(2)] == before


def test_model1_pages_without_their_padding_are_refused() -> None:
    packed = torch.empty(2, 64, 1, 584, dtype=torch.uint8)
    with pytest.raises(LayoutError, match="37440"):
        MODEL1.check(packed)
    MODEL1.check(packed[:1])


@formats
def test_rows_begin_on_their_widest_number(form: RowFormat) -> None:
    """A GPU cannot load a scale or a rope that lies across it; bytes alone may lie anywhere."""
    pitch = form.page_bytes(4) + form.page_multiple * form.unit
    for start in range(8):
        memory = torch.zeros(8 + 2 * pitch, dtype=torch.uint8)[start:][: 2 * pitch].view(2, pitch)
        pages = memory[:, : 4 * form.row_bytes].view(2, 4, 1, form.row_bytes)
        if start % form.unit:
            with pytest.raises(LayoutError, match=f"begin on {form.unit} bytes"):
                form.dequantise(pages)
        else:
            assert form.dequantise(pages).abs().max() == 0
    if form.unit > 1:
        odd = torch.zeros(3, pitch + 1, dtype=torch.uint8)[:, : 4 * form.row_bytes].view(3, 4, 1, form.row_bytes)
        with pytest.raises(LayoutError, match="bytes apart"):
            form.dequantise(odd)


def test_a_factor_for_rows_that_store_scales_is_refused() -> None:
    with pytest.raises(ShapeError):
        V41.quantise(latents(V41), descale=2.0)
    with pytest.raises(ShapeError):
        FLAT.quantise(latents(FLAT), descale=torch.ones(2))


@settings(deadline=None)
@given(
    per_head=st.booleans(),
    seed=st.integers(0, 2**31),
    exponent=st.integers(-20, 20),
    dtype=st.sampled_from([torch.bfloat16, torch.float32]),
)
def test_tensor_factors_round_trip(per_head: bool, seed: int, exponent: int, dtype: torch.dtype) -> None:
    x = torch.randn(2, 3, 5, 8, generator=torch.Generator().manual_seed(seed))
    x = (x * torch.tensor([1.0, 1e-3, 1e3])[:, None, None] * 2.0**exponent).to(dtype)
    stored, descale = quantise(x, per_head=per_head)
    assert stored.dtype == FP8
    assert descale.shape == ((2, 3) if per_head else ())
    amax = x.float().abs().amax(dim=(2, 3)) if per_head else x.float().abs().max()
    assert torch.equal(descale, amax / 448)
    real = dequantise(stored, descale, torch.float32)
    step = descale[..., None, None] if per_head else descale
    assert ((x.float() - real).abs() <= torch.maximum(x.float().abs() / 15.9, step * 2.0**-10)).all()


def test_given_factors_broadcast_saturate_and_keep_nan() -> None:
    x = torch.tensor([1.0, 1e4, -1e4, float("nan")]).expand(2, 3, 1, 4)
    factors = torch.tensor([1.0, 0.5, 2.0])
    stored, descale = quantise(x, factors)
    assert torch.equal(descale, factors)
    assert stored[1, :, 0].float()[:, :3].tolist() == [[1, 448, -448], [2, 448, -448], [0.5, 448, -448]]
    assert stored.float().isnan().sum() == 6
    assert dequantise(stored, factors[None], torch.float32)[0, :, 0, :3].tolist() == [
        [1, 448, -448],
        [1, 224, -224],
        [1, 896, -896],
    ]
    zero, descale = quantise(torch.zeros(1, 1, 2, 2))
    assert zero.float().abs().max() == 0
    assert descale > 0


@pytest.mark.parametrize("special", [math.inf, -math.inf, math.nan])
@pytest.mark.parametrize("per_head", [False, True])
def test_one_special_value_leaves_the_others_alone(special: float, per_head: bool) -> None:
    x = torch.randn(2, 3, 4, 8)
    x[1, 2, 3, 7] = 0.0
    want, factor = quantise(x, per_head=per_head)
    x[1, 2, 3, 7] = special
    stored, got = quantise(x, per_head=per_head)
    assert torch.equal(got, factor)
    others = x.isfinite()
    assert torch.equal(stored.float()[others], want.float()[others])
    value = stored[1, 2, 3, 7].item()
    assert math.isnan(value) if math.isnan(special) else value == math.copysign(448, special)


@pytest.mark.parametrize("fmt", FORMATS.values(), ids=FORMATS)
def test_a_row_format_saturates_infinity(fmt) -> None:
    rows = torch.randn(1, 4, 1, fmt.head_dim).bfloat16()
    factor = 0.02 if fmt.name == "flat" else None
    want = fmt.dequantise(fmt.quantise(rows, factor), factor)
    rows[0, 2, 0, 5] = math.inf
    got = fmt.dequantise(fmt.quantise(rows, factor), factor)
    others = torch.ones_like(rows, dtype=torch.bool)
    others[0, 2, 0, 5] = False
    assert torch.equal(got[others], want[others])
    assert got[0, 2, 0, 5].isfinite()


def test_nothing_has_a_factor_too() -> None:
    for size in ((2, 3, 0, 8), (0, 3, 4), (2, 3, 0)):
        for per_head in (False, True):
            stored, factor = quantise(torch.empty(size), per_head=per_head)
            assert stored.shape == size
            assert (factor > 0).all()


@pytest.mark.parametrize(
    ("change", "error"),
    [
        ({"slots": [0]}, ShapeError),
        ({"slots": torch.zeros(1)}, DTypeError),
        ({"slots": torch.zeros(2, dtype=torch.int64)}, ShapeError),
        ({"k_nope": [1]}, ShapeError),
        ({"k_rope": torch.zeros(2, 64, dtype=torch.bfloat16)}, ShapeError),
        ({"pages": [1]}, ShapeError),
        ({"slots": torch.zeros(1, dtype=torch.int64, device="meta")}, DeviceError),
    ],
)
def test_append_refuses(change: dict, error: type) -> None:
    fmt = FORMATS["fp8_ds_mla"]
    pages = fmt.quantise(torch.randn(1, 4, 1, 576).bfloat16())
    before = pages.view(torch.uint8).clone()
    rows = torch.randn(1, 576).bfloat16()
    call = {
        "pages": pages,
        "slots": torch.zeros(1, dtype=torch.int64),
        "k_nope": rows[:, :512],
        "k_rope": rows[:, 512:],
    }
    with pytest.raises(error):
        fmt.append(**call | change)
    assert torch.equal(pages.view(torch.uint8), before)


# --- What is no row, slot or factor ----------------------------------------------------------------------------------


@formats
def test_a_slot_past_the_pages_is_no_row(form: RowFormat) -> None:
    pages = form.quantise(torch.randn(2, 64, 1, form.head_dim).bfloat16())
    for slot in (128, 2**40):
        with pytest.raises(BlockTableError, match="slot"):
            form.read(pages, torch.tensor([0, slot]))
    for slot in (0, -1):
        with pytest.raises(BlockTableError, match="slot"):
            form.read(pages[:0], torch.tensor([slot]))
    assert torch.equal(form.read(pages, torch.tensor([-7])), form.read(pages, torch.tensor([0])))


@formats
def test_rows_may_lie_anywhere(form: RowFormat) -> None:
    rows = torch.randn(2, 64, 1, form.head_dim).bfloat16()
    want = form.quantise(rows).view(torch.uint8)
    assert torch.equal(form.quantise(torch.stack([rows, rows], -1)[..., 0]).view(torch.uint8), want)
    one = form.quantise(rows[:1].expand(2, -1, -1, -1)).view(torch.uint8)
    assert torch.equal(one[0], one[1])


@pytest.mark.parametrize("descale", [0.0, -1.0, math.nan, math.inf])
def test_no_value_is_divided_by_what_is_no_factor(descale: float) -> None:
    rows = torch.randn(1, 64, 1, 576).bfloat16()
    pages = FLAT.quantise(rows)
    before = pages.view(torch.uint8).clone()
    slots, parts = torch.tensor([3]), rows[0, :1, 0].split([512, 64], -1)
    for call in (
        lambda: quantise(rows, descale),
        lambda: FLAT.quantise(rows, descale),
        lambda: FLAT.append(pages, slots, *parts, descale),
    ):
        with pytest.raises(ShapeError, match="descale"):
            call()
    assert torch.equal(pages.view(torch.uint8), before)


@pytest.mark.parametrize("dtype", [torch.int32, torch.bool, torch.float64, torch.complex64, torch.float8_e4m3fn])
def test_only_floats_that_are_not_fp8_yet_are_quantised(dtype: torch.dtype) -> None:
    with pytest.raises(DTypeError, match=str(dtype)):
        quantise(torch.ones(2, 3, 4).to(dtype))


def test_a_factor_a_head_needs_heads() -> None:
    assert quantise(torch.randn(2, 3), per_head=True)[1].shape == (2, 3)
    with pytest.raises(DTypeError, match="per_head"):
        quantise(torch.randn(3), per_head=True)
