"""How much memory a piece of work needs beyond what is there before it, on a CPU.

The work runs in a fresh process, so that nothing which ran before has left memory in the allocator. Blocks of a megabyte and more
are mapped and given back one by one (glibc's MALLOC_MMAP_THRESHOLD_), hence the resident size follows what tensors really hold.
Linux keeps the highest resident size of a process; it is set back just before the work and read just after it.
"""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

Prepare = Callable[..., Callable[[], object]]


def peak_bytes(prepare: Prepare, *arguments: Any, warmups: int = 0) -> int:
    """Peak of the resident size during the work, less the resident size before it, in bytes.

    Args:
        prepare: A function of a module. Called in the fresh process; makes what is not counted, and gives the work.
        arguments: Its arguments.
        warmups: How often the work runs before it is measured, such as once for an optimizer that makes its state.
    """
    old = os.environ.get("MALLOC_MMAP_THRESHOLD_")
    os.environ["MALLOC_MMAP_THRESHOLD_"] = str(2**20)
    try:
        context = multiprocessing.get_context("spawn")
        ours, theirs = context.Pipe(duplex=False)
        child = context.Process(target=_measure, args=(theirs, prepare, arguments, warmups, torch.get_num_threads()))
        child.start()
        theirs.close()
        try:
            return int(ours.recv())
        except EOFError:
            raise RuntimeError(f"{prepare.__name__}{arguments} ended without a result") from None
        finally:
            child.join()
    finally:
        if old is None:
            del os.environ["MALLOC_MMAP_THRESHOLD_"]
        else:
            os.environ["MALLOC_MMAP_THRESHOLD_"] = old


def _measure(results: Connection, prepare: Prepare, arguments: tuple[Any, ...], warmups: int, threads: int) -> None:
    torch.set_num_threads(threads)
    work = prepare(*arguments)
    for _ in range(warmups):
        work()
    Path("/proc/self/clear_refs").write_text("5")  # the highest resident size is now the present one
    before = _resident("VmRSS")
    work()
    results.send(_resident("VmHWM") - before)


def _resident(name: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(name + ":"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {name}: memory is measured on Linux only")
