"""Backwards on a GPU: causal prefill's beside SDPA's over cuDNN, alternately; sparse prefill's beside its forward; that
of random blocks beside its dense one.

Each is timed twice, median milliseconds: `alone`, the GPU idle before, so that it waits for the host, and `queued`,
behind work that lets the host run ahead, as in a training step.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from flash_mla import deepseek, flash_mla_prefill

SHAPES = [(heads, P, D, Dv) for D, Dv in ((128, 128), (192, 128)) for heads in (16, 64) for P in (4096, 8192, 16384)]


def normal(*shape: int) -> Tensor:
    return torch.randn(shape, device="cuda", dtype=torch.bfloat16)


def milliseconds(call: Callable[[], object], before: Callable[[], object] | None = None) -> float:
    """One call, behind other work where there is some."""
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    if before is not None:
        before()
    begin.record()
    call()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end)


def medians(*calls: Callable[[], object], rounds: int = 10) -> list[tuple[float, float]]:
    """(alone, queued) of each call, taken in turn."""
    x = normal(8192, 8192)
    times: list[list[tuple[float, float]]] = []
    for _ in range(rounds + 2):
        times.append([(milliseconds(call), milliseconds(call, lambda: x @ x @ x)) for call in calls])
    return [
        tuple(statistics.median(column) for column in zip(*rows, strict=True)) for rows in zip(*times[2:], strict=True)
    ]


def backward(out: Tensor, leaves: list[Tensor], d_out: Tensor) -> Callable[[], object]:
    return lambda: torch.autograd.grad(out, leaves, d_out, retain_graph=True)


def dense(heads: int, P: int, D: int, Dv: int) -> None:
    leaves = [normal(1, heads, P, width).requires_grad_() for width in (D, D, Dv)]
    d_out = normal(1, heads, P, Dv)
    with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
        peer = scaled_dot_product_attention(*leaves, is_causal=True)
    ours, cudnn = medians(*(backward(out, leaves, d_out) for out in (flash_mla_prefill(*leaves), peer)))
    print(
        f"{D}/{Dv}, {heads} heads, P {P}: queued {ours[1]:.3f} ms, cuDNN {cudnn[1]:.3f}, {cudnn[1] / ours[1]:.2f}x; "
        f"alone {ours[0]:.3f}, cuDNN {cudnn[0]:.3f}, {cudnn[0] / ours[0]:.2f}x",
        flush=True,
    )


def sparse(S_kv: int, tokens: int = 4096, Hq: int = 128, D: int = 576, Dv: int = 512, topk: int = 2048) -> None:
    """Each token names topk rows at random."""
    q, kv, d_out = normal(tokens, Hq, D), normal(S_kv, 1, D), normal(tokens, Hq, Dv)
    indices = torch.stack([torch.randperm(S_kv, device="cuda")[:topk] for _ in range(tokens)])[:, None].int()

    def forward(backend: str) -> Callable[[], object]:
        return lambda: deepseek.flash_mla_sparse_fwd(q.detach(), kv.detach(), indices, D**-0.5, Dv, backend=backend)

    leaves = [q.requires_grad_(), kv.requires_grad_()]
    out, _, _ = deepseek.flash_mla_sparse_fwd(*leaves, indices, D**-0.5, Dv)
    times = medians(backward(out, leaves, d_out), forward("hopper"), forward("triton"), rounds=4)
    ours, hopper, triton = (queued for _, queued in times)
    print(
        f"sparse, {tokens} tokens, S_kv {S_kv}: backward {ours:.2f} ms, {ours / hopper:.2f} times Hopper's forward "
        f"({hopper:.2f}), {ours / triton:.2f} times Triton's ({triton:.2f})",
        flush=True,
    )


def blocks(heads: int = 32, P: int = 8192, D: int = 128) -> None:
    """A quarter of the blocks, at random, without causality."""
    leaves, d_out = [normal(1, heads, P, D).requires_grad_() for _ in range(3)], normal(1, heads, P, D)
    kept = torch.rand(1, heads, P // 64, P // 64, device="cuda") < 0.25
    kept[..., 0] = True
    outs = [flash_mla_prefill(*leaves, kept, causal=False)]
    outs += [flash_mla_prefill(*leaves, causal=False, backend=backend) for backend in ("triton", "hopper")]
    ours, triton, hopper = medians(*(backward(out, leaves, d_out) for out in outs))
    print(
        f"blocks, 25 %: queued {ours[1]:.3f} ms, dense by Triton {triton[1]:.3f}, {triton[1] / ours[1]:.2f}x, "
        f"by Hopper {hopper[1]:.3f}, {hopper[1] / ours[1]:.2f}x; alone {ours[0]:.3f}, {triton[0] / ours[0]:.2f}x, "
        f"{hopper[0] / ours[0]:.2f}x",
        flush=True,
    )


def main() -> None:
    print(torch.cuda.get_device_name(), torch.__version__, flush=True)
    for S_kv in (8192, 65536):
        sparse(S_kv)
    blocks()
    for shape in SHAPES:
        dense(*shape)


if __name__ == "__main__":
    main()
