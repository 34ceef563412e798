"""Ahead-of-time compiles of every kernel config that matters, for GPUs that this machine does not have.

Shared memory must fit the GPU and spills must stay few: a config that the backend chooses is one that runs. Compiling
needs no GPU; the interpreter must be off (it replaces the kernels by Python functions).
"""

from __future__ import annotations

import os
import re
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

triton = pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("the interpreter is on", allow_module_level=True)

from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource, make_backend  # noqa: E402
from triton.runtime.jit import create_function_from_signature  # noqa: E402

from flash_mla.backends.triton import append as append_phase  # noqa: E402
from flash_mla.backends.triton import decode as decode_phase  # noqa: E402
from flash_mla.backends.triton import prefill as prefill_phase  # noqa: E402
from flash_mla.backends.triton.device import stored  # noqa: E402
from flash_mla.kernels.triton import append, combine, decode, decode_latent, prefill, rows, share, sparse, tiles  # noqa: E402
from flash_mla.kernels.triton.target import Target  # noqa: E402
from flash_mla.problem import (  # noqa: E402
    FP8,
    AppendArgs,
    AppendRowsArgs,
    DecodeArgs,
    DecodeProblem,
    PrefillArgs,
    PrefillProblem,
)
from flash_mla.quant import FORMATS  # noqa: E402

pytestmark = pytest.mark.compile

KIB = 1024
TARGETS = {
    "sm_80": Target("cuda", 80, 163 * KIB, 108),
    "sm_89": Target("cuda", 89, 99 * KIB, 128),
    "sm_90": Target("cuda", 90, 227 * KIB, 132),
    "sm_100": Target("cuda", 100, 227 * KIB, 148),
    "sm_120": Target("cuda", 120, 99 * KIB, 170),
    "gfx942": Target("hip", 0, 64 * KIB, 304),
}
PINNED = triton.__version__.startswith("3.6.")
"""Whether it is the Triton of requirements-dev.txt, whose ptxas was measured; another's (`make newest`) spills more."""
MAX_STACK = 64
"""Bytes of a thread's stack that spills may take: a few scalars."""
SPILLS = {
    # on sm_90: in the epilogue, where a [64, 512] FP32 tile changes layout
    "mla_128": 1024, "page_16_mla_128": 1024, "split_mla_128": 1024, "fp8_mla_128": 768, "bf16_fp8_mla_128": 832,
    "fp8_mla_16": 352,
    "fp32_d128": 512, "d256": 320,
    # rows that do not begin on 16 bytes come through registers
    "odd_d64_32": 256,
}  # fmt: skip
"""Where more is allowed. The SASS of mla_128 on sm_90 has 6 LDL among the 74 HGMMA of its loop."""

POINTERS = {
    torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.float32: "*fp32", FP8: "*fp8e4nv", torch.uint8: "*u8",
    torch.int16: "*i16", torch.int32: "*i32", torch.int64: "*i64", torch.bool: "*i1",
}  # fmt: skip


class Built(NamedTuple):
    shared: int
    registers: int
    stack: int
    kernel: Any

    def spills_over(self, allowed: int) -> bool:
        """Whether a thread's stack is larger; the pinned Triton alone is held to it."""
        return PINNED and self.stack > allowed


def compile_for(
    kernel: Any, arguments: dict[str, Any], options: dict[str, int], target: Target, odd: Sequence[str] = ()
) -> Built:
    """Compile a kernel as a launch with these arguments would; odd: pointers that do not begin on 16 bytes."""
    signature, constants, attributes = {}, {}, {}
    assert set(arguments) == set(kernel.arg_names)
    for i, parameter in enumerate(kernel.params):
        name, value = parameter.name, arguments[parameter.name]
        if parameter.is_constexpr or value is None or (isinstance(value, int) and value == 1):
            signature[name], constants[(i,)] = "constexpr", value
        elif isinstance(value, Tensor):
            signature[name] = POINTERS[value.dtype]
            if name not in odd:
                attributes[(i,)] = [["tt.divisibility", 16]]
        elif isinstance(value, float):
            signature[name] = "fp32"
        else:
            signature[name] = "i32" if -(2**31) <= value < 2**31 else "i64"
            if value % 16 == 0:
                attributes[(i,)] = [["tt.divisibility", 16]]
    source = ASTSource(kernel, signature, constants, attributes)
    gpu = GPUTarget("hip", "gfx942", 64) if target.backend == "hip" else GPUTarget("cuda", target.arch, 32)
    built = triton.compile(source, target=gpu, options=options)
    registers, stack = resources(built, target)
    return Built(built.metadata.shared, registers, stack, built)


def resources(built: Any, target: Target) -> tuple[int, int]:
    """(registers, stack bytes) a thread."""
    if target.backend == "hip":
        text = built.asm["amdgcn"]
        find = lambda key: int(re.search(rf"\.{key}:\s+(\d+)", text).group(1))  # noqa: E731
        return find("vgpr_count"), find("private_segment_fixed_size")
    registers, stack = re.search(r"REG:(\d+) STACK:(\d+)", cuobjdump(built, "--dump-resource-usage")).groups()
    return int(registers), int(stack)


def cuobjdump(built: Any, option: str) -> str:
    """What Triton's cuobjdump says of a compiled kernel."""
    program = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(built.asm["cubin"])
        file.flush()
        return subprocess.run([program, option, file.name], capture_output=True, text=True, check=True).stdout


def unwritten_registers(sass: str) -> list[str]:
    """Instructions that read a uniform register which none before them wrote (see tiles.least_columns).

    The numbers of `gdesc[UR8]` are left out: of four registers it may leave two unused. So is what is spilled: a
    register that is set aside and filled again need not hold anything.
    """
    written: set[int] = set()
    found = []
    for instruction in re.findall(r"^\s+/\*[0-9a-f]{4,5}\*/\s+(?:@!?U?P\w+ +)?(.*?) ?;", sass, re.MULTILINE):
        name, _, rest = instruction.partition(" ")
        if name.endswith(".SPILL"):
            continue
        operands = [operand.strip() for operand in rest.split(",")]
        first = re.fullmatch(r"UR(\d+)", operands[0])
        is_written = first and re.match(r"U|R2UR|S2UR|CS2UR|LDCU|C?REDUX", name)
        read = operands[1:] if is_written else operands
        numbers = [int(n) for operand in read if "gdesc" not in operand for n in re.findall(r"UR(\d+)", operand)]
        if not written.issuperset(numbers):
            found.append(instruction)
        if is_written:
            width = 4 if ".128" in name else 2 if re.search(r"64|WIDE", name) else 1
            written |= {*range(int(first[1]), int(first[1]) + width)}
    return found


# --- Problems ---


def meta(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def decode_case(
    *, B: int = 64, Hq: int, Hk: int, D: int, Dv: int, S_q: int = 1, dtype: torch.dtype = torch.bfloat16,
    alias: bool = False, table_blocks: int = 128, mask: torch.dtype | None = None, kv_dtype: torch.dtype | None = None,
    page: int = 64, split: bool = False,
) -> tuple[DecodeProblem, DecodeArgs]:  # fmt: skip
    out_dtype = torch.bfloat16 if dtype == FP8 else dtype
    kv_dtype = kv_dtype or dtype

    def view(columns: int) -> Tensor:
        return meta(4096, page, Hk, columns, dtype=kv_dtype).permute(2, 0, 1, 3)[None].expand(B, -1, -1, -1, -1)

    k = view(Dv if split else D)
    v = k[..., :Dv] if alias else view(Dv)
    rope = view(D - Dv) if split else None
    scale = meta(B, Hk, dtype=torch.float32) if kv_dtype == FP8 else None
    args = DecodeArgs(
        q=meta(B, Hq, S_q, D, dtype=dtype), k=k, v=v, block_table=meta(B, table_blocks, dtype=torch.int32),
        seq_lens=meta(B, dtype=torch.int32),
        mask=meta(B, Hq, S_q, table_blocks * 64, dtype=mask) if mask else None,
        q_descale=scale, k_descale=scale, v_descale=scale, attn_sink=None, softmax_scale=0.1,
        out=meta(B, Hq, S_q, Dv, dtype=out_dtype), lse=meta(B, Hq, S_q, dtype=torch.float32), k_rope=rope,
    )  # fmt: skip
    problem = DecodeProblem(
        device=torch.device("meta"), dtype=dtype, kv_dtype=kv_dtype, out_dtype=out_dtype, B=B, Hq=Hq, Hk=Hk,
        S_q=S_q, D=D, Dv=Dv, Nblk=4096, table_blocks=table_blocks, q_strides=args.q.stride(), k_strides=k.stride(),
        v_strides=v.stride(), alias=alias,
        mask=MASK_KINDS[mask], descale=kv_dtype == FP8, sink=False, page=page,
        rope_strides=None if rope is None else rope.stride(),
    )  # fmt: skip
    return problem, args


def prefill_case(
    *, Hq: int = 32, Hk: int = 8, P: int = 4096, D: int, Dv: int, dtype: torch.dtype = torch.bfloat16,
    alias: bool = False, is_paged: bool = False, mask: torch.dtype | None = None, block_mask: torch.dtype | None = None,
) -> tuple[PrefillProblem, PrefillArgs]:  # fmt: skip
    B = 2
    out_dtype = torch.bfloat16 if dtype == FP8 else dtype
    if is_paged:
        k = meta(B, Hk, P // 64, 64, D, dtype=dtype)
        v = k[..., :Dv] if alias else meta(B, Hk, P // 64, 64, Dv, dtype=dtype)
    else:
        k = meta(B, P, Hk, D, dtype=dtype).transpose(1, 2)
        v = k[..., :Dv] if alias else meta(B, P, Hk, Dv, dtype=dtype).transpose(1, 2)
    scale = meta(B, Hk, dtype=torch.float32) if dtype == FP8 else None
    ints = meta(B, dtype=torch.int32)
    args = PrefillArgs(
        q=meta(B, P, Hq, D, dtype=dtype).transpose(1, 2), k=k, v=v,
        block_table=meta(B, P // 64, dtype=torch.int32) if is_paged else None, seq_lens=ints if is_paged else None,
        start_pos=ints if is_paged else None, mask=meta(B, Hq, P, P, dtype=mask) if mask else None,
        block_mask=meta(B, Hq, P // 64, P // 64, dtype=torch.bool) if block_mask else None,
        q_descale=scale, k_descale=scale, v_descale=scale, attn_sink=None, softmax_scale=0.1,
        out=meta(B, Hq, P, Dv, dtype=out_dtype), lse=meta(B, Hq, P, dtype=torch.float32),
    )  # fmt: skip
    problem = PrefillProblem(
        device=torch.device("meta"), dtype=dtype, out_dtype=out_dtype, B=B, Hq=Hq, Hk=Hk, P=P, S_kv=P, D=D, Dv=Dv,
        q_strides=args.q.stride(), k_strides=k.stride(), v_strides=v.stride(), paged=is_paged, alias=alias, causal=True,
        mask=MASK_KINDS[mask], block_mask=block_mask, seq_lens=is_paged, start_pos=is_paged,
        descale=dtype == FP8, sink=False,
    )  # fmt: skip
    return problem, args


DECODE = {
    "gqa_d64": dict(Hq=32, Hk=8, D=64, Dv=64),
    "gqa_d128": dict(Hq=32, Hk=8, D=128, Dv=128),
    "gqa_d256": dict(Hq=16, Hk=8, D=256, Dv=256),
    "mla_16": dict(Hq=16, Hk=1, D=576, Dv=512, alias=True),
    "fp8_mla_16": dict(Hq=16, Hk=1, D=576, Dv=512, alias=True, dtype=FP8),
    "mla_128": dict(Hq=128, Hk=1, D=576, Dv=512, alias=True),
    "fp8_gqa_d128": dict(Hq=32, Hk=8, D=128, Dv=128, dtype=FP8),
    "fp8_mla_128": dict(Hq=128, Hk=1, D=576, Dv=512, alias=True, dtype=FP8),
    "fp8_d64_16": dict(Hq=64, Hk=1, D=64, Dv=16, dtype=FP8),
    "fp32_d128": dict(Hq=32, Hk=8, D=128, Dv=128, dtype=torch.float32),
    "fp32_mla_16": dict(Hq=16, Hk=1, D=576, Dv=512, alias=True, dtype=torch.float32),
    "mask_d128": dict(Hq=32, Hk=8, D=128, Dv=128, mask=torch.bool),
    "mask_float_d128": dict(Hq=32, Hk=8, D=128, Dv=128, mask=torch.float32),
    "page_16_d128": dict(Hq=32, Hk=8, D=128, Dv=128, page=16),
    "page_16_mla_128": dict(Hq=128, Hk=1, D=576, Dv=512, alias=True, page=16),
    "split_mla_128": dict(Hq=128, Hk=1, D=576, Dv=512, alias=True, split=True),
    "bf16_fp8_mla_128": dict(Hq=128, Hk=1, D=576, Dv=512, alias=True, kv_dtype=FP8),
    "bf16_fp8_d128": dict(Hq=32, Hk=8, D=128, Dv=128, kv_dtype=FP8),
    "odd_d24_16": dict(Hq=32, Hk=1, D=24, Dv=16, S_q=4),
    "odd_d64_16": dict(Hq=32, Hk=1, D=64, Dv=16, S_q=4),
}
MASK_KINDS = {None: "none", torch.bool: "bool", torch.float32: "float"}
PREFILL = {
    "d64": dict(D=64, Dv=64),
    "d128": dict(D=128, Dv=128),
    "d192_128": dict(D=192, Dv=128),
    "d256": dict(D=256, Dv=256),
    "d576_512": dict(Hk=1, D=576, Dv=512, alias=True),
    "fp8_d128": dict(D=128, Dv=128, dtype=FP8),
    "fp8_d64_8": dict(D=64, Dv=8, P=100, dtype=FP8),
    "fp8_d64_32": dict(D=64, Dv=32, P=100, dtype=FP8),
    "fp8_d128_24": dict(D=128, Dv=24, P=100, dtype=FP8),
    "fp8_d96_64": dict(D=96, Dv=64, P=100, dtype=FP8),
    "paged_d128": dict(D=128, Dv=128, is_paged=True),
    "block_sparse_d128": dict(D=128, Dv=128, block_mask=True),
    "mask_d128": dict(D=128, Dv=128, mask=torch.bool),
    "mask_float_d128": dict(D=128, Dv=128, mask=torch.float32),
    "mask_float_d192_d128": dict(D=192, Dv=128, mask=torch.float32),
    "odd_d64_32": dict(D=64, Dv=32, P=100, is_paged=True),
    "odd_d128_16": dict(D=128, Dv=16, P=100, is_paged=True),
}


def odd_pointers(case: str) -> tuple[str, ...]:
    """Of a case over caches that do not begin on 16 bytes."""
    return ("k_ptr", "v_ptr") if case.startswith("odd") else ()


def build_decode(case: str, target: Target) -> tuple[decode.Config, Built]:
    problem, args = decode_case(**DECODE[case])
    config = decode_phase.config(problem, target).decode
    if config.widen and not (config.latent or config.e4m3):
        args = decode_phase.in_half(problem, args)
    tensors = decode_phase.tensors(config, args, meta(1, dtype=torch.float32))
    constants = decode_phase.constants(problem, config, args)
    options = {"num_warps": config.warps, "num_stages": config.stages}
    return config, compile_for(decode_phase.kernel_of(config), tensors | constants, options, target, odd_pointers(case))


def build_prefill(case: str, target: Target) -> tuple[prefill.Config, Built]:
    problem, args = prefill_case(**PREFILL[case])
    config = prefill_phase.config(problem, target)
    kept = meta(1, 1, 64, 64, dtype=torch.int32) if args.block_mask is not None else None
    num_kept = meta(1, 1, 64, dtype=torch.int32) if args.block_mask is not None else None
    arguments = prefill.arguments(
        config, S_kv=problem.S_kv, q=stored(args.q, config.widen), k=stored(args.k, config.widen),
        v=stored(args.v, config.widen), block_table=args.block_table, seq_lens=args.seq_lens,
        start_pos=args.start_pos, mask=args.mask, kept=kept, num_kept=num_kept, q_descale=args.q_descale,
        k_descale=args.k_descale, v_descale=args.v_descale, attn_sink=None, softmax_scale=0.1, out=args.out,
        lse=args.lse, causal=True,
    )  # fmt: skip
    options = {"num_warps": config.warps, "num_stages": config.stages}
    return config, compile_for(prefill.prefill_kernel, arguments, options, target, odd_pointers(case))


# --- Tests ---


def within(case: str, built: Built, target: Target) -> None:
    assert built.shared <= target.smem, f"{built.shared} bytes of shared memory, the GPU has {target.smem}"
    assert built.registers <= (512 if target.backend == "hip" else 255)
    allowed = SPILLS.get(case, MAX_STACK)
    assert not built.spills_over(allowed), f"{built.stack} bytes of stack, {allowed} allowed"
    if target.backend == "cuda":
        assert unwritten_registers(cuobjdump(built.kernel, "-sass")) == []


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("case", DECODE)
def test_decode_compiles(case: str, target: str) -> None:
    within(case, build_decode(case, TARGETS[target])[1], TARGETS[target])


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("case", PREFILL)
def test_prefill_compiles(case: str, target: str) -> None:
    within(case, build_prefill(case, TARGETS[target])[1], TARGETS[target])


@pytest.mark.parametrize(
    ("case", "target", "change", "expected"),
    [
        ("fp8_mla_16", "sm_90", {}, "latent"),
        ("fp8_mla_128", "sm_90", {}, "e4m3"),
        ("bf16_fp8_mla_128", "sm_90", {}, "e4m3"),
        ("fp8_mla_16", "sm_90", {"D": 512}, "latent"),
        ("fp8_mla_128", "sm_90", {"aligned": False}, "widened"),
        ("fp8_mla_16", "sm_90", {"k_strides": (0, 584 * 64, 584 * 64, 584, 1)}, "widened"),
        ("fp8_mla_16", "sm_90", {"alias": False}, "widened"),
        ("fp8_mla_16", "sm_89", {}, "widened"),
        ("fp8_mla_128", "sm_80", {}, "widened"),
        ("mla_16", "sm_90", {}, "plain"),
    ],
)
def test_what_decodes_a_latent(case: str, target: str, change: dict[str, Any], expected: str) -> None:
    problem, _ = decode_case(**DECODE[case])
    chosen = decode_phase.config(problem._replace(**change), TARGETS[target]).decode
    kind = "latent" if chosen.latent else "e4m3" if chosen.e4m3 else "widened" if chosen.widen else "plain"
    assert kind == expected
    if kind == "widened":  # 32 rows spill
        assert chosen.tile_m in (16, 64)


@pytest.mark.skipif(not PINNED, reason="the ptxas of Triton 3.9 loses no descriptor of fp8_d64_32")
@pytest.mark.parametrize("case", ["fp8_d64_32", "odd_d64_32"])
def test_a_lost_descriptor_is_seen(monkeypatch: pytest.MonkeyPatch, case: str) -> None:
    """V at its own 32 columns: the ptxas of Triton 3.6 reads a uniform register that nothing wrote."""
    monkeypatch.setattr(tiles, "least_columns", lambda itemsize, target: 16)
    monkeypatch.setattr(tiles, "least_values", lambda d_main, itemsize, target: 16)
    _, built = build_prefill(case, TARGETS["sm_90"])
    assert unwritten_registers(cuobjdump(built.kernel, "-sass"))


def build_combine(chosen: decode_phase.DecodeConfig, problem: DecodeProblem, args: DecodeArgs, on: Target) -> Built:
    """The combine of a case of 16 heads over a latent."""
    constants = combine.constants(
        chosen.combine, B=problem.B, Hk=1, capacity=64 * problem.table_blocks, S_q=1, ratio=16, Dv=512,
        out=args.out, pdl=chosen.decode.pdl, partial_rows=16, dv_tile=512,
    )  # fmt: skip
    tensors = {
        "seq_lens_ptr": args.seq_lens, "partial_ptr": meta(1, dtype=torch.float32), "sink_ptr": None,
        "out_ptr": args.out, "lse_ptr": args.lse,
    }  # fmt: skip
    return compile_for(combine.combine_kernel, tensors | constants, {"num_warps": chosen.combine.warps}, on)


@pytest.mark.parametrize("target", TARGETS)
def test_combine_and_append_compile(target: str) -> None:
    on = TARGETS[target]
    problem, args = decode_case(**DECODE["mla_16"])
    chosen = decode_phase.config(problem, on)
    within("combine", build_combine(chosen, problem, args, on), on)
    new = AppendArgs(
        meta(64, 1, 8, 576, dtype=torch.bfloat16), None, args.k, None, args.block_table, args.seq_lens, None
    )  # fmt: skip
    given = append_phase.tensors(new) | append.constants(*new[:5])
    within("append", compile_for(append.append_kernel, given, {}, on), on)


@pytest.mark.parametrize(
    ("name", "target"),
    [*(("fp8_token", target) for target in TARGETS), *((name, "sm_90") for name in FORMATS if name != "fp8_token")],
)
def test_append_of_rows_compiles(name: str, target: str) -> None:
    form, on, bf16 = FORMATS[name], TARGETS[target], torch.bfloat16
    parts = form.parts(meta(2, 64, 1, form.row_bytes, dtype=torch.uint8))
    descale = meta(1, dtype=torch.float32) if form.tile is None else None
    size = 0 if form.tile is None else form.scale_dtype.itemsize
    args = AppendRowsArgs(
        *parts, meta(8, dtype=torch.int64), meta(8, form.head_dim - 64, dtype=bf16), meta(8, 64, dtype=bf16), descale,
        form.tile or 0, size,
    )  # fmt: skip
    within("rows", compile_for(rows.append_rows_kernel, rows.arguments(**args._asdict()), {"num_warps": 1}, on), on)


def test_the_early_combine_compiles() -> None:
    """One short request on Hopper: decode releases the combine, which waits (programmatic dependent launch), its first
    program in any case."""
    on = TARGETS["sm_90"]
    problem, args = decode_case(B=1, Hq=16, Hk=1, D=576, Dv=512, alias=True, table_blocks=16)
    chosen = decode_phase.config(problem, on)
    assert chosen.decode.pdl
    DECODE["early"] = {"B": 1, "Hq": 16, "Hk": 1, "D": 576, "Dv": 512, "alias": True, "table_blocks": 16}
    assert "griddepcontrol.launch_dependents" in build_decode("early", on)[1].kernel.asm["ptx"]
    ptx = build_combine(chosen, problem, args, on).kernel.asm["ptx"]
    assert ptx.index("griddepcontrol.wait") < ptx.index("ret;")


DECODE_KERNELS = decode.decode_kernel, decode_latent.decode_latent_kernel, combine.combine_kernel


@pytest.mark.skipif(not PINNED, reason="asks Triton 3.6 what it specialises")
@pytest.mark.parametrize(
    ("kernel", "varying"),
    [
        *((kernel, share.VARYING) for kernel in DECODE_KERNELS),
        (sparse.sparse_kernel, ("tokens", "pages", "pages2")),
        (sparse.merge_kernel, ("rows", "splits")),
    ],
)
def test_a_kernel_serves_every_batch_and_table(kernel: Any, varying: tuple[str, ...]) -> None:
    """What changes while a server runs is no part of what a kernel is compiled for, but for a batch of one."""
    hopper = make_backend(GPUTarget("cuda", 90, 32))
    specialise = create_function_from_signature(kernel.signature, kernel.params, hopper)

    def key(n: int) -> list[Any]:
        return specialise(*(n if name in varying else 48 for name in kernel.arg_names))[1]

    assert key(16) == key(17) == key(2**20)
    assert key(1) != key(16)
