"""Every refusal: its class, its four printed parts, and that nothing was written."""

from __future__ import annotations

import re

import pytest
import torch

import flash_mla
from flash_mla import (
    BlockCountError,
    BlockSparseLayout,
    BlockTableError,
    DeviceError,
    DTypeError,
    FlashMLAError,
    HeadGroupingError,
    LayoutError,
    MaskShapeError,
    SequenceLengthError,
    ShapeError,
    deepseek,
    flash_mla_prefill,
    flash_mla_with_kvcache,
    get_mla_metadata,
    mha_fwd_kvcache,
)
from flash_mla.merge import apply_sink
from flash_mla.mla import MLAProjection
from flash_mla.problem import FP8
from flash_mla.quant import FP8_TOKEN
from flash_mla.reference import decode_reference
from flash_mla.testing import DecodeCase, MhaCase, PrefillCase, nan_filled, storage_bytes

# The fixes of the reference's table, word for word.
REGROUP = "Adjust q reshape or head-splitting for MLA"
BLOCKS = "Update block_table or cache allocation"
REPACK = "Call `.contiguous()` or re-pack before kernel call"
PAD = "Pad mask or recompute with correct seq length"
GROW = "Grow cache or truncate sequence"
CAST = "Cast consistently to FP8/BF16/FP16"


def decode():
    """B 2, Hq 4, Hk 2, S_q 1, D 64, Nblk 4, lengths 130 and 70."""
    return DecodeCase("refused", (130, 70)).call().arguments


def prefill():
    """B 2, Hq 4, Hk 2, P 100, D 64."""
    return PrefillCase("refused", 100).call().arguments


def mha():
    """B 2, H 2, P 100, D 64, Nblk 3."""
    return MhaCase("refused", 100).call().arguments


def zeros(*shape, dtype=torch.bfloat16):
    return torch.zeros(*shape, dtype=dtype)


def index(*values, dtype=torch.int32):
    return torch.tensor(values, dtype=dtype)


def with_entry(x, row, column, value):
    table = x["block_table"].clone()
    table[row, column] = value
    return {"block_table": table}


def turned(x, name, a, b):
    """The tensor with dims a and b swapped in memory, its shape as it was."""
    return {name: x[name].transpose(a, b).contiguous().transpose(a, b)}


def serving_pool(x, name):
    """The view of an engine's [num_blocks, 64, Hk, D]."""
    B, Hk, Nblk, _, D = x[name].shape
    return {name: zeros(Nblk, 64, Hk, D).permute(2, 0, 1, 3).expand(B, -1, -1, -1, -1)}


# (id, function, what to change, error, text of `given` or `cause`, fix or None)
REFUSALS = [
    # the rows of the reference's table
    ("grouping", "decode", lambda x: {"q": zeros(2, 5, 1, 64)}, HeadGroupingError, "Hq = 5", REGROUP),
    ("grouping-fewer", "decode", lambda x: {"q": zeros(2, 1, 1, 64)}, HeadGroupingError, "Hq = 1", REGROUP),
    ("grouping", "prefill", lambda x: {"q": zeros(2, 3, 100, 64)}, HeadGroupingError, "Hq = 3", REGROUP),
    ("table-short", "decode", lambda x: {"block_table": index([0, 1], [0, 1])}, BlockCountError, "130", BLOCKS),
    ("table-short", "mha", lambda x: {"block_table": index([0], [0])}, BlockCountError, "P = 100", BLOCKS),
    (
        "cache-short",
        "mha",
        lambda x: {n: zeros(2, 2, 1, 64, 64) for n in ("k_cache", "v_cache")},
        BlockCountError,
        "Nblk = 1",
        BLOCKS,
    ),
    ("inner-dims", "decode", lambda x: turned(x, "k_cache", 3, 4), LayoutError, "k_cache", REPACK),
    ("inner-dims-v", "decode", lambda x: turned(x, "v_cache", 3, 4), LayoutError, "v_cache", REPACK),
    ("inner-dims", "prefill", lambda x: turned(x, "k", 2, 3), LayoutError, "k", REPACK),
    ("inner-dims", "mha", lambda x: turned(x, "v_cache", 3, 4), LayoutError, "v_cache", REPACK),
    ("mask-short", "decode", lambda x: {"mask": zeros(2, 1, 1, 129)}, MaskShapeError, "129", PAD),
    ("mask-short", "prefill", lambda x: {"attn_mask": zeros(2, 1, 100, 99)}, MaskShapeError, "99", PAD),
    ("mask-short", "mha", lambda x: {"attn_mask": zeros(2, 1, 100, 99)}, MaskShapeError, "99", PAD),
    (
        "mask-short-chunk",
        "mha",
        lambda x: {"attn_mask": zeros(2, 1, 100, 110), "start_pos": index(11, 0)},
        MaskShapeError,
        "110",
        PAD,
    ),
    ("too-long", "decode", lambda x: {"seq_lens": index(257, 1)}, SequenceLengthError, "257", GROW),
    ("too-long", "mha", lambda x: {"start_pos": index(0, 93)}, SequenceLengthError, "193", GROW),
    ("mixed-k", "decode", lambda x: {"k_cache": x["k_cache"].half()}, DTypeError, "float16", CAST),
    ("mixed-v", "decode", lambda x: {"v_cache": x["v_cache"].half()}, DTypeError, "float16", CAST),
    ("mixed-q", "prefill", lambda x: {"q": x["q"].float()}, DTypeError, "float32", CAST),
    ("mixed-cache", "mha", lambda x: {"k_cache": x["k_cache"].half()}, DTypeError, "float16", CAST),
    ("mixed-rows", "mha", lambda x: {"k": x["k"].half()}, DTypeError, "float16", CAST),
    # blocks
    (
        "block-size",
        "decode",
        lambda x: {n: zeros(2, 2, 8, 32, 64) for n in ("k_cache", "v_cache")},
        BlockCountError,
        "32 tokens",
        None,
    ),
    (
        "block-size",
        "mha",
        lambda x: {n: zeros(2, 2, 8, 128, 64) for n in ("k_cache", "v_cache")},
        BlockCountError,
        "128 tokens",
        None,
    ),
    ("entry-past-end", "decode", lambda x: with_entry(x, 0, 2, 4), BlockTableError, "block_table[0, 2] = 4", None),
    ("entry-negative", "decode", lambda x: with_entry(x, 1, 1, -1), BlockTableError, "block_table[1, 1] = -1", None),
    ("entry-huge", "decode", lambda x: with_entry(x, 1, 0, 2**31 - 1), BlockTableError, "2147483647", None),
    ("entry-past-end", "mha", lambda x: with_entry(x, 1, 1, 3), BlockTableError, "block_table[1, 1] = 3", None),
    ("entry-negative", "mha", lambda x: with_entry(x, 0, 0, -5), BlockTableError, "block_table[0, 0] = -5", None),
    ("length-negative", "decode", lambda x: {"seq_lens": index(3, -1)}, SequenceLengthError, "seq_lens[1] = -1", None),
    ("length-negative", "prefill", lambda x: {"seq_lens": index(3, -1)}, SequenceLengthError, "-1", None),
    ("length-too-long", "prefill", lambda x: {"seq_lens": index(3, 101)}, SequenceLengthError, "101", None),
    ("start-negative", "mha", lambda x: {"start_pos": index(-1, 0)}, SequenceLengthError, "-1", None),
    # layout
    ("q-strided", "decode", lambda x: turned({"q": zeros(2, 4, 2, 64)}, "q", 1, 2), LayoutError, "q", None),
    ("table-strided", "decode", lambda x: turned(x, "block_table", 0, 1), LayoutError, "block_table", None),
    ("table-strided", "mha", lambda x: turned(x, "block_table", 0, 1), LayoutError, "block_table", None),
    ("heads-outside", "decode", lambda x: turned(x, "k_cache", 0, 1), LayoutError, "dim Hk has stride", None),
    ("blocks-outside", "decode", lambda x: turned(x, "v_cache", 1, 2), LayoutError, "dim Nblk has stride", None),
    ("serving-pool", "decode", lambda x: serving_pool(x, "k_cache"), LayoutError, "k_cache", REPACK),
    ("serving-pool", "mha", lambda x: serving_pool(x, "v_cache"), LayoutError, "v_cache", REPACK),
    (
        "v-not-first-columns",
        "decode",
        lambda x: {"v_cache": x["k_cache"][..., 16:48]},
        LayoutError,
        "v_cache",
        REPACK,
    ),
    ("last-dim-strided", "decode", lambda x: {"k_cache": zeros(2, 2, 4, 64, 128)[..., ::2]}, LayoutError, "D", REPACK),
    ("last-dim-strided", "prefill", lambda x: {"q": zeros(2, 4, 100, 128)[..., ::2]}, LayoutError, "q", REPACK),
    ("tokens-outside", "prefill", lambda x: turned(x, "q", 1, 2), LayoutError, "non-monotonic", None),
    ("tokens-outside", "mha", lambda x: turned(x, "q", 1, 2), LayoutError, "non-monotonic", None),
    ("rows-strided", "mha", lambda x: turned(x, "k", 2, 3), LayoutError, "k", REPACK),
    ("out-strided", "decode", lambda x: {"out": zeros(2, 4, 1, 128)[..., ::2]}, LayoutError, "out", None),
    ("out-strided", "prefill", lambda x: turned({"out": zeros(2, 4, 100, 64)}, "out", 1, 2), LayoutError, "out", None),
    # masks and block layouts
    ("mask-int", "decode", lambda x: {"mask": zeros(2, 1, 1, 130, dtype=torch.int32)}, MaskShapeError, "int32", None),
    ("mask-2d", "decode", lambda x: {"mask": zeros(2, 130)}, MaskShapeError, "4 dims", None),
    ("mask-batch", "decode", lambda x: {"mask": zeros(3, 1, 1, 130)}, MaskShapeError, "B dim 3", None),
    ("mask-heads", "decode", lambda x: {"mask": zeros(2, 2, 1, 130)}, MaskShapeError, "Hq dim 2", None),
    ("mask-rows", "decode", lambda x: {"mask": zeros(2, 1, 2, 130)}, MaskShapeError, "query dim 2", None),
    ("mask-rows", "prefill", lambda x: {"attn_mask": zeros(2, 1, 64, 100)}, MaskShapeError, "query dim 64", None),
    ("mask-int", "mha", lambda x: {"attn_mask": zeros(2, 1, 100, 100, dtype=torch.uint8)}, MaskShapeError, "", None),
    (
        "sparse-blocks",
        "prefill",
        lambda x: {"sparse_layout": BlockSparseLayout.causal(200)},
        MaskShapeError,
        "P = 100",
        None,
    ),
    ("sparse-dtype", "prefill", lambda x: {"sparse_layout": zeros(1, 1, 2, 2)}, MaskShapeError, "bfloat16", None),
    (
        "sparse-heads",
        "prefill",
        lambda x: {"sparse_layout": zeros(1, 2, 2, 2, dtype=torch.bool)},
        MaskShapeError,
        "[1, 2, 2, 2]",
        None,
    ),
    ("sparse-type", "prefill", lambda x: {"sparse_layout": "causal"}, FlashMLAError, "sparse_layout", None),
    # dtypes
    (
        "double",
        "decode",
        lambda x: {n: x[n].double() for n in ("q", "k_cache", "v_cache")},
        DTypeError,
        "float64",
        None,
    ),
    ("double", "prefill", lambda x: {n: x[n].double() for n in ("q", "k", "v")}, DTypeError, "float64", None),
    (
        "e5m2",
        "decode",
        lambda x: {n: x[n].to(torch.float8_e5m2) for n in ("q", "k_cache", "v_cache")},
        DTypeError,
        "e5m2",
        None,
    ),
    ("lengths-float", "decode", lambda x: {"seq_lens": x["seq_lens"].float()}, DTypeError, "seq_lens", None),
    ("lengths-int16", "decode", lambda x: {"seq_lens": x["seq_lens"].short()}, DTypeError, "int16", None),
    ("table-float", "decode", lambda x: {"block_table": x["block_table"].float()}, DTypeError, "block_table", None),
    ("start-float", "mha", lambda x: {"start_pos": zeros(2)}, DTypeError, "start_pos", None),
    ("out-dtype", "decode", lambda x: {"out": zeros(2, 4, 1, 64).float()}, DTypeError, "out", None),
    ("out-dtype", "prefill", lambda x: {"out": zeros(2, 4, 100, 64).half()}, DTypeError, "out", None),
    (
        "out-in-cache",
        "decode",
        lambda x: {"out": x["k_cache"].view(-1)[: 2 * 4 * 64].view(2, 4, 1, 64)},
        LayoutError,
        "`out` overlaps `k_cache`",
        None,
    ),
    ("out-is-q", "prefill", lambda x: {"out": x["q"]}, LayoutError, "`out` overlaps `q`", None),
    ("descale-dtype", "decode", lambda x: {"k_descale": zeros(2, 2)}, DTypeError, "k_descale", None),
    ("sink-dtype", "decode", lambda x: {"attn_sink": zeros(4)}, FlashMLAError, "attn_sink", None),
    # devices
    ("cache-elsewhere", "decode", lambda x: {"k_cache": x["k_cache"].to("meta")}, DeviceError, "k_cache on meta", None),
    ("lengths-elsewhere", "decode", lambda x: {"seq_lens": x["seq_lens"].to("meta")}, DeviceError, "seq_lens", None),
    (
        "table-elsewhere",
        "mha",
        lambda x: {"block_table": x["block_table"].to("meta")},
        DeviceError,
        "block_table",
        None,
    ),
    ("v-elsewhere", "prefill", lambda x: {"v": x["v"].to("meta")}, DeviceError, "v on meta", None),
    ("rows-elsewhere", "mha", lambda x: {"k": x["k"].to("meta")}, DeviceError, "k on meta", None),
    ("out-elsewhere", "decode", lambda x: {"out": zeros(2, 4, 1, 64).to("meta")}, DeviceError, "out on meta", None),
    (
        "descale-elsewhere",
        "decode",
        lambda x: {"v_descale": torch.ones(2, 2, device="meta")},
        DeviceError,
        "v_descale",
        None,
    ),
    ("sink-elsewhere", "decode", lambda x: {"attn_sink": torch.ones(4, device="meta")}, DeviceError, "sink", None),
    ("backend-hopper", "decode", lambda x: {"backend": "hopper"}, DeviceError, "hopper", None),
    ("backend-triton", "prefill", lambda x: {"backend": "triton"}, DeviceError, "triton", None),
    ("backend-unknown", "decode", lambda x: {"backend": "cuda"}, DeviceError, "cuda", None),
    # every other shape
    ("q-3d", "decode", lambda x: {"q": zeros(2, 4, 64)}, ShapeError, "3 dims", None),
    ("q-3d", "prefill", lambda x: {"q": zeros(2, 4, 64)}, ShapeError, "3 dims", None),
    ("k-cache-4d", "decode", lambda x: {"k_cache": zeros(2, 2, 256, 64)}, ShapeError, "4 dims", None),
    ("k-cache-4d", "mha", lambda x: {"k_cache": zeros(2, 2, 256, 64)}, ShapeError, "4 dims", None),
    ("head-dim", "decode", lambda x: {"q": zeros(2, 4, 1, 72)}, ShapeError, "D", None),
    ("batch", "decode", lambda x: {"q": zeros(3, 4, 1, 64)}, ShapeError, "B", None),
    ("v-blocks", "decode", lambda x: {"v_cache": zeros(2, 2, 5, 64, 64)}, ShapeError, "v_cache", None),
    ("v-tokens", "prefill", lambda x: {"v": zeros(2, 2, 99, 64)}, ShapeError, "v", None),
    ("k-tokens", "prefill", lambda x: {"k": zeros(2, 2, 101, 64)}, ShapeError, "k", None),
    ("lengths-shape", "decode", lambda x: {"seq_lens": index(1, 2, 3)}, ShapeError, "seq_lens", None),
    ("lengths-2d", "decode", lambda x: {"seq_lens": index([1], [2])}, ShapeError, "seq_lens", None),
    ("table-1d", "decode", lambda x: {"block_table": index(0, 1, 2)}, ShapeError, "block_table", None),
    ("table-batch", "decode", lambda x: {"block_table": index([0, 1, 2])}, ShapeError, "block_table", None),
    ("table-1d", "mha", lambda x: {"block_table": index(0, 1, 2)}, ShapeError, "block_table", None),
    ("lengths-shape", "prefill", lambda x: {"seq_lens": index(1)}, ShapeError, "seq_lens", None),
    ("start-shape", "mha", lambda x: {"start_pos": index(1)}, ShapeError, "start_pos", None),
    ("rows-shape", "mha", lambda x: {"k": zeros(2, 2, 99, 64)}, ShapeError, "k", None),
    ("rows-half", "mha", lambda x: {"v": None}, ShapeError, "v omitted", None),
    ("out-shape", "decode", lambda x: {"out": zeros(2, 4, 64)}, ShapeError, "out", None),
    ("out-shape", "mha", lambda x: {"out": zeros(2, 2, 100, 72)}, ShapeError, "out", None),
    ("descale-shape", "decode", lambda x: {"q_descale": torch.ones(2, 3)}, ShapeError, "q_descale", None),
    ("descale-shape", "prefill", lambda x: {"v_descale": torch.ones(1, 1, 1)}, ShapeError, "v_descale", None),
    ("sink-shape", "decode", lambda x: {"attn_sink": torch.ones(2)}, ShapeError, "attn_sink", None),
    ("q-list", "decode", lambda x: {"q": [1.0]}, ShapeError, "q", None),
    ("table-list", "decode", lambda x: {"block_table": [[0, 1, 2], [0, 1, 2]]}, ShapeError, "block_table", None),
    ("lengths-list", "decode", lambda x: {"seq_lens": [130, 70]}, ShapeError, "seq_lens", None),
    ("mask-list", "decode", lambda x: {"mask": [True]}, FlashMLAError, "mask", None),
    ("k-none", "prefill", lambda x: {"k": None}, ShapeError, "k", None),
    ("v-cache-none", "mha", lambda x: {"v_cache": None}, ShapeError, "v_cache", None),
    *(
        (
            f"dim-{D}",
            "prefill",
            lambda x, D=D: {"q": zeros(2, 4, 100, D), "k": zeros(2, 2, 100, D)},
            ShapeError,
            f"D = {D}",
            None,
        )
        for D in (4, 12, 584)
    ),
    (
        "latent-written",
        "mha",
        lambda x: {"v_cache": x["k_cache"]},
        ShapeError,
        "view of k_cache",
        None,
    ),
    # mha is MHA
    (
        "grouped",
        "mha",
        lambda x: {"q": zeros(2, 4, 100, 64)},
        HeadGroupingError,
        "q has 4 heads",
        "Use flash_mla_prefill for grouped-query attention",
    ),
]

FUNCTIONS = {
    "decode": (flash_mla_with_kvcache, decode),
    "prefill": (flash_mla_prefill, prefill),
    "mha": (mha_fwd_kvcache, mha),
}


def assert_legible(error):
    """All four parts are there, as attributes and in the text, each on its line."""
    lines = str(error).strip().splitlines()
    labels = ("given", "required", "cause", "fix")
    assert [line.strip().split(":")[0] for line in lines] == list(labels)
    for label, line in zip(labels, lines, strict=True):
        part = getattr(error, label)
        assert len(part) > 3, label
        assert line.endswith(part)
    assert isinstance(error, ValueError)


@pytest.mark.parametrize(
    ("function", "change", "kind", "text", "fix"),
    [row[1:] for row in REFUSALS],
    ids=[f"{row[1]}-{row[0]}" for row in REFUSALS],
)
def test_refusal(function, change, kind, text, fix):
    call, build = FUNCTIONS[function]
    arguments = build()
    rows = arguments["q"].shape[:3]
    v = arguments["v"] if function == "prefill" else arguments["v_cache"]
    arguments["out"] = nan_filled((*rows, v.shape[-1]), torch.bfloat16, "cpu")
    arguments.update(change(arguments))
    if "out" not in change(arguments) and isinstance(arguments["q"], torch.Tensor) and arguments["q"].dim() == 4:
        arguments["out"] = nan_filled((*arguments["q"].shape[:3], 64), arguments["q"].dtype, "cpu")
    before = {n: storage_bytes(t) for n, t in arguments.items() if isinstance(t, torch.Tensor) and not t.is_meta}
    with pytest.raises(kind) as caught:
        call(**arguments)
    error = caught.value
    assert_legible(error)
    assert text in error.given + error.cause
    if fix is not None:
        assert error.fix == fix
    for name, content in before.items():
        assert torch.equal(content, storage_bytes(arguments[name])), f"the refused call wrote to {name}"


METADATA_REFUSALS = [
    ("grouping", lambda x: {"q_shape": (2, 5, 1, 64)}, HeadGroupingError, "Hq = 5", REGROUP),
    ("block-size", lambda x: {"kv_shape": (2, 2, 4, 32, 64)}, BlockCountError, "32", None),
    ("table-short", lambda x: {"block_table": index([0], [0])}, BlockCountError, "130", BLOCKS),
    ("too-long", lambda x: {"seq_lens": index(257, 0)}, SequenceLengthError, "257", GROW),
    ("negative", lambda x: {"seq_lens": index(0, -7)}, SequenceLengthError, "-7", None),
    ("entry", lambda x: with_entry(x, 0, 0, 9), BlockTableError, "block_table[0, 0] = 9", None),
    ("table-strided", lambda x: turned(x, "block_table", 0, 1), LayoutError, "block_table", None),
    ("lengths-dtype", lambda x: {"seq_lens": zeros(2)}, DTypeError, "seq_lens", None),
    ("device", lambda x: {"seq_lens": index(1, 1).to("meta")}, DeviceError, "seq_lens", None),
    ("q-3d", lambda x: {"q_shape": (2, 4, 64)}, ShapeError, "3 dims", None),
    ("kv-4d", lambda x: {"kv_shape": (2, 2, 256, 64)}, ShapeError, "4 dims", None),
    ("batch", lambda x: {"kv_shape": (3, 2, 4, 64, 64)}, ShapeError, "B", None),
    ("head-dim", lambda x: {"kv_shape": (2, 2, 4, 64, 72)}, ShapeError, "D", None),
    ("v-head-dim", lambda x: {"v_head_dim": 12}, ShapeError, "12", None),
    ("lengths-shape", lambda x: {"seq_lens": index(1)}, ShapeError, "seq_lens", None),
    ("q-tensor", lambda x: {"q_shape": zeros(2, 4, 1, 64)}, ShapeError, "q_shape", None),
]


def metadata_arguments():
    x = decode()
    return {
        "q_shape": tuple(x["q"].shape),
        "kv_shape": tuple(x["k_cache"].shape),
        "block_table": x["block_table"],
        "seq_lens": x["seq_lens"],
    }


@pytest.mark.parametrize(
    ("change", "kind", "text", "fix"),
    [row[1:] for row in METADATA_REFUSALS],
    ids=[row[0] for row in METADATA_REFUSALS],
)
def test_metadata_refusal(change, kind, text, fix):
    arguments = metadata_arguments()
    arguments.update(change(arguments))
    with pytest.raises(kind) as caught:
        get_mla_metadata(**arguments)
    assert_legible(caught.value)
    assert type(caught.value) is kind
    assert text in caught.value.given + caught.value.cause
    if fix is not None:
        assert caught.value.fix == fix


def test_metadata_says_what_it_checked():
    arguments = metadata_arguments()
    metadata = get_mla_metadata(**arguments, v_head_dim=64)
    assert metadata.q_shape == (2, 4, 1, 64)
    assert metadata.kv_shape == (2, 2, 4, 64, 64)
    assert (metadata.ratio, metadata.max_seq_len, metadata.Dv, metadata.table_blocks) == (2, 130, 64, 4)
    for part in ("B=2", "Hq=4", "Hk=2", "D=64", "Nblk=4", "max_seq_len=130"):
        assert part in repr(metadata)
    with pytest.raises(AttributeError):
        metadata.B = 3


def test_metadata_reads_no_value_when_told_not_to():
    """On meta tensors every read of a value raises."""
    arguments = metadata_arguments()
    for name in ("block_table", "seq_lens"):
        arguments[name] = arguments[name].to("meta")
    metadata = get_mla_metadata(**arguments, check_values=False)
    assert metadata.max_seq_len is None


METADATA_MISUSE = [
    ("batch", lambda: DecodeCase("", (130, 70, 3))),
    ("heads", lambda: DecodeCase("", (130, 70), Hq=8)),
    ("kv-heads", lambda: DecodeCase("", (130, 70), Hk=4)),
    ("queries", lambda: DecodeCase("", (130, 70), S_q=2)),
    ("head-dim", lambda: DecodeCase("", (130, 70), D=72)),
    ("v-head-dim", lambda: DecodeCase("", (130, 70), Dv=32)),
    ("blocks", lambda: DecodeCase("", (130, 70), spare=2)),
]


@pytest.mark.parametrize("case", [row[1] for row in METADATA_MISUSE], ids=[row[0] for row in METADATA_MISUSE])
def test_metadata_of_other_shapes(case):
    metadata = get_mla_metadata(**metadata_arguments(), v_head_dim=64)
    x = case().call().arguments
    with pytest.raises(ShapeError, match="The metadata belongs to other shapes") as caught:
        flash_mla_with_kvcache(**x, metadata=metadata)
    assert_legible(caught.value)


def test_metadata_with_a_wider_table():
    metadata = get_mla_metadata(**metadata_arguments())
    x = decode()
    x["block_table"] = torch.cat([x["block_table"], x["block_table"][:, :1]], 1).contiguous()
    with pytest.raises(ShapeError, match="The metadata belongs to other shapes"):
        flash_mla_with_kvcache(**x, metadata=metadata)


@pytest.mark.parametrize(
    ("extra", "kind"),
    [({"mask": zeros(2, 3, 1, 200)}, MaskShapeError), ({"out": zeros(2, 4, 1, 32)}, ShapeError)],
    ids=["mask", "out"],
)
def test_metadata_does_not_skip_the_shapes_of_the_rest(extra, kind):
    """Metadata vouches for what it saw: mask and out are still checked in the call."""
    metadata = get_mla_metadata(**metadata_arguments())
    with pytest.raises(kind):
        flash_mla_with_kvcache(**{**decode(), **extra}, metadata=metadata)


def test_a_mask_is_held_against_the_lengths_of_the_call():
    """With metadata no value is read: keys past a mask's end are hidden, and a mask that is long enough now serves."""
    x = DecodeCase("", (200, 130), dtype=torch.float32).call().arguments
    metadata = get_mla_metadata(x["q"].shape, x["k_cache"].shape, x["block_table"], x["seq_lens"])
    x["mask"] = torch.ones(2, 1, 1, 150, dtype=torch.bool)
    short = flash_mla_with_kvcache(**x, metadata=metadata)
    x["seq_lens"].fill_(150)
    assert torch.equal(short[0], flash_mla_with_kvcache(**x, metadata=metadata)[0])
    x["seq_lens"].fill_(60)
    x["mask"] = torch.ones(2, 1, 1, 60, dtype=torch.bool)
    want, _ = decode_reference(**x)
    torch.testing.assert_close(flash_mla_with_kvcache(**x, metadata=metadata).double(), want, rtol=1e-4, atol=1e-5)


# --- DeepSeek's order -------------------------------------------------------------------------------------------------

Q = torch.zeros(2, 1, 16, 576, dtype=torch.bfloat16)  # [B, S_q, Hq, D]
POOL = torch.zeros(8, 64, 1, 576, dtype=torch.bfloat16)  # [num_blocks, 64, Hk, D]
TABLE = torch.zeros(2, 4, dtype=torch.int32)
LENGTHS = torch.ones(2, dtype=torch.int32)

DEEPSEEK_CALLS = {
    "decode": lambda: flash_mla_with_kvcache(Q, POOL, TABLE, LENGTHS, 512, object(), None),
    "decode-splits": lambda: flash_mla_with_kvcache(Q, POOL, TABLE, LENGTHS, 512, TABLE, LENGTHS, 0.1),
    "decode-causal": lambda: flash_mla_with_kvcache(Q, POOL, TABLE, LENGTHS, 512, object(), None, causal=True),
    "decode-sparse": lambda: flash_mla_with_kvcache(
        Q, POOL, None, None, 512, object(), None, is_fp8_kvcache=True, indices=TABLE[:, None]
    ),
    "decode-names": lambda: flash_mla_with_kvcache(
        q=Q,
        k_cache=POOL,
        block_table=TABLE,
        cache_seqlens=LENGTHS,
        head_dim_v=512,
        tile_scheduler_metadata=object(),
    ),
    "metadata-lengths": lambda: get_mla_metadata(LENGTHS, 16, 1),
    "metadata-names": lambda: get_mla_metadata(cache_seqlens=LENGTHS, num_q_tokens_per_head_k=16, num_heads_k=1),
    "metadata-sparse": lambda: get_mla_metadata(LENGTHS, 16, 1, 16, True, 2048),
    "metadata-nothing": lambda: get_mla_metadata(),
}


@pytest.mark.parametrize("call", DEEPSEEK_CALLS.values(), ids=DEEPSEEK_CALLS)
def test_deepseeks_order(call):
    with pytest.raises(ShapeError, match=re.escape("flash_mla.deepseek")) as caught:
        call()
    assert_legible(caught.value)


def test_a_wrong_keyword_is_a_type_error():
    """A call in our order with a misspelt keyword is Python's own error, not a word about DeepSeek."""
    with pytest.raises(TypeError, match="softmax_skale"):
        flash_mla_with_kvcache(**{k: v for k, v in decode().items() if k != "softmax_scale"}, softmax_skale=1.0)


@pytest.mark.parametrize(
    ("name", "value", "fix"),
    [
        ("scale", 1.0, "softmax_scale"),
        ("causal", True, "decode is causal"),
        ("window_size", (128, 0), "mask"),
        ("softcap", 30.0, "no kernel with a soft cap"),
        ("sinks", torch.zeros(4), "attn_sink"),
    ],
)
def test_other_libraries_keywords_are_explained(name, value, fix):
    with pytest.raises(ShapeError, match=fix) as caught:
        flash_mla_with_kvcache(**decode(), **{name: value})
    assert_legible(caught.value)


def test_no_function_calls_its_own_argument_another_librarys():
    """cache_seqlens is none of the reference's arguments, and one of the drop-in's; a call over pages is told too."""
    x = decode()
    pool = x["k_cache"][0].permute(1, 2, 0, 3)
    with pytest.raises(ShapeError, match="Pass seq_lens"):
        flash_mla.decode_over_pages(x["q"], pool, pool, x["block_table"], cache_seqlens=x["seq_lens"])
    with pytest.raises(ShapeError, match="Pass causal"):
        flash_mla.flash_mla_prefill(*torch.ones(3, 1, 1, 4, 8), is_causal=True)
    with pytest.raises(TypeError, match="head_dim_v"):
        deepseek.flash_mla_with_kvcache(x["q"], pool, x["block_table"], cache_seqlens=x["seq_lens"])


# --- Legal, and easily refused by mistake -----------------------------------------------------------------------------


def test_spare_blocks_and_unused_entries_are_legal():
    x = DecodeCase("", (1, 0), spare=5).call().arguments
    assert flash_mla_with_kvcache(**x).isfinite().all()


def test_every_error_class_is_exported_and_has_its_words():
    for name in (
        "HeadGroupingError",
        "BlockCountError",
        "LayoutError",
        "MaskShapeError",
        "SequenceLengthError",
        "BlockTableError",
        "DTypeError",
        "DeviceError",
        "ShapeError",
        "CacheFullError",
    ):
        kind = getattr(flash_mla, name)
        assert issubclass(kind, FlashMLAError)
        assert_legible(kind("what was given", "what is required"))


def fault(call, kind, fix):
    return pytest.param(call, kind, fix, id=fix)


@pytest.mark.parametrize(
    ("call", "kind", "fix"),
    [
        fault(
            lambda: flash_mla.flash_mla_prefill(*torch.ones(3, 1, 1, 4, 8), out=torch.ones(1, 1, 4, 8).half()),
            flash_mla.DTypeError,
            "Pass an out of that kind",
        ),
        fault(
            lambda: apply_sink(torch.ones(1, 2, 1, 8), torch.ones(1, 2, 1), torch.ones(2, 1).to(FP8)),
            flash_mla.DTypeError,
            "attn_sink.float()",
        ),
        fault(
            lambda: FP8_TOKEN.append(
                FP8_TOKEN.empty(1), torch.tensor([64]), torch.ones(1, 512).bfloat16(), torch.ones(1, 64).bfloat16()
            ),
            flash_mla.BlockTableError,
            "block * page + offset",
        ),
        fault(lambda: flash_mla.BlockSparseLayout([[True]]), MaskShapeError, "from_dense_mask"),
        fault(
            lambda: MLAProjection(torch.ones(2, 8, 16), torch.ones(2, 8, 16), 8).absorb(torch.ones(1, 2, 1, 16).half()),
            flash_mla.DTypeError,
            "Cast one of them",
        ),
        fault(
            lambda: flash_mla.PagedKVCache(2, 1, 8, max_seq_len=64).free([1, 1]), ShapeError, "Name each request once"
        ),
        fault(
            lambda: flash_mla.PagedKVCache(2, 1, 8, max_seq_len=64, dtype=torch.int8),
            flash_mla.DTypeError,
            "Make it in the model's dtype",
        ),
    ],
)
def test_the_fix_mends_the_fault(call, kind, fix):
    """A class's own words are those of the reference's table, which a call outside of it replaces."""
    with pytest.raises(kind) as caught:
        call()
    assert fix in caught.value.fix
    assert caught.value.cause != type(caught.value).cause
