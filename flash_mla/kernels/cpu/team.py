"""Run a kernel in torch's own OpenMP team: no second pool of threads competes with it for the cores.

torch's library knows its OpenMP runtime, whichever that is: its entry points are looked up through torch's handle.
GNU's (`GOMP_parallel`, which LLVM's and Intel's runtimes offer too) takes a function and its argument; LLVM's own
(`__kmpc_fork_call`, the one on Windows) passes two thread numbers first: a kernel's entry `member` ignores them.
Linux is what this runs on here; macOS and Windows were written by reading their runtimes' sources, and never run.
"""

from __future__ import annotations

import ctypes
import functools
import sys
from collections.abc import Callable
from pathlib import Path

import torch

Run = Callable[[dict[str, int], int, int], None]
"""run(entry points, address of the arguments, threads)."""

LIBRARY = {"linux": "libtorch_cpu.so", "darwin": "libtorch_cpu.dylib", "win32": "libiomp5md.dll"}


class Location(ctypes.Structure):
    """LLVM's `ident_t`: who asks for a team."""

    _fields_ = (
        ("reserved", ctypes.c_int32),
        ("flags", ctypes.c_int32),
        ("reserved_2", ctypes.c_int32),
        ("reserved_3", ctypes.c_int32),
        ("source", ctypes.c_char_p),
    )


@functools.cache
def team() -> Run | None:
    """How to run a kernel in torch's team, or None where no entry point is found."""
    name = LIBRARY.get(sys.platform)
    if name is None:
        return None
    try:
        library = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / name))
    except OSError:
        return None
    if hasattr(library, "GOMP_parallel"):
        return gnu(library)
    return llvm(library) if hasattr(library, "__kmpc_fork_call") else None


def gnu(library: ctypes.CDLL) -> Run:
    """libgomp's entry: GOMP_parallel(function, argument, threads, flags)."""
    parallel = library.GOMP_parallel
    parallel.restype = None
    parallel.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint]
    return lambda entries, args, threads: parallel(entries["run"], args, threads, 0)


def llvm(library: ctypes.CDLL) -> Run:
    """libomp's entry: __kmpc_fork_call(location, 1, function, argument), for a team whose size is pushed before."""
    location = Location(0, 2, 0, 0, b";flash_mla;attend;0;0;;")
    fork, push, number = (
        getattr(library, f"__kmpc_{name}") for name in ("fork_call", "push_num_threads", "global_thread_num")
    )
    fork.restype = push.restype = None
    fork.argtypes = [ctypes.c_void_p, ctypes.c_int32, ctypes.c_void_p, ctypes.c_void_p]
    push.argtypes = [ctypes.c_void_p, ctypes.c_int32, ctypes.c_int32]
    number.argtypes = [ctypes.c_void_p]

    def run(entries: dict[str, int], args: int, threads: int) -> None:
        where = ctypes.byref(location)
        push(where, number(where), threads)
        fork(where, 1, entries["member"], args)

    return run


ENTRY = ctypes.CFUNCTYPE(None, ctypes.c_void_p)


@functools.cache
def alone(address: int) -> Callable[[int], None]:
    """A kernel as a function of its arguments, in the calling thread."""
    return ENTRY(address)
