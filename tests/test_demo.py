"""The demo: its text, its table, and its verdict."""

from __future__ import annotations

import io
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")
rich_console = pytest.importorskip("rich.console")

from flash_mla.demo import PAD, TEXT, cut_prompts, demo  # noqa: E402
from flash_mla.integrations.transformers.layer import Layer  # noqa: E402


def test_demo_checks_every_token() -> None:
    console = rich_console.Console(file=io.StringIO(), width=100)
    demo(tokens=6, batch=2, console=console)
    printed = console.file.getvalue()
    assert "All 12 tokens are those of eager attention." in printed
    assert "12 of 12" in printed
    # 2 layers x (512 + 64) FP32 a token; the last token is not cached
    assert f"{(96 + 192 + 2 * 5) * 2 * 576 * 4:,} B" in printed
    assert f"{(2 + 4) * 64 * 2 * 576 * 4:,} B" in printed, "101 and 197 tokens take 2 and 4 blocks"


def test_demo_fails_when_a_token_differs(monkeypatch: pytest.MonkeyPatch) -> None:
    attend = Layer.decode

    def forgetful(layer: Layer, q: torch.Tensor, *args: Any) -> torch.Tensor:
        return attend(layer, q, *args) * 0.5

    monkeypatch.setattr(Layer, "decode", forgetful)
    with pytest.raises(SystemExit, match="tokens differ; the first is token"):
        demo(tokens=8, batch=2, console=rich_console.Console(file=io.StringIO()))


def test_prompts_are_pieces_of_the_text() -> None:
    data = TEXT.read_bytes()
    inputs = cut_prompts(data, 3, "cpu")
    kept = [ids[mask.bool()].tolist() for ids, mask in zip(*inputs.values(), strict=True)]
    assert [len(row) for row in kept] == [96, 192, 288]
    assert b"".join(map(bytes, kept)) == data[:576]
    assert (inputs["input_ids"] == PAD).sum() == 3 * 288 - 576
    with pytest.raises(SystemExit, match="has 2 bytes"):
        cut_prompts(b"ab", 3, "cpu")
