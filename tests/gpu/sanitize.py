"""Small calls of the Hopper and Triton kernels, to be run under compute-sanitizer: `make sanitize`.

    python tests/gpu/sanitize.py [mla|gqa|fp8|prefill|sparse|triton ...]

Lengths are such that segments are whole, cut and empty, and end in every part of a pair of blocks. The data are made on
the CPU, so that hardly a kernel of torch's runs beside ours. Results are held against the CPU backend: a tool that
slows the kernels down by a hundred times may show what a race does.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

import flash_mla
from flash_mla import deepseek
from flash_mla.problem import FP8
from flash_mla.quant import FORMATS

LENGTHS = [1, 700, 0, 130]


def check(name: str, call: Callable[..., Tensor], backend: str, **tensors: Tensor) -> None:
    """The same call on the GPU and on the CPU."""
    out = call(**{key: x.cuda() for key, x in tensors.items()}, backend=backend).cpu().double()
    expected = call(**tensors, backend="cpu").double()
    error = float((out - expected).abs().max() / expected.abs().max())
    print(f"{name} on {backend}: {error:.1e}", flush=True)
    assert error < 6e-2, "wrong under the tool"


def attend(q: Tensor, k: Tensor, v: Tensor | None, block_table: Tensor, seq_lens: Tensor, backend: str) -> Tensor:
    """flash_mla_with_kvcache; without v, V is the first 512 columns of K."""
    one = 1.0 if k.dtype == FP8 else None
    return flash_mla.flash_mla_with_kvcache(
        q, k, k[..., :512] if v is None else v, block_table, seq_lens, softmax_scale=q.shape[-1] ** -0.5,
        k_descale=one, v_descale=one, backend=backend,
    )  # fmt: skip


def decode(name: str, Hq: int, Hk: int, D: int, lengths: list[int], backend: str = "hopper", *, S_q: int = 1,
           dtype: torch.dtype = torch.bfloat16) -> None:  # fmt: skip
    """A decode over pages in random order: MLA where D is 576."""
    B, Nblk = len(lengths), max(lengths) // 64 + 2
    caches = {name: torch.randn(B, Hk, Nblk, 64, D).to(dtype) for name in ("k" if D == 576 else "kv")}
    call = partial(attend, v=None) if D == 576 else attend
    check(
        name, call, backend, q=torch.randn(B, Hq, S_q, D).to(dtype), **caches,
        block_table=torch.stack([torch.randperm(Nblk) for _ in lengths]).int(),
        seq_lens=torch.tensor(lengths, dtype=torch.int32),
    )  # fmt: skip


def prefill(name: str, Hq: int, Hk: int, D: int, P: int, backend: str = "hopper") -> None:
    """A causal prefill with Dv 128."""
    q, k, v = torch.randn(1, Hq, P, D), torch.randn(1, Hk, P, D), torch.randn(1, Hk, P, 128)
    check(name, flash_mla.flash_mla_prefill, backend, q=q.bfloat16(), k=k.bfloat16(), v=v.bfloat16())


def sparse(name: str, heads: int, fp8: bool) -> None:
    """192 of 256 rows, some of them missing: a decode over rows of 656 bytes, or a prefill."""
    q, rows = torch.randn(2, 1, heads, 576).bfloat16(), torch.randn(4, 64, 1, 576).bfloat16()
    indices = torch.randint(-20, 256, (2, 1, 192), dtype=torch.int32)

    def sparse_decode(q: Tensor, rows: Tensor, indices: Tensor, backend: str) -> Tensor:
        return deepseek.flash_mla_with_kvcache(
            q, rows, None, None, 512, is_fp8_kvcache=True, indices=indices, backend=backend
        )[0]

    def sparse_prefill(q: Tensor, rows: Tensor, indices: Tensor, backend: str) -> Tensor:
        return deepseek.flash_mla_sparse_fwd(q.squeeze(1), rows.view(-1, 1, 576), indices, 576**-0.5, backend=backend)[
            0
        ]

    if fp8:
        rows = FORMATS["fp8_ds_mla"].quantise(rows)
    check(name, sparse_decode if fp8 else sparse_prefill, "hopper", q=q, rows=rows, indices=indices)


def mla() -> None:
    decode("MLA, 128 heads", 128, 1, 576, LENGTHS)
    decode("MLA, 16 heads", 16, 1, 576, [65, 2000])
    decode("MLA, 128 heads, two tokens", 128, 1, 576, [200, 63], S_q=2)


def gqa() -> None:
    decode("GQA", 32, 8, 128, LENGTHS)
    decode("GQA, FP8", 32, 8, 128, [513], dtype=FP8)


def fp8() -> None:
    decode("MLA over FP8, 16 heads", 16, 1, 576, LENGTHS, dtype=FP8)
    decode("MLA over FP8, 128 heads", 128, 1, 576, [65, 400], dtype=FP8)


def prefills() -> None:
    prefill("prefill", 4, 4, 128, 300)
    prefill("prefill, GQA", 4, 2, 192, 260)


def sparses() -> None:
    sparse("sparse decode, 16 heads", 16, True)
    sparse("sparse decode, 64 heads", 64, True)
    sparse("sparse prefill, 64 heads", 64, False)


def triton() -> None:
    decode("MLA", 16, 1, 576, [65, 300], "triton")
    decode("GQA", 8, 2, 128, LENGTHS, "triton")
    prefill("prefill", 2, 2, 128, 130, "triton")


GROUPS = {"mla": mla, "gqa": gqa, "fp8": fp8, "prefill": prefills, "sparse": sparses, "triton": triton}

if __name__ == "__main__":
    torch.manual_seed(0)
    for group in sys.argv[1:] or GROUPS:
        GROUPS[group]()
