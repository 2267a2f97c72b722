"""Functions on several ranks at once: processes that share a gloo group, forked from a server that has imported torch already.

    results = run_ranks(work, 3, argument)        # work(rank, argument) on ranks 0, 1, 2; their results in order

`work` is a function of a module. It finds torch.distributed initialised (gloo, one thread). What a rank raises, the test raises;
ranks that have not ended in time are killed, and the test fails.
"""

from __future__ import annotations

import gc
import multiprocessing
import pickle
import tempfile
import traceback
from collections.abc import Callable, Sequence
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from pathlib import Path
from time import monotonic
from typing import Any

import torch

PATIENCE = 90.0  # seconds that a rank waits for another
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(
    [
        "torch",
        "torch._dynamo",  # the first DTensor imports it, in half a second
        "torch.distributed.fsdp",
        "torch.distributed.checkpoint.hf_storage",
        "torch.distributed.checkpoint.state_dict",
        "torch.distributed.tensor.debug",
        "torch.testing",
        "pytest",  # every module with tests imports it: a third of a second per process
        "safetensors.torch",
        "vlkit.models",
        "vlkit.optim",
        "vlkit.testing",
        "vlkit.training.loop",
        "vlkit.training.sharding",
    ]
)


def run_ranks(work: Callable[..., Any], num_ranks: int, *args: Any, timeout: float = 2 * PATIENCE) -> list[Any]:
    """What `work(rank, *args)` returns on every rank.

    Args:
        timeout: Seconds for all of it.

    Raises:
        AssertionError: A rank raised, died, or did not end in time; with the trace of the first that raised.
    """
    with tempfile.TemporaryDirectory() as folder:
        pipes, processes = [], []
        for rank in range(num_ranks):
            ours, theirs = CONTEXT.Pipe()
            process = CONTEXT.Process(
                target=_rank, args=(theirs, work, rank, num_ranks, Path(folder) / "store", args), daemon=True
            )
            process.start()
            theirs.close()
            pipes.append(ours)
            processes.append(process)
        try:
            return _collect(pipes, monotonic() + timeout, timeout)
        finally:
            for process in processes:
                process.kill()
                process.join()


def all_of(rank: int, works: Sequence[tuple[Callable[..., Any], tuple[Any, ...]]]) -> list[Any]:
    """Several works in the same processes, which cost more to start than most works take."""
    return [work(rank, *args) for work, args in works]


def _collect(pipes: list[Connection], end: float, timeout: float) -> list[Any]:
    results: dict[int, Any] = {}
    waiting = {pipe: rank for rank, pipe in enumerate(pipes)}
    while waiting:
        ready = wait(list(waiting), max(0.0, end - monotonic()))
        assert ready, f"ranks {sorted(waiting.values())} have not ended after {timeout} seconds"
        for pipe in ready:
            rank = waiting.pop(pipe)
            try:
                done, value = pickle.loads(pipe.recv_bytes())  # type: ignore[union-attr]
            except EOFError:
                raise AssertionError(f"rank {rank} died without a word") from None
            assert done, f"rank {rank} of {len(pipes)}:\n{value}"
            results[rank] = value
    return [results[rank] for rank in range(len(pipes))]


def _rank(
    pipe: Connection, work: Callable[..., Any], rank: int, num_ranks: int, store: Path, args: tuple[Any, ...]
) -> None:
    import torch.distributed as dist

    torch.set_num_threads(1)
    gc.freeze()  # what the server imported is never garbage: not looked through, and its pages not copied
    try:
        dist.init_process_group(
            "gloo", init_method=f"file://{store}", rank=rank, world_size=num_ranks, timeout=timedelta(seconds=PATIENCE)
        )
        value = (True, work(rank, *args))
        dist.barrier()
    except BaseException:
        value = (False, traceback.format_exc())
    # By value, not through shared memory: the test may look at tensors long after this process is gone.
    pipe.send_bytes(pickle.dumps(value))
    pipe.close()
    if dist.is_initialized():
        dist.destroy_process_group()
