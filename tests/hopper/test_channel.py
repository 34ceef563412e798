"""A channel whose roles do not add up does not compile: the message has the arithmetic. No GPU, no DSL kernel."""

from __future__ import annotations

import importlib.util

import pytest

if importlib.util.find_spec("cutlass") is None:
    pytest.skip("nvidia-cutlass-dsl is not installed", allow_module_level=True)

from flash_mla.kernels.hopper.channel import Channel


def channel(**counts: int) -> Channel:
    """Four stages; pointers as integers, which arithmetic takes alike."""
    return Channel.over("K", 0, 4, **counts)  # type: ignore[arg-type]


def test_counts_that_add_up() -> None:
    k = channel(readers=8, cluster=2)
    k.written_by("producer")
    k.read_by("warpgroup 0", 4, stages=(0, 2))
    k.read_by("warpgroup 1", 4, stages=(1, 3))
    k.check()


def test_several_producers() -> None:
    k = channel(readers=8, writers=1 + 2 * 32)
    k.written_by("TMA warp")
    k.written_by("gathering warps", 2 * 32)
    k.read_by("consumers", 8)
    k.check()


def test_a_role_twice_counts_once() -> None:
    """A role that is traced twice, in two branches, is one role."""
    k = channel(readers=4)
    for _ in range(2):
        k.written_by("producer")
        k.read_by("consumers", 4)
    k.check()


@pytest.mark.parametrize(
    ("writers", "readers", "words"),
    [
        (2, 4, "`full` of stage 0 waits for 2 arrivals a round, its roles make 1 (producer) = 1"),
        (1, 8, "`empty` of stage 0 waits for 8 arrivals a round, its roles make 4 (consumers) = 4"),
        (1, 0, "`empty` of stage 0 waits for 0 arrivals a round, its roles make 4 (consumers) = 4"),
    ],
)
def test_counts_that_do_not(writers: int, readers: int, words: str) -> None:
    k = channel(readers=readers, writers=writers)
    k.written_by("producer")
    k.read_by("consumers", 4)
    with pytest.raises(ValueError, match="channel K") as raised:
        k.check()
    assert words in str(raised.value)


def test_a_stage_that_nobody_frees() -> None:
    k = channel(readers=8, cluster=2)
    k.written_by("producer")
    k.read_by("warpgroup 0", 4, stages=(0, 2))
    with pytest.raises(ValueError, match="stage 1 waits for 8 arrivals a round, its roles make nobody = 0, in 2 CTAs"):
        k.check()
