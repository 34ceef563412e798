"""The Triton backend against a float64 oracle, on hostile data.

With TRITON_INTERPRET=1 the kernels run in Triton's interpreter on CPU tensors; without it this file needs a GPU.
"""

from __future__ import annotations

import dataclasses
import math
import os

import pytest
import torch
from torch import Tensor

from flash_mla import backends, flash_mla_prefill, flash_mla_with_kvcache, get_mla_metadata
from flash_mla.backends import triton as backend
from flash_mla.kernels.triton import combine
from flash_mla.kernels.triton import prefill as prefill_kernel
from flash_mla.kernels.triton.target import Target
from flash_mla.kernels.triton.tiles import widening
from flash_mla.problem import AppendArgs, DecodeArgs, DecodeProblem, PrefillArgs, PrefillProblem
from flash_mla.reference import decode_reference

pytestmark = pytest.mark.skipif(backend.available() is not None, reason=str(backend.available()))

INTERPRET = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = torch.device("cpu") if INTERPRET or not torch.cuda.is_available() else torch.device("cuda", 0)
FP8 = torch.float8_e4m3fn
GARBAGE = 2**31 - 1
# docs/contract.md, section 10: max error over max |out|, and cosine distance
BUDGET = {torch.float16: (2e-3, 5e-6), torch.bfloat16: (1.6e-2, 5e-6), torch.float32: (1e-5, 5e-6), FP8: (6e-2, 1e-3)}


# --- Oracle ---


def attention(q: Tensor, k: Tensor, v: Tensor, keep: Tensor, bias: Tensor | None, scale: float, sink: Tensor | None):
    """Float64 (out, lse) of q [B, Hq, M, D] over k [B, Hk, L, D] and v; keep [B, Hq, M, L] says what counts."""
    ratio = q.shape[1] // k.shape[1]
    k, v = (x.double().repeat_interleave(ratio, 1) for x in (k, v))
    scores = q.double() @ k.transpose(-1, -2) * scale
    if bias is not None:
        scores = scores + bias.double()
    scores = scores.masked_fill(~keep, -math.inf)
    lse = torch.logsumexp(scores, -1)
    out = torch.exp(scores - lse.clamp_min(-1e300)[..., None]).nan_to_num(0.0) @ v
    if sink is not None:
        out = out * torch.sigmoid(lse - sink.double()[None, :, None])[..., None]
    return out, lse


def close(out: Tensor, lse: Tensor | None, want: Tensor, want_lse: Tensor, dtype: torch.dtype) -> None:
    relative, cosine = BUDGET[dtype]
    got = out.double()
    assert torch.isfinite(got).all()
    error = (got - want).abs().max().item()
    assert error <= relative * want.abs().max().item() + 1e-30, (
        f"max error {error}, max |out| {want.abs().max().item()}"
    )
    distance = 1 - 2 * (got * want).sum() / (got.square().sum() + want.square().sum()).clamp_min(1e-300)
    assert want.abs().max() == 0 or distance.item() <= cosine, f"cosine distance {distance.item()}"
    if lse is not None:
        assert torch.equal(lse.isneginf(), want_lse.isneginf())
        seen = ~want_lse.isneginf()
        assert (lse.double() - want_lse)[seen].abs().max().item() <= 1e-4 if seen.any() else True


def poisoned(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    return torch.full(shape, math.nan, dtype=dtype, device=DEVICE)


# --- Decode ---


def paged(lengths: list[int], Hk: int, D: int, dtype: torch.dtype, layout: str, spare: int, gen: torch.Generator):
    """A page view [B, Hk, Nblk, 64, D], its table, and the rows [B, Hk, L, D] that lie in it; all else is NaN."""
    B, L = len(lengths), max(*lengths, 1)
    blocks = -(-L // 64)
    rows = torch.randn(B, Hk, blocks * 64, D, generator=gen).to(dtype)
    places = torch.Generator().manual_seed(B * blocks)  # K's and V's pages lie alike
    if layout == "slab":  # the reference's own pages for every request
        Nblk = blocks + spare
        cache = torch.full((B, Hk, Nblk, 64, D), math.nan).to(dtype)
        ids = torch.stack([torch.randperm(Nblk, generator=places)[:blocks] for _ in range(B)])
    else:  # one pool [Nblk, 64, Hk, D] that all requests share
        Nblk = B * blocks + spare
        cache = torch.full((Nblk, 64, Hk, D), math.nan).to(dtype).permute(2, 0, 1, 3)[None].expand(B, -1, -1, -1, -1)
        ids = torch.randperm(Nblk, generator=places)[: B * blocks].view(B, blocks)
    table = torch.full((B, blocks + spare), GARBAGE, dtype=torch.int32)
    for b, length in enumerate(lengths):
        used = -(-length // 64)
        table[b, :used] = ids[b, :used]
        for i in range(used):
            n = min(64, length - 64 * i)
            cache[b, :, ids[b, i], :n] = rows[b, :, 64 * i : 64 * i + n]
    return cache, table, rows[:, :, :L]


def to_device(x: Tensor) -> Tensor:
    """Moved with its strides, a broadcast batch dim included."""
    if x.device == DEVICE:
        return x
    if x.dim() == 5 and x.stride(0) == 0:
        return x[:1].to(DEVICE).expand(x.shape)
    return x.to(DEVICE)


def decode_problem(args: DecodeArgs, alias: bool) -> DecodeProblem:
    B, Hq, S_q, D = args.q.shape
    _, Hk, Nblk, _, Dv = args.v.shape
    return DecodeProblem(
        device=args.q.device, dtype=args.q.dtype, kv_dtype=args.k.dtype, out_dtype=args.out.dtype, B=B, Hq=Hq, Hk=Hk,
        S_q=S_q, D=D, Dv=Dv,
        Nblk=Nblk, table_blocks=args.block_table.shape[1], q_strides=args.q.stride(), k_strides=args.k.stride(),
        v_strides=args.v.stride(), alias=alias,
        mask="none" if args.mask is None else "float" if args.mask.is_floating_point() else "bool",
        descale=args.q_descale is not None, sink=args.attn_sink is not None,
        scale_sign=(args.softmax_scale > 0) - (args.softmax_scale < 0),
    )  # fmt: skip


def chosen(problem):
    """The module that takes the problem."""
    phase = backends.choose("triton", problem)
    assert not isinstance(phase, str), phase
    return phase


def run(problem, args) -> None:
    phase = chosen(problem)
    phase.launch(problem, phase.config(problem), args)


def run_decode(
    *, lengths: list[int], Hq: int, Hk: int, D: int, Dv: int, S_q: int = 1, dtype: torch.dtype = torch.bfloat16,
    alias: bool = False, layout: str = "slab", mask: str = "none", descale: bool = False, sink: bool = False,
    lse: bool = True, index: torch.dtype = torch.int32, spare: int = 2, seed: int = 0,
) -> None:  # fmt: skip
    gen = torch.Generator().manual_seed(seed)
    B, L = len(lengths), max(*lengths, 1)
    k, table, k_rows = paged(lengths, Hk, D, dtype, layout, spare, gen)
    if alias:
        v, v_rows = k[..., :Dv], k_rows[..., :Dv]
    else:
        v, _, v_rows = paged(lengths, Hk, Dv, dtype, layout, spare, torch.Generator().manual_seed(seed))
    q = torch.randn(B, Hq, S_q, D, generator=gen).to(dtype)
    lens = torch.tensor(lengths)
    t = torch.arange(L)
    keep = (t < lens[:, None])[:, None, None, :].expand(B, Hq, S_q, L)
    bias = tensor = None
    if mask == "none":
        keep = t[None, None, None, :] <= (lens[:, None] - S_q + torch.arange(S_q))[:, None, :, None]
        keep = keep.expand(B, Hq, S_q, L)
    elif mask == "bool":
        tensor = torch.rand(B, 1, S_q, L + 5, generator=gen) < 0.6
        tensor[0, :, 0] = False  # a row with no key
        keep = keep & tensor[..., :L]
        tensor = tensor.expand(B, Hq, S_q, L + 5)
    else:
        tensor = torch.randn(B, Hq, S_q, L, generator=gen)
        tensor[..., ::7] = -math.inf
        bias = tensor
    scales = [torch.rand(B, Hk, generator=gen) + 0.5 if descale else None for _ in range(3)]
    if descale:
        scales[1] = (torch.rand(1, 1, generator=gen) + 0.5).expand(B, Hk)
    sinks = torch.randn(Hq, generator=gen) if sink else None
    softmax_scale = D**-0.5
    deq = [
        x.double() * (1.0 if s is None else s.double()[:, :, None, None])
        for x, s in zip(
            (q.view(B, Hk, -1, D), k_rows, v_rows), scales, strict=True
        )
    ]  # fmt: skip
    dead = ~(t < lens[:, None])[:, None, :, None]
    want, want_lse = attention(
        deq[0].view(B, Hq, S_q, D), deq[1].masked_fill(dead, 0), deq[2].masked_fill(dead, 0), keep, bias, softmax_scale,
        sinks,
    )  # fmt: skip
    out_dtype = torch.bfloat16 if dtype == FP8 else dtype
    move = lambda x: None if x is None else to_device(x)  # noqa: E731
    k, q = move(k), move(q)
    args = DecodeArgs(
        q=q, k=k, v=k[..., :Dv] if alias else move(v), block_table=move(table.to(index)), seq_lens=move(lens.to(index)),
        mask=move(tensor), q_descale=move(scales[0]), k_descale=move(scales[1]), v_descale=move(scales[2]),
        attn_sink=move(sinks), softmax_scale=softmax_scale, out=poisoned((B, Hq, S_q, Dv), out_dtype),
        lse=poisoned((B, Hq, S_q), torch.float32) if lse else None,
    )  # fmt: skip
    problem = decode_problem(args, alias)
    phase = chosen(problem)
    config = phase.config(problem)
    phase.launch(problem, config, args)
    close(args.out.cpu(), None if args.lse is None else args.lse.cpu(), want, want_lse, dtype)
    first = args.out.clone()
    args.out.fill_(math.nan)
    phase.launch(problem, config, args)
    assert torch.equal(first, args.out)


BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
DECODE = {
    "gqa": dict(lengths=[200, 1, 64], Hq=8, Hk=2, D=64, Dv=64),
    "one_request_many_programs": dict(lengths=[700], Hq=4, Hk=1, D=64, Dv=64, sink=True),
    "empty_requests": dict(lengths=[0, 130, 0, 65, 0], Hq=4, Hk=2, D=64, Dv=64, dtype=FP16, sink=True),
    "all_empty": dict(lengths=[0, 0], Hq=2, Hk=1, D=32, Dv=32),
    "mla": dict(lengths=[150, 70], Hq=16, Hk=1, D=576, Dv=512, alias=True),
    "mla_queries": dict(lengths=[3, 130], Hq=24, Hk=1, D=576, Dv=512, S_q=2, alias=True, layout="pool", dtype=FP16),
    "mla_fp8": dict(lengths=[90, 33], Hq=16, Hk=1, D=576, Dv=512, alias=True, dtype=FP8, descale=True),
    "latent_narrow_v": dict(lengths=[90], Hq=4, Hk=1, D=96, Dv=32, alias=True),
    "alias_wider_than_tile": dict(lengths=[90], Hq=4, Hk=1, D=96, Dv=80, alias=True),
    "speculative": dict(lengths=[5, 190, 0], Hq=6, Hk=2, D=64, Dv=64, S_q=8, layout="pool"),
    "short_causal": dict(lengths=[2, 1], Hq=2, Hk=1, D=16, Dv=16, S_q=4, dtype=FP32),
    "mask_bool": dict(lengths=[130, 40], Hq=4, Hk=2, D=64, Dv=64, S_q=2, mask="bool", sink=True),
    "mask_float": dict(lengths=[130, 40], Hq=4, Hk=2, D=64, Dv=64, S_q=2, mask="float", dtype=FP16),
    "fp32": dict(lengths=[130, 40], Hq=4, Hk=2, D=72, Dv=40, dtype=FP32),
    "fp32_mla": dict(lengths=[70], Hq=4, Hk=1, D=576, Dv=512, dtype=FP32, alias=True),
    "fp8_gqa": dict(lengths=[130, 40], Hq=8, Hk=2, D=128, Dv=128, dtype=FP8, descale=True, sink=True),
    "odd_dims": dict(lengths=[100, 64], Hq=5, Hk=1, D=80, Dv=120, dtype=FP16, layout="pool"),
    "int64": dict(lengths=[100, 64], Hq=4, Hk=4, D=40, Dv=8, index=torch.int64, lse=False),
    "many_rows": dict(lengths=[140], Hq=40, Hk=1, D=64, Dv=64, S_q=2),
    "widest": dict(lengths=[66], Hq=2, Hk=1, D=576, Dv=576),
    "ragged": dict(lengths=[900, 1, 3, 64, 65, 127, 0, 2], Hq=2, Hk=2, D=16, Dv=16, layout="pool"),
    "more_requests_than_a_step": dict(lengths=[i % 3 for i in range(150)], Hq=1, Hk=1, D=16, Dv=16, spare=5),
}


@pytest.mark.parametrize("case", DECODE)
def test_decode(case: str) -> None:
    run_decode(**DECODE[case])


@pytest.mark.skipif(not INTERPRET, reason="a GPU has its own tiles")
@pytest.mark.parametrize("case", ["gqa", "mla", "fp8_gqa", "mla_fp8"])
@pytest.mark.parametrize("on", [Target("cuda", 80, 163 * 1024, 3), Target("hip", 0, 64 * 1024, 3)])
def test_decode_with_the_tiles_of_other_gpus(case: str, on: Target, monkeypatch: pytest.MonkeyPatch) -> None:
    """The configs that other GPUs get, FP8 by integer arithmetic on sm_80 (there in PTX) too."""
    monkeypatch.setattr("flash_mla.kernels.triton.decode.widening", lambda itemsize, on, once: widening(itemsize, on))
    monkeypatch.setattr("flash_mla.backends.triton.decode.target", lambda device: on)
    run_decode(**DECODE[case])


@pytest.mark.parametrize(("Hq", "Hk", "D", "Dv"), [(16, 1, 576, 512), (8, 2, 64, 64)])
@pytest.mark.parametrize(("dtype", "size"), [(torch.bfloat16, 3e5), (torch.float16, 1.0)])
def test_16_bit_queries_over_fp8(dtype: torch.dtype, size: float, Hq: int, Hk: int, D: int, Dv: int) -> None:
    """q is multiplied in FP16; BF16 queries beyond its range, with a scale that undoes it, are as right."""
    gen = torch.Generator().manual_seed(0)
    table, lens = torch.randperm(6, generator=gen).int().view(2, 3), torch.tensor([130, 70], dtype=torch.int32)
    k, v = (torch.randn(1, Hk, 6, 64, n, generator=gen).to(FP8).expand(2, -1, -1, -1, -1) for n in (D, Dv))
    v = k[..., :Dv] if Hk == 1 else v
    q = (torch.randn(2, Hq, 1, D, generator=gen) * size).to(dtype)
    factor = torch.rand(2, Hk, generator=gen) + 0.5
    scale = {"softmax_scale": D**-0.5 / size, "k_descale": to_device(factor), "v_descale": to_device(factor)}
    call = [to_device(x) for x in (q, k, v, table, lens)]
    out, lse = flash_mla_with_kvcache(*call, **scale, return_lse=True, backend="triton")
    want, want_lse = decode_reference(*call, **scale)
    assert out.dtype == dtype
    assert (out.double() - want).norm() < 4e-3 * want.norm()
    assert (lse - want_lse).abs().max() < 1e-4


@pytest.mark.parametrize("programs", [1, 2, 5, 11])
def test_decode_is_right_for_every_cut(programs: int) -> None:
    """Any number of programs, cuts the same requests into the same result."""
    gen = torch.Generator().manual_seed(3)
    lengths, Hq, Hk, D = [300, 0, 64, 129], 4, 2, 16
    k, table, rows = paged(lengths, Hk, D, FP32, "slab", 1, gen)
    q = torch.randn(4, Hq, 1, D, generator=gen)
    lens = torch.tensor(lengths, dtype=torch.int32)
    keep = (torch.arange(300) < lens[:, None])[:, None, None, :].expand(4, Hq, 1, 300)
    dead = ~keep[:, :1, 0, :, None]
    rows = rows.masked_fill(dead, 0)
    want, want_lse = attention(q, rows, rows, keep, None, 0.25, None)
    args = DecodeArgs(
        *map(to_device, (q, k, k, table, lens)), None, None, None, None, None, 0.25, poisoned((4, Hq, 1, D), FP32),
        poisoned((4, Hq, 1), FP32),
    )  # fmt: skip
    problem = decode_problem(args, True)
    phase = chosen(problem)
    config = phase.config(problem)._replace(combine=combine.Config(tile_s=4, tile_c=16))
    config = config._replace(decode=dataclasses.replace(config.decode, programs=programs))
    if programs == 1:
        config = config._replace(combine=None)
    phase.launch(problem, config, args)
    close(args.out.cpu(), args.lse.cpu(), want, want_lse, FP32)


@pytest.mark.parametrize("longest", [262, 2054])
def test_a_mask_of_the_lowest_value_weighs_keys_alike_over_all_cuts(longest: int) -> None:
    """finfo.min on every key of a row: the parts of many keys and of 6 count by their keys."""
    gen = torch.Generator().manual_seed(4)
    lengths, Hq, Hk, D = [longest, 70], 4, 2, 16
    k, table, rows = paged(lengths, Hk, D, FP32, "slab", 1, gen)
    q = torch.randn(2, Hq, 1, D, generator=gen)
    lens = torch.tensor(lengths, dtype=torch.int32)
    mask = torch.zeros(2, Hq, 1, longest)
    mask[0, :2] = mask[1, 3] = torch.finfo(FP32).min
    mask[0, 2] = -1e9
    bias = mask.double().masked_fill(torch.arange(longest) >= lens[:, None, None, None], -math.inf)
    values = rows.masked_fill((torch.arange(longest) >= lens[:, None])[:, None, :, None], 0)
    scores = 0.25 * q.double() @ values.double().repeat_interleave(2, 1).transpose(2, 3)
    # FP32 keeps nothing of a score beside these
    want = torch.softmax(torch.where(mask < -1.0, 0.0, scores) + bias, -1) @ values.double().repeat_interleave(2, 1)
    args = DecodeArgs(
        *map(to_device, (q, k, k, table, lens, mask)), None, None, None, None, 0.25, poisoned((2, Hq, 1, D), FP32),
        poisoned((2, Hq, 1), FP32),
    )  # fmt: skip
    problem = decode_problem(args, True)._replace(batch_invariant=longest > 2048)
    phase = chosen(problem)
    config = phase.config(problem)
    if not problem.batch_invariant:
        config = config._replace(
            decode=dataclasses.replace(config.decode, programs=5), combine=combine.Config(tile_s=4, tile_c=16)
        )
    assert config.combine is not None
    phase.launch(problem, config, args)
    torch.testing.assert_close(args.out.cpu().double(), want, rtol=0, atol=1e-5)


def test_decode_reads_only_the_cache() -> None:
    """Block ids and lengths beyond anything legal make no read outside: garbage in, but no fault and no NaN."""
    gen = torch.Generator().manual_seed(0)
    k, table, _ = paged([128, 128], 1, 16, FP32, "slab", 0, gen)
    table[0, 1], table[1, 0] = GARBAGE, -5
    lens = torch.tensor([10_000, 128], dtype=torch.int32)
    args = DecodeArgs(
        *map(to_device, (torch.randn(2, 1, 1, 16), k, k, table, lens)), None, None, None, None, None, 0.25,
        poisoned((2, 1, 1, 16), FP32), None,
    )  # fmt: skip
    problem = decode_problem(args, True)
    run(problem, args)
    assert torch.isfinite(args.out).all()


# --- Prefill ---


def prefill_problem(args: PrefillArgs, causal: bool, alias: bool) -> PrefillProblem:
    B, Hq, P, D = args.q.shape
    is_paged = args.block_table is not None
    return PrefillProblem(
        device=args.q.device, dtype=args.q.dtype, out_dtype=args.out.dtype, B=B, Hq=Hq, Hk=args.k.shape[1], P=P,
        S_kv=args.block_table.shape[1] * 64 if is_paged else args.k.shape[2], D=D, Dv=args.v.shape[-1],
        q_strides=args.q.stride(), k_strides=args.k.stride(), v_strides=args.v.stride(), paged=is_paged, alias=alias,
        causal=causal, mask="none" if args.mask is None else "float" if args.mask.is_floating_point() else "bool",
        block_mask=args.block_mask is not None, seq_lens=args.seq_lens is not None,
        start_pos=args.start_pos is not None, descale=args.q_descale is not None, sink=args.attn_sink is not None,
    )  # fmt: skip


def run_prefill(
    *, B: int = 1, Hq: int, Hk: int, P: int, D: int, Dv: int, S_kv: int | None = None, dtype: torch.dtype = BF16,
    causal: bool = True, lens: list[int] | None = None, start: list[int] | None = None, mask: str = "none",
    density: float | None = None, layout: str = "contiguous", alias: bool = False, descale: bool = False,
    sink: bool = False, shared_blocks: bool = True, seed: int = 0,
) -> None:  # fmt: skip
    gen = torch.Generator().manual_seed(seed)
    S_kv = S_kv or P
    lengths = lens or [S_kv] * B
    if layout == "contiguous":
        # [B, S, H, D] transposed, as models have it
        k = torch.randn(B, S_kv, Hk, D, generator=gen).to(dtype).transpose(1, 2)
        v = k[..., :Dv] if alias else torch.randn(B, S_kv, Hk, Dv, generator=gen).to(dtype).transpose(1, 2)
        table, k_rows, v_rows = None, k, v
        if lens:
            for b in range(B):
                k[b, :, lengths[b] :] = math.nan
                v[b, :, lengths[b] :] = math.nan
    else:
        k, table, k_rows = paged(lengths, Hk, D, dtype, layout, 1, gen)
        v, v_rows = k[..., :Dv], k_rows[..., :Dv]
        if not alias:
            v, _, v_rows = paged(lengths, Hk, Dv, dtype, layout, 1, torch.Generator().manual_seed(seed))
        S_kv = k_rows.shape[2]
    q = torch.randn(B, P, Hq, D, generator=gen).to(dtype).transpose(1, 2)
    t, p = torch.arange(S_kv), torch.arange(P)
    keep = (t < torch.tensor(lengths)[:, None])[:, None, None, :].expand(B, Hq, P, S_kv)
    if causal:
        position = torch.tensor(start or [0] * B)[:, None] + p
        keep = keep & (t <= position[:, :, None])[:, None]
    bias = tensor = block_mask = None
    if mask == "bool":
        tensor = (torch.rand(B, 1, P, S_kv, generator=gen) < 0.6).expand(B, Hq, P, S_kv)
        keep = keep & tensor
    elif mask == "float":
        tensor = bias = torch.randn(B, Hq, P, S_kv, generator=gen)
        tensor[..., ::5] = -math.inf
    if density is not None:
        shape = (1, 1) if shared_blocks else (B, Hq)
        block_mask = torch.rand(*shape, -(-P // 64), -(-S_kv // 64), generator=gen) < density
        dense = block_mask.repeat_interleave(64, 2).repeat_interleave(64, 3)[..., :P, :S_kv]
        keep = keep & dense
        block_mask = block_mask.expand(B, Hq, -1, -1)
    scales = [torch.rand(B, Hk, generator=gen) + 0.5 if descale else None for _ in range(3)]
    sinks = torch.randn(Hq, generator=gen) if sink else None
    dead = ~(t < torch.tensor(lengths)[:, None])[:, None, :, None]
    ones = torch.ones(B, Hk)
    qd, kd, vd = ((ones if s is None else s).double()[:, :, None, None] for s in scales)
    want, want_lse = attention(
        q.double() * qd.repeat_interleave(Hq // Hk, 1), (k_rows.double() * kd).masked_fill(dead, 0),
        (v_rows.double() * vd).masked_fill(dead, 0), keep, bias, D**-0.5, sinks,
    )  # fmt: skip
    move = lambda x: None if x is None else to_device(x)  # noqa: E731
    ints = lambda x: None if x is None else torch.tensor(x, dtype=torch.int32, device=DEVICE)  # noqa: E731
    k = move(k)
    args = PrefillArgs(
        q=move(q), k=k, v=k[..., :Dv] if alias else move(v), block_table=move(table),
        seq_lens=ints(lens), start_pos=ints(start), mask=move(tensor), block_mask=move(block_mask),
        q_descale=move(scales[0]), k_descale=move(scales[1]), v_descale=move(scales[2]), attn_sink=move(sinks),
        softmax_scale=D**-0.5, out=poisoned((B, Hq, P, Dv), BF16 if dtype == FP8 else dtype),
        lse=poisoned((B, Hq, P), FP32),
    )  # fmt: skip
    problem = prefill_problem(args, causal, alias)
    run(problem, args)
    close(args.out.cpu(), args.lse.cpu(), want, want_lse, dtype)


PREFILL = {
    "causal": dict(B=2, Hq=4, Hk=2, P=150, D=64, Dv=64),
    "full": dict(Hq=2, Hk=2, P=100, D=64, Dv=64, causal=False, dtype=FP16, sink=True),
    "one_token": dict(Hq=2, Hk=1, P=1, D=64, Dv=64),
    "lengths": dict(B=2, Hq=2, Hk=1, P=90, D=64, Dv=64, causal=False, lens=[70, 0]),
    "cross": dict(Hq=2, Hk=1, P=33, S_kv=150, D=64, Dv=64, causal=False),
    "mask_bool": dict(Hq=2, Hk=1, P=100, D=64, Dv=64, causal=False, mask="bool"),
    "mask_bool_causal": dict(Hq=2, Hk=1, P=100, D=64, Dv=64, mask="bool", dtype=FP16),
    "mask_float": dict(Hq=2, Hk=1, P=100, D=64, Dv=64, causal=False, mask="float"),
    "block_sparse": dict(B=2, Hq=2, Hk=1, P=260, D=32, Dv=32, causal=False, density=0.4),
    "block_sparse_heads": dict(B=2, Hq=2, Hk=1, P=260, D=32, Dv=32, density=0.5, shared_blocks=False),
    "block_sparse_lengths": dict(B=2, Hq=2, Hk=2, P=200, D=32, Dv=32, density=0.5, lens=[150, 64], causal=False),
    "block_sparse_mask": dict(Hq=2, Hk=2, P=140, D=32, Dv=32, density=0.5, mask="bool", causal=False),
    "paged": dict(B=2, Hq=2, Hk=2, P=90, D=64, Dv=64, layout="slab", lens=[90, 90]),
    "chunked": dict(B=2, Hq=4, Hk=2, P=40, D=64, Dv=64, layout="pool", lens=[110, 40], start=[70, 0]),
    "chunked_blocks": dict(Hq=2, Hk=2, P=64, D=32, Dv=32, layout="slab", lens=[192], start=[128], density=0.6),
    "mla": dict(Hq=4, Hk=1, P=80, D=576, Dv=512, alias=True),
    "mla_paged": dict(Hq=2, Hk=1, P=30, D=576, Dv=512, alias=True, layout="pool", lens=[94], start=[64], dtype=FP16),
    "d192": dict(Hq=2, Hk=2, P=80, D=192, Dv=128),
    "d256": dict(Hq=2, Hk=2, P=80, D=256, Dv=256, dtype=FP16),
    "fp8": dict(Hq=2, Hk=2, P=80, D=128, Dv=128, dtype=FP8, descale=True),
    "fp8_paged": dict(Hq=2, Hk=2, P=80, D=64, Dv=64, dtype=FP8, descale=True, layout="slab", sink=True),
    "fp32": dict(Hq=2, Hk=1, P=70, D=72, Dv=40, dtype=FP32),
}


@pytest.mark.parametrize("case", PREFILL)
def test_prefill(case: str) -> None:
    run_prefill(**PREFILL[case])


def test_prefill_loads_no_false_block() -> None:
    """K and V of the blocks that the layout leaves out are NaN, and no NaN comes out."""
    q, k, v = (torch.randn(1, 1, 192, 16, device=DEVICE) for _ in range(3))
    kept = torch.tensor([[1, 0, 0], [0, 1, 0], [1, 0, 0]], dtype=torch.bool, device=DEVICE)
    k[:, :, 128:] = math.nan
    v[:, :, 128:] = math.nan
    out = poisoned((1, 1, 192, 16), FP32)
    args = PrefillArgs(
        q, k, v, None, None, None, None, kept.expand(1, 1, 3, 3), None, None, None, None, 0.25, out, None
    )
    problem = prefill_problem(args, False, False)
    run(problem, args)
    assert torch.isfinite(out).all()


# --- Append ---


@pytest.mark.parametrize(
    ("dtype", "latent", "layout"), [(BF16, False, "slab"), (FP8, False, "pool"), (FP16, True, "pool")]
)
def test_append(dtype: torch.dtype, latent: bool, layout: str) -> None:
    """Rows land at their positions and every other byte of the caches stays."""
    gen = torch.Generator().manual_seed(1)
    B, Hk, P, D, Dv = 2, 1 if latent else 2, 70, 72 if latent else 40, 24
    starts, counts = [10, 60], [70, 33]
    k_cache, table, _ = paged([150, 150], Hk, D, dtype, layout, 1, gen)
    v_cache, _, _ = paged([150, 150], Hk, Dv, dtype, layout, 1, torch.Generator().manual_seed(1))
    table[1, 1] = GARBAGE  # positions 64.. of request 1 have no block: dropped
    k = torch.randn(B, P, Hk, D, generator=gen).to(dtype).transpose(1, 2)
    v = torch.randn(B, P, Hk, Dv, generator=gen).to(dtype).transpose(1, 2)
    want_k, want_v = k_cache.clone(), v_cache.clone()
    if layout == "pool":  # clone expands the shared pool: write through its one batch entry
        want_k, want_v = (x[:1].expand(x.shape) for x in (want_k, want_v))
    for b in range(B):
        for i in range(counts[b]):
            block, slot = table[b, (starts[b] + i) // 64], (starts[b] + i) % 64
            if block != GARBAGE:
                want_k[b, :, block, slot] = k[b, :, i]
                want_v[b, :, block, slot] = v[b, :, i]
    k_cache, v_cache = to_device(k_cache), to_device(v_cache)
    ints = lambda x: torch.tensor(x, dtype=torch.int32, device=DEVICE)  # noqa: E731
    backends.append(
        "triton",
        AppendArgs(
            to_device(k),
            None if latent else to_device(v),
            k_cache,
            None if latent else v_cache,
            to_device(table),
            ints(starts),
            ints(counts),
        ),
    )
    raw = {FP8: torch.uint8}.get(dtype, torch.int16)
    assert torch.equal(k_cache.cpu().view(raw), want_k.view(raw))
    if not latent:
        assert torch.equal(v_cache.cpu().view(raw), want_v.view(raw))


# --- Addresses ---


def sparse_storage(numel: int, dtype: torch.dtype) -> Tensor:
    """A tensor of many elements of which only the touched pages take memory (an anonymous mapping on the CPU)."""
    return torch.empty(numel, dtype=dtype, device=DEVICE)


@pytest.mark.parametrize("which", ["block", "head", "batch"])
def test_decode_addresses_above_2_31_elements(which: str) -> None:
    """Each stride of the page view in turn puts the data more than 2^31 elements from the base."""
    D, far = 16, 2**31 + 64 * 16
    storage = sparse_storage(2 * far + 4096, FP16)
    shape = (2, 2, 3, 64, D)
    near = {
        "block": (128 * 16, 64 * 16, far),
        "head": (3 * 64 * 16, far, 64 * 16),
        "batch": (far, 3 * 64 * 16, 64 * 16),
    }
    strides = (*near[which], D, 1)
    view = storage.as_strided(shape, strides)
    gen = torch.Generator().manual_seed(0)
    rows = torch.randn(2, 2, 64, D, generator=gen).to(FP16)
    table = torch.tensor([[2], [2]] if which == "block" else [[0], [1]], dtype=torch.int32)
    lens = torch.tensor([64, 64], dtype=torch.int32)
    q = torch.randn(2, 2, 1, D, generator=gen).to(FP16)
    if which == "block":  # the requests' and heads' blocks overlap nowhere but lie far from the base
        table = torch.tensor([[2], [1]], dtype=torch.int32)
    for b in range(2):
        view[b, :, table[b, 0]] = to_device(rows[b])
    args = DecodeArgs(
        *map(to_device, (q, view, view, table, lens)), None, None, None, None, None, 0.25,
        poisoned((2, 2, 1, D), FP16), poisoned((2, 2, 1), FP32),
    )  # fmt: skip
    problem = decode_problem(args, True)
    run(problem, args)
    want, want_lse = attention(q, rows, rows, torch.ones(2, 2, 1, 64, dtype=torch.bool), None, 0.25, None)
    close(args.out.cpu(), args.lse.cpu(), want, want_lse, FP16)


# --- Refusals ---


def test_refuses_with_a_reason() -> None:
    k = torch.empty(1, 1, 1, 64, 20, device=DEVICE, dtype=FP16)
    q = torch.empty(1, 1, 1, 20, device=DEVICE, dtype=FP16)
    ints = torch.zeros(1, 1, dtype=torch.int32, device=DEVICE)
    args = DecodeArgs(q, k, k, ints, ints[0], None, None, None, None, None, 1.0, q, None)
    problem = decode_problem(args, True)
    assert "multiple of 8" in str(backends.choose("triton", problem))
    assert "tensors are on" in str(
        backends.choose("triton", problem._replace(D=16, Dv=16, device=torch.device("meta")))
    )
    problem = problem._replace(D=16, Dv=16)
    for page, stride in ((64, 2**25), (256, 2**23)):
        for far, beyond in ((stride, False), (stride + 8, True)):
            spread = problem._replace(page=page, k_strides=(*problem.k_strides[:3], far, 1))
            assert ("elements apart" in str(backends.choose("triton", spread))) == beyond


def test_a_refused_config_gives_way_to_a_smaller_one(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A device that takes no more than two stages: reported once, then the smaller config is launched at once."""
    from triton.runtime.errors import OutOfResources

    from flash_mla.backends.triton import device, prefill

    tried = []

    def launch(problem, config, args):
        tried.append(config.stages)
        if config.stages > 2:
            raise OutOfResources(300000, 232448, "shared memory")

    monkeypatch.setattr(prefill, "launch_config", launch)
    monkeypatch.setattr(device, "SMALLER", {})
    problem = type("Problem", (), {"device": torch.device("cpu")})()
    config = prefill_kernel.config(
        P=64, D=64, Dv=64, paged=False, alias=False, mask=0, block_mask=False, itemsize=2,
        target=Target("cuda", 90, 227 * 1024, 132),
    )  # fmt: skip
    assert config.stages == 3
    prefill.launch(problem, config, None)
    prefill.launch(problem, config, None)
    assert tried == [3, 2, 2]
    assert len(caplog.messages) == 1
    assert "in place of" in caplog.text


@pytest.mark.parametrize("value", [torch.finfo(torch.float32).min, -3e38, -1e30])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_finite_mask_hides_nothing(value: float, dtype: torch.dtype) -> None:
    """Rows masked by the lowest number throughout attend to all of their keys alike; -inf still hides."""
    q, k, v = (torch.randn(1, 1, 20, 16) for _ in range(3))
    mask = torch.full((1, 1, 20, 20), value, dtype=dtype)
    mask[..., 10:] = -math.inf
    out, lse = flash_mla_prefill(q, k, v, attn_mask=mask, return_lse=True, backend="triton")
    assert lse.isfinite().all()
    assert (out - v[:, :, :10].mean(2, keepdim=True)).abs().max() < 1e-5


@pytest.mark.parametrize("length", [2**32 + 3, 2**40, 2**31 + 1])
def test_long_lengths_are_clamped_before_they_are_narrowed(length: int) -> None:
    q, cache = torch.randn(2, 1, 1, 16), torch.randn(2, 1, 2, 64, 16)
    table, lengths = torch.arange(2).repeat(2, 1), torch.tensor([128, 128])
    metadata = get_mla_metadata(q.shape, cache.shape, table, lengths)
    want = flash_mla_with_kvcache(q, cache, cache, table, lengths, backend="triton")
    lengths[0], lengths[1] = length, -length
    out = flash_mla_with_kvcache(q, cache, cache, table, lengths, metadata=metadata, backend="triton")
    assert torch.equal(out[0], want[0])
    assert (out[1] == 0).all()
