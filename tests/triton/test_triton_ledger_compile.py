"""Shared memory of every config: the ledger fits each GPU, and Triton never allocates more than the ledger says.

The first is arithmetic and covers every combination. For the second, kernels are compiled as far as Triton's
allocation, for configs with little room: those that once asked for more than an H200 has, and a seeded draw.
"""

from __future__ import annotations

import itertools
import random

import pytest
import torch

pytest.importorskip("triton")
from test_triton_compile import POINTERS, TARGETS, decode_case, decode_phase, meta, prefill_case, prefill_phase, stored
from torch import Tensor
from triton._C.libtriton import ir, nvidia, passes
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.compiler.compiler import make_backend

from flash_mla.kernels.triton import decode, prefill
from flash_mla.kernels.triton.tiles import MASK_BYTES, smem_bytes
from flash_mla.problem import FP8

pytestmark = pytest.mark.compile

GPUS = {name: target for name, target in TARGETS.items() if target.backend == "cuda"}
DTYPES = (FP8, torch.bfloat16, torch.float32)
MASKS = {"none": None, "bool": torch.bool, "float": torch.float32}


def allocated(kernel, arguments, config, target, divisible: bool) -> int:
    """Bytes of shared memory that Triton gives the kernel; `divisible`: numbers that 16 divides are known to be so."""
    signature, constants, attributes = {}, {}, {}
    for i, parameter in enumerate(kernel.params):
        name, value = parameter.name, arguments[parameter.name]
        if parameter.is_constexpr or value is None or (type(value) is int and value == 1):
            signature[name], constants[(i,)] = "constexpr", value
        elif isinstance(value, Tensor):
            signature[name], attributes[(i,)] = POINTERS[value.dtype], [["tt.divisibility", 16]]
        elif isinstance(value, float):
            signature[name] = "fp32"
        else:
            signature[name] = "i32"
            if divisible and value % 16 == 0:
                attributes[(i,)] = [["tt.divisibility", 16]]
    gpu = GPUTarget("cuda", target.arch, 32)
    compiler = make_backend(gpu)
    options = compiler.parse_options({"num_warps": config.warps, "num_stages": config.stages})
    source = ASTSource(kernel, signature, constants, attributes)
    context = ir.context()
    ir.load_dialects(context)
    compiler.load_dialects(context)
    stages = {}
    compiler.add_stages(stages, options, source.language)
    codegen = compiler.get_codegen_implementation(options)
    module = source.make_ir(gpu, options, codegen, compiler.get_module_map(), context)
    metadata = {"target": gpu, **vars(options)}
    for stage in ("ttir", "ttgir"):
        module = stages[stage](module, metadata)
    # the first passes of the stage that makes LLVM's code
    manager = ir.pass_manager(module.context)
    passes.ttgpuir.add_combine_tensor_select_and_if(manager)
    passes.ttgpuir.add_allocate_warp_groups(manager)
    passes.convert.add_scf_to_cf(manager)
    passes.gluon.add_inliner(manager)
    nvidia.passes.ttgpuir.add_allocate_shared_memory_nv(manager, target.arch, 86)
    manager.run(module, "allocate")
    return module.get_int_attr("ttg.shared")


def ledger(config, dtype, mask: str, in_place: bool) -> int:
    if getattr(config, "e4m3", False):
        return decode.e4m3_bytes(config.d_main, config.d_rest, config.dv_tile, config.stages, MASK_BYTES[mask])
    columns = (config.d_main + config.d_rest, 0 if config.reuse else config.dv_tile, config.dv_tile)
    # with exact products FP32 keeps one copy of q and the probabilities, as BF16 does
    return smem_bytes(config.tile_m, config.tile_n, *columns, dtype.itemsize, config.stages, in_place, MASK_BYTES[mask])


def decode_config(target, dtype, D, Dv, mask, *, Hq=16, Hk=1, S_q=1, alias=False):
    problem, args = decode_case(Hq=Hq, Hk=Hk, D=D, Dv=Dv, S_q=S_q, dtype=dtype, alias=alias, mask=MASKS[mask])
    return problem, decode_phase.config(problem, target).decode, args


def prefill_config(target, dtype, D, Dv, mask, *, P=4096, alias=False, paged=False, blocks=False):
    sparse = torch.bool if blocks else None
    problem, args = prefill_case(
        D=D, Dv=Dv, P=P, dtype=dtype, alias=alias, is_paged=paged, mask=MASKS[mask], block_mask=sparse
    )
    return prefill_phase.config(problem, target), args


def decode_allocated(target, dtype, D, Dv, mask, divisible, **changes) -> tuple[int, int]:
    """(what Triton allocates, what the ledger says)."""
    problem, config, args = decode_config(target, dtype, D, Dv, mask, **changes)
    args = args._replace(q_descale=None, k_descale=None, v_descale=None)
    tensors = decode_phase.tensors(config, args, meta(1, dtype=torch.float32) if config.programs else None)
    constants = decode_phase.constants(problem, config, args)
    taken = allocated(decode_phase.kernel_of(config), tensors | constants, config, target, divisible)
    return taken, ledger(config, dtype, mask, target.wgmma and config.tile_m == 64)


def prefill_allocated(target, dtype, D, Dv, mask, divisible, *, causal=True, **changes) -> tuple[int, int]:
    config, args = prefill_config(target, dtype, D, Dv, mask, **changes)
    kept = None if args.block_mask is None else meta(1, 1, 64, 64, dtype=torch.int32)
    arguments = prefill.arguments(
        config, S_kv=args.k.shape[2], q=stored(args.q, config.widen), k=stored(args.k, config.widen),
        v=stored(args.v, config.widen), block_table=args.block_table, seq_lens=args.seq_lens, start_pos=args.start_pos,
        mask=args.mask, kept=kept, num_kept=None if kept is None else kept[0], q_descale=None, k_descale=None,
        v_descale=None, attn_sink=None, softmax_scale=0.1, out=args.out, lse=args.lse, causal=causal,
    )  # fmt: skip
    taken = allocated(prefill.prefill_kernel, arguments, config, target, divisible)
    in_place = target.in_place and config.tile_m >= 64 and dtype.itemsize < 4
    return taken, ledger(config, dtype, mask, in_place)


@pytest.mark.parametrize("gpu", GPUS)
def test_every_ledger_fits(gpu: str) -> None:
    """D and Dv from 8 to 576, every dtype and mask; what does not fit is FP32 with exact products."""
    target = GPUS[gpu]
    dims = (8, 16, 24, 48, 64, 96, 128, 136, 192, 256, 264, 320, 384, 512, 520, 576)
    for D, Dv, dtype, mask in itertools.product(dims, dims, DTYPES, MASKS):
        for alias in {False, Dv <= D}:
            for Hq, S_q in ((1, 1), (16, 1), (16, 8), (128, 2)):
                _, config, _ = decode_config(target, dtype, D, Dv, mask, Hq=Hq, S_q=S_q, alias=alias)
                taken = ledger(config, dtype, mask, target.wgmma and config.tile_m == 64)
                assert taken <= target.smem or (config.precision, dtype) == ("ieee", torch.float32), (D, Dv, dtype)
            for paged, blocks in itertools.product((False, True), repeat=2):
                config, _ = prefill_config(target, dtype, D, Dv, mask, alias=alias, paged=paged, blocks=blocks, P=128)
                in_place = target.in_place and config.tile_m >= 64 and dtype.itemsize < 4
                taken = ledger(config, dtype, mask, in_place)
                assert taken <= target.smem or (config.precision, dtype) == ("ieee", torch.float32), (D, Dv, dtype)


FOUND = {
    "decode/fp32_576_128": (decode_allocated, torch.float32, 576, 128, "none", dict(S_q=8)),
    "decode/fp32_576_576": (decode_allocated, torch.float32, 576, 576, "none", dict(Hk=4, S_q=5)),
    "decode/fp8_576_576": (decode_allocated, FP8, 576, 576, "bool", dict(Hq=64, Hk=4, S_q=3)),
    "decode/bf16_256_48": (decode_allocated, torch.bfloat16, 256, 48, "float", dict(S_q=8)),
    "decode/fp32_256_512": (decode_allocated, torch.float32, 256, 512, "bool", {}),
    "prefill/fp32_192_128": (prefill_allocated, torch.float32, 192, 128, "none", dict(P=64)),
    "prefill/fp32_256_512": (prefill_allocated, torch.float32, 256, 512, "none", {}),
}
"""Calls that an H200 refused: 233,472 to 286,720 bytes asked of 232,448."""


@pytest.mark.parametrize("divisible", [True, False])
@pytest.mark.parametrize("gpu", ["sm_90", "sm_120"])
@pytest.mark.parametrize("case", FOUND)
def test_what_was_refused_fits(case: str, gpu: str, divisible: bool) -> None:
    measure, dtype, D, Dv, mask, changes = FOUND[case]
    taken, known = measure(GPUS[gpu], dtype, D, Dv, mask, divisible, **changes)
    assert taken <= known
    assert taken <= GPUS[gpu].smem


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize(("D", "Hq"), [(576, 16), (576, 32), (576, 128), (512, 128)])
def test_latents_in_fp8(D: int, Hq: int, mask: str) -> None:
    """The kernels of an FP8 latent on Hopper."""
    taken, known = decode_allocated(GPUS["sm_90"], FP8, D, 512, mask, True, Hq=Hq, alias=True)
    assert taken <= known <= GPUS["sm_90"].smem


@pytest.mark.parametrize("gpu", GPUS)
def test_the_ledger_is_the_most(gpu: str) -> None:
    draw = random.Random(gpu)
    for _ in range(6):
        dtype, D, Dv = draw.choice(DTYPES), *draw.choices((128, 192, 256, 320, 512, 576), k=2)
        mask, divisible = draw.choice([*MASKS]), draw.random() < 0.5
        if draw.random() < 0.5:
            alias = Dv <= D and draw.random() < 0.5
            changes = {"Hq": draw.choice((16, 128)), "S_q": draw.choice((1, 4)), "alias": alias}
            taken, known = decode_allocated(GPUS[gpu], dtype, D, Dv, mask, divisible, **changes)
        else:
            changes = {"causal": draw.random() < 0.5, "blocks": draw.random() < 0.3, "paged": draw.random() < 0.5}
            taken, known = prefill_allocated(GPUS[gpu], dtype, D, Dv, mask, divisible, **changes)
        assert taken <= known, (dtype, D, Dv, mask, divisible, changes)
        assert taken <= GPUS[gpu].smem, (dtype, D, Dv, mask, divisible, changes)
