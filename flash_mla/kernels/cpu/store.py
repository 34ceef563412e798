"""Compiled kernels: LLVM makes a kernel for the host in 0.2 s, and its object code is kept on disk.

A kernel is compiled once for each (spec, processor, version of llvmlite, sources of this folder), written to a file
under `$XDG_CACHE_HOME/flash_mla` (default `~/.cache/flash_mla`), and loaded from there by every later process in
milliseconds. A file carries the digest of its code: one that is damaged is made anew. Where the folder cannot be
written, every process compiles for itself.
"""

from __future__ import annotations

import functools
import hashlib
import logging
import os
import tempfile
import threading
import time
from pathlib import Path

import llvmlite
import llvmlite.binding as llvm

from flash_mla.kernels.cpu.build import Kernel, build
from flash_mla.kernels.cpu.config import Target, host

logger = logging.getLogger("flash_mla")

DIGEST = 32
"""Bytes of the digest in front of the code."""
COMPILING = threading.Lock()
"""Threads that ask for one kernel at once compile it once: the others find it stored."""


def directory() -> Path:
    """Where compiled kernels lie."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "flash_mla"


@functools.cache
def sources() -> bytes:
    """The digest of this folder's code."""
    key = hashlib.sha256()
    for source in sorted(Path(__file__).parent.glob("*.py")):
        key.update(source.read_bytes())
    return key.digest()


def path(spec: Kernel, target: Target) -> Path:
    """The file of a kernel."""
    key = hashlib.sha256(sources())
    for part in (spec, target, llvmlite.__version__, llvm.llvm_version_info):
        key.update(repr(part).encode())
    return directory() / f"{type(spec).__name__.lower()}-{key.hexdigest()[:24]}.o"


def machine(target: Target) -> llvm.TargetMachine:
    """LLVM's compiler for a processor; one other than the host's needs `llvm.initialize_all_targets()` first."""
    llvm.initialize_native_target()
    llvm.initialize_native_asmprinter()
    return llvm.Target.from_triple(target.triple).create_target_machine(
        cpu=target.cpu, features=target.features, opt=3, reloc="default", codemodel="jitdefault"
    )


def optimised(spec: Kernel, made_for: llvm.TargetMachine) -> llvm.ModuleRef:
    """The kernel's IR after the passes that matter to it: the generator has unrolled and vectorised already."""
    # NOTE: LLVM's own list (O2) takes four times as long, half of a kernel's compile time, for code that is no faster
    module = llvm.parse_assembly(str(build(spec)))
    module.verify()
    module.triple, module.data_layout = str(made_for.triple), str(made_for.target_data)
    passes = llvm.create_new_function_pass_manager()
    passes.add_sroa_pass()
    passes.add_instruction_combine_pass()
    passes.add_simplify_cfg_pass()
    passes.add_new_gvn_pass()
    builder = llvm.create_pass_builder(made_for, llvm.create_pipeline_tuning_options())
    for function in module.functions:
        if not function.is_declaration:
            passes.run(function, builder)
    return module


def compiled(spec: Kernel, target: Target) -> bytes:
    """The kernel's object code."""
    made_for = machine(target)
    return made_for.emit_object(optimised(spec, made_for))


def stored(file: Path) -> bytes | None:
    """The code in a file, or None where there is no file or it is damaged."""
    try:
        content = file.read_bytes()
    except OSError:
        return None
    code = content[DIGEST:]
    return code if content[:DIGEST] == hashlib.sha256(code).digest() else None


def keep(file: Path, code: bytes) -> None:
    """Write the file aside and rename it, so that a process beside this one never reads half of it."""
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=file.parent, delete=False) as part:
            part.write(hashlib.sha256(code).digest() + code)
        os.replace(part.name, file)
    except OSError:
        return


ENGINES: list[llvm.ExecutionEngine] = []
"""What holds the code of loaded kernels."""


@functools.cache
def load(spec: Kernel) -> dict[str, int]:
    """The addresses of a kernel's entry points `run` and `member`, on the host."""
    with COMPILING:
        file = path(spec, host())
        code = stored(file)
        if code is None:
            started = time.monotonic()
            code = compiled(spec, host())
            keep(file, code)
            logger.info("compiled %s for %s in %.1f s", spec, host().cpu, time.monotonic() - started)
        engine = llvm.create_mcjit_compiler(llvm.parse_assembly(""), machine(host()))
        engine.add_object_file(llvm.ObjectFileRef.from_data(code))
        engine.finalize_object()
        ENGINES.append(engine)
    return {name: engine.get_function_address(name) for name in ("run", "member")}
