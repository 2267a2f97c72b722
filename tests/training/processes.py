"""Ranks as processes of their own, as torchrun starts them, to be killed: each runs the `vlkit train` command."""

from __future__ import annotations

import json
import multiprocessing
import os
import socket
import sys
import time
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch

from tests.ranks import CONTEXT
from vlkit.training import TrainConfig

PATIENCE = 120.0  # seconds for what takes a few on an idle machine


class Started:
    """Ranks of a run.

    Args:
        config: Of all ranks, or one for each.
        num_ranks: How many.
        logs: Folder for what they print.
        warm: Fork them from this process, which has better trained before: in a fraction of the time.
    """

    def __init__(
        self, config: TrainConfig | list[TrainConfig], num_ranks: int, logs: Path, *, warm: bool = False
    ) -> None:
        context = multiprocessing.get_context("fork") if warm else CONTEXT
        configs = config if isinstance(config, list) else [config] * num_ranks
        self.config, self.logs = configs[0], logs
        logs.mkdir(exist_ok=True)
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.ranks: list[BaseProcess] = []
        for rank, own in enumerate(configs):
            process = context.Process(target=_life, args=(rank, num_ranks, port, own.to_dict(), logs), daemon=True)
            process.start()
            self.ranks.append(process)

    def steps(self) -> int:
        """Steps done so far, as the metrics say."""
        path = Path(self.config.run) / "metrics.jsonl"
        lines = path.read_text().splitlines() if path.exists() else []
        return int(json.loads(lines[-1])["step"]) if lines else 0

    def wait_for(self, condition: Callable[[], Any], seconds: float = PATIENCE) -> None:
        end = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < end, f"not so after {seconds} seconds; {self.said()}"
            assert any(rank.is_alive() for rank in self.ranks), f"all ranks ended; {self.said()}"
            time.sleep(0.005)

    def kill(self, rank: int, number: int) -> None:
        os.kill(self.ranks[rank].pid or 0, number)

    def end(self, seconds: float = PATIENCE) -> list[int | None]:
        """Exit statuses, once all have ended; those that have not in time are killed, and theirs is None."""
        end = time.monotonic() + seconds
        codes = []
        for rank in self.ranks:
            rank.join(max(0.0, end - time.monotonic()))
            codes.append(rank.exitcode)
        for rank in self.ranks:
            rank.kill()
            rank.join()
        return codes

    def said(self, rank: int | None = None) -> str:
        """What a rank, or all, printed."""
        chosen = range(len(self.ranks)) if rank is None else [rank]
        paths = [self.logs / f"rank-{each}.txt" for each in chosen]
        return "\n".join(path.read_text() for path in paths if path.exists())


def _life(rank: int, num_ranks: int, port: int, config: dict[str, Any], logs: Path) -> None:
    torch.set_num_threads(1)
    output = os.open(logs / f"rank-{rank}.txt", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(output, 1)
    os.dup2(output, 2)
    path = logs / f"config-{rank}.json"
    path.write_text(json.dumps(config))
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(num_ranks))
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    sys.argv = ["vlkit", "train", str(path)]
    from vlkit.cli import main

    sys.stdout = os.fdopen(1, "w", buffering=1, closefd=False)
    sys.stderr = os.fdopen(2, "w", buffering=1, closefd=False)
    main()
