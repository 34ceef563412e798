"""Products of BF16 pairs (AVX512-BF16, NEON, AMX): their code for processors that have them, and their layouts here.

No processor is needed: what an instruction computes is written out by `written`, in FP32, and the kernels that the
generator makes for it run as they are otherwise: same lanes, same tiles, same places in memory.
"""

from __future__ import annotations

import functools
import re
from dataclasses import replace

import llvmlite.binding as llvm
import pytest

from flash_mla.kernels.cpu import config, store
from flash_mla.kernels.cpu.config import Spec, Target
from flash_mla.kernels.cpu.formats import round_bf16
from flash_mla.kernels.cpu.ir import F32, I32, POINTER, Value, vector
from flash_mla.kernels.cpu.pairs import Pairs, beside
from flash_mla.kernels.cpu.tiles import SIDE, Tiles
from flash_mla.plan import plan
from flash_mla.testing import DecodeCase, PrefillCase, run

AVX512 = "+avx512f,+avx512bw,+avx512vl,+avx512bf16,+avx2,+fma,+f16c"
TARGETS = {
    "avx512bf16": (Target("x86_64-unknown-linux-gnu", "znver4", AVX512), r"vdpbf16ps\s.*%zmm"),
    "amx": (
        Target("x86_64-unknown-linux-gnu", "sapphirerapids", AVX512 + ",+amx-bf16,+amx-tile"),
        r"tdpbf16ps\s.*%tmm",
    ),
    "neon": (Target("aarch64-unknown-linux-gnu", "neoverse-v1", "+bf16"), r"bfdot\s+v\d+\.4s, v\d+\.8h"),
}
"""Processors, by unit, and the instruction that their products must be."""

SPECS = {
    "prefill": Spec(192, 128, "bf16", "bf16", "bf16", 96, 24, 4, 8, source="rows"),
    "mla": Spec(576, 512, "bf16", "bf16", "bf16", 96, 24, 4, 8, alias=True),
}


@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
@pytest.mark.parametrize("unit", TARGETS)
def test_products_are_the_instruction(unit, spec):
    """No FMA is left in the products; tiles are configured once and released."""
    target, pattern = TARGETS[unit]
    assert config.unit_of(target, "bf16", "bf16", spec.D, spec.Dv, 64) == unit
    tile_m, tile_n = config.wide_tile(target, unit, spec.rows, even=True)
    spec = replace(spec, lanes=target.lanes, tile_m=tile_m, tile_n=tile_n, unit=unit)
    llvm.initialize_all_targets()
    llvm.initialize_all_asmprinters()
    machine = store.machine(target)
    text = machine.emit_assembly(store.optimised(spec, machine))
    accumulators = 8 if unit == "amx" else 24
    assert len(re.findall(pattern, text)) >= 2 * accumulators - 8
    if unit == "amx":
        assert [len(re.findall(rf"^\s+{name}\b", text, re.M)) for name in ("ldtilecfg", "tilerelease")] == [1, 1]


def test_a_unit_takes_what_fills_it():
    tiles, dots = TARGETS["amx"][0], TARGETS["avx512bf16"][0]
    assert config.unit_of(tiles, "bf16", "bf16", 72, 64, 64) == "fma"
    assert config.unit_of(tiles, "bf16", "bf16", 64, 64, 16) == "fma"
    assert config.unit_of(tiles, "bf16", "fp8", 64, 64, 64) == "fma"
    assert config.unit_of(replace(tiles, cpu="znver7"), "bf16", "bf16", 72, 64, 64) == "avx512bf16"
    assert config.unit_of(dots, "f16", "f16", 64, 64, 64) == "fma"
    assert Target("x86_64-pc-linux", "haswell", "+avx2,+avx512bf16").units == ("fma",)


# --- The system's leave to use AMX ------------------------------------------------------------------------------------


@pytest.mark.parametrize("answer", [0, -1], ids=["granted", "refused"])
def test_tiles_are_used_with_the_systems_leave_alone(answer, monkeypatch):
    asked = []

    class Library:
        def syscall(self, *numbers: int) -> int:
            asked.append(numbers)
            return answer

    class Features:
        def flatten(self) -> str:
            return AVX512 + ",+amx-bf16,+amx-tile"

    monkeypatch.setattr(config.sys, "platform", "linux")
    monkeypatch.setattr(config.ctypes, "CDLL", lambda name: Library())
    monkeypatch.setattr(llvm, "get_host_cpu_features", Features)
    monkeypatch.setattr(llvm, "get_process_triple", lambda: "x86_64-unknown-linux-gnu")
    monkeypatch.setattr(llvm, "get_host_cpu_name", lambda: "emeraldrapids")
    found = config.host.__wrapped__()
    assert asked == [(158, 0x1023, 18)]
    assert found.units == (("fma",) if answer else ("amx", "fma"))
    assert config.lacks(found) is None


def test_no_leave_without_linux(monkeypatch):
    monkeypatch.setattr(config.sys, "platform", "win32")
    assert not config.tiles_permitted()


# --- What the instructions compute, written out -----------------------------------------------------------------------


def pair_sums(x: Value, y: Value, total: Value) -> Value:
    """total + the sum of the products of each pair, in FP32."""
    kind = vector(I32, x.type.count)
    for part in (lambda v: v.bits(kind) << 16, lambda v: v.bits(kind) & -0x10000):
        total = part(x).bits(x.type).fma(part(y).bits(y.type), total)
    return total


class Written:
    """AMX's registers as memory of 1 KiB each."""

    def places(self) -> list[Value]:
        if not hasattr(self, "registers"):
            with self.g.b.goto_block(self.g.entry):
                found = [self.g.b.alloca(vector(I32, SIDE * SIDE)) for _ in range(8)]
            for x in found:
                x.type = POINTER
            self.registers = [Value(self.g.b, x) for x in found]
        return self.registers

    def rows(self):
        return self.g.loop(0, SIDE)

    def tile_load(self, register, source, stride):
        with self.rows() as r:
            (self.places()[register] + r * 64).store((source + self.g.wide(stride) * r).load(self.V, 4), 4)

    def tile_store(self, register, to, stride):
        with self.rows() as r:
            (to + r * stride).store((self.places()[register] + r * 64).load(self.V, 4), 4)

    def tile_clear(self, register):
        with self.rows() as r:
            (self.places()[register] + r * 64).store(self.zero, 4)

    def tile_multiply(self, c, a, b):
        c, a, b = (self.places()[x] for x in (c, a, b))
        with self.rows() as m:
            total = self.g.variable((c + m * 64).load(self.V, 4))
            with self.rows() as k:
                x = (a + m * 64 + k * 4).load(F32, 4).splat(SIDE)
                total.set(pair_sums(x, (b + k * 64).load(self.V, 4), total.get()))
            (c + m * 64).store(total.get(), 4)


@pytest.fixture(params=["fma-4", "fma-16", "neon", "avx512bf16", "amx"])
def written(request, monkeypatch, tmp_path):
    """Kernels for another processor's lanes and unit, compiled for this one."""
    name = request.param
    unit, lanes = name.split("-")[0], {"fma-4": 4, "neon": 4}.get(name, 16)
    monkeypatch.setattr(Target, "lanes", lanes)
    monkeypatch.setattr(Target, "registers", 32)
    monkeypatch.setattr(Target, "units", (unit, "fma"))
    monkeypatch.setattr(Pairs, "multiply", lambda self, x, y, total: pair_sums(x, y, total))
    monkeypatch.setattr(Pairs, "rounded", lambda self, x, y: beside(*(round_bf16(z).bits(self.V) for z in (x, y))))
    for method in ("tile_load", "tile_store", "tile_clear", "tile_multiply", "places", "rows"):
        monkeypatch.setattr(Tiles, method, getattr(Written, method), raising=False)
    monkeypatch.setattr(Tiles, "open", lambda self: None)
    monkeypatch.setattr(Tiles, "close", lambda self: None)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    specs = []
    load = functools.cache(store.load.__wrapped__)
    monkeypatch.setattr(store, "load", lambda spec: specs.append(spec) or load(spec))
    plan.cache_clear()
    yield unit, specs
    plan.cache_clear()


@pytest.mark.parametrize(
    "case",
    [
        PrefillCase("prefill/unit", 100, Hq=2, D=96, mask="bool", sparse="heads", causal=True, sink=True),
        DecodeCase("decode/unit", (650, 0, 41), Hq=40, Hk=1, D=576, Dv=512, alias=True, softmax_scale=0.07),
    ],
    ids=lambda case: case.name,
)
def test_layouts_of_other_processors_run_here(written, case):
    unit, specs = written
    result = run(case)
    assert result.passed, str(result)
    assert {spec.unit for spec in specs} == {unit}
