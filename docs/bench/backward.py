"""The backward of causal prefill on a GPU beside SDPA's over cuDNN, alternately, and that of sparse prefill beside its
forward: median milliseconds and the ratio."""

from __future__ import annotations

import statistics

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from flash_mla import deepseek, flash_mla_prefill

SHAPES = [(heads, P, D, Dv) for D, Dv in ((128, 128), (192, 128)) for heads in (16, 64) for P in (4096, 8192, 16384)]


def milliseconds(out: torch.Tensor, leaves: list[torch.Tensor], d_out: torch.Tensor) -> float:
    """One backward."""
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    torch.autograd.grad(out, leaves, d_out, retain_graph=True)
    end.record()
    torch.cuda.synchronize()
    return begin.elapsed_time(end)


def sparse(S_kv: int, tokens: int = 4096, Hq: int = 128, D: int = 576, Dv: int = 512, topk: int = 2048) -> None:
    """Each token names topk rows at random."""
    q, kv, d_out = (
        torch.randn(shape, device="cuda", dtype=torch.bfloat16)
        for shape in ((tokens, Hq, D), (S_kv, 1, D), (tokens, Hq, Dv))
    )
    indices = torch.stack([torch.randperm(S_kv, device="cuda")[:topk] for _ in range(tokens)])[:, None].int()
    leaves = [q.requires_grad_(), kv.requires_grad_()]
    forward, backward = [], []
    for _ in range(7):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        out, _, _ = deepseek.flash_mla_sparse_fwd(q, kv, indices, D**-0.5, Dv)
        end.record()
        torch.cuda.synchronize()
        forward.append(begin.elapsed_time(end))
        backward.append(milliseconds(out, leaves, d_out))
    one, other = statistics.median(forward[2:]), statistics.median(backward[2:])
    print(f"sparse, {tokens} tokens, S_kv {S_kv}: forward {one:.3f} ms, backward {other:.3f} ms, {other / one:.2f}x")


def main() -> None:
    print(torch.cuda.get_device_name(), torch.__version__)
    for S_kv in (8192, 65536):
        sparse(S_kv)
    for heads, P, D, Dv in SHAPES:
        leaves = [
            torch.randn(1, heads, P, width, device="cuda", dtype=torch.bfloat16, requires_grad=True)
            for width in (D, D, Dv)
        ]
        d_out = torch.randn(1, heads, P, Dv, device="cuda", dtype=torch.bfloat16)
        ours = flash_mla_prefill(*leaves)
        with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
            peer = scaled_dot_product_attention(*leaves, is_causal=True)
        times = [[milliseconds(out, leaves, d_out) for out in (ours, peer)] for _ in range(12)][2:]
        one, other = (statistics.median(row[i] for row in times) for i in (0, 1))
        print(f"{heads} heads, P {P}, {D}/{Dv}: {one:.3f} ms, cuDNN {other:.3f} ms, {other / one:.2f}x")


if __name__ == "__main__":
    main()
