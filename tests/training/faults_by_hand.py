"""Many faults in a row, by hand: OMP_NUM_THREADS=1 python -m tests.training.faults_by_hand ranks 50 | saves 200 | disk

ranks N   A run on 2 ranks is started again and again; each time a random rank is killed with SIGKILL at a random moment.
          How long until all are gone; in the end the weights must be those of a run that nobody disturbed, bit for bit.
saves N   A save on 1 or 2 ranks is killed at a random moment. Exactly the old or the new state must load, and after the next
          save nothing else may lie there.
disk      A save on a file system that is too small (a tmpfs; needs root).
"""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from tests.training.processes import Started
from tests.training.samples import small_config
from tests.training.test_run_checkpoint import assert_loads, names, parts, save
from vlkit.errors import DiskFullError, VlkitError
from vlkit.hub.safetensors_file import MappedFile, read_header
from vlkit.training import run_checkpoint, train
from vlkit.training.run_checkpoint import complete_checkpoints, save_checkpoint

PATIENCE = 30.0  # seconds within which all ranks have to be gone when one is
FILE_CALLS = (52, 5)  # of a save, on the first rank and on another


def kill_ranks(count: int, seed: int) -> None:
    rng = random.Random(seed)
    with tempfile.TemporaryDirectory() as root:
        folder = Path(root)
        config = small_config(folder, steps=10**6, batch=4, checkpoints={"every": 3}, schedule={"decay": 0})
        train(config.replace(run=str(folder / "warm"), steps=2))
        times: list[float] = []
        steps: list[int] = []
        for _ in range(count):
            started = Started(config, 2, folder / "logs", warm=True)
            begun = started.steps()
            goal = begun + rng.randint(1, 6)
            started.wait_for(lambda s=started, g=goal: s.steps() >= g)  # type: ignore[misc]
            time.sleep(rng.random() * 0.15)
            steps.append(started.steps())
            victim, at = rng.randrange(2), time.monotonic()
            started.kill(victim, signal.SIGKILL)
            codes = started.end(PATIENCE)
            times.append(time.monotonic() - at)
            assert codes[victim] == -signal.SIGKILL, codes
            assert codes[1 - victim] == 1, (codes, started.said())
            assert "another rank died" in started.said(1 - victim), started.said()
            complete, skipped = complete_checkpoints(folder / "run/checkpoints")
            assert not skipped, skipped
            print(f"step {steps[-1]}, rank {victim}: {times[-1]:.2f} s", file=sys.stderr, flush=True)
        last = int(complete[0].name.removeprefix("step-")) + 3
        started = Started(config.replace(steps=last), 2, folder / "logs", warm=True)
        assert started.end(120) == [0, 0], started.said()
        assert not list((folder / "run/checkpoints").glob(".*"))
        whole = config.replace(run=str(folder / "whole"), steps=last)
        started = Started(whole, 2, folder / "logs", warm=True)
        assert started.end(600) == [0, 0], started.said()
        a, b = (MappedFile(read_header(folder / run / "model/model.safetensors")) for run in ("run", "whole"))
        equal = all(torch.equal(a.read(name), b.read(name)) for name in a.header.tensors)
        print(
            f"{count} kills, seed {seed}: all ranks gone after {sorted(times)[len(times) // 2]:.2f} s (median), "
            f"{max(times):.2f} s (longest; at most {PATIENCE:.0f}); killed in steps {min(steps)} to {max(steps)}; after step "
            f"{last} the weights are those of an undisturbed run bit for bit: {equal}"
        )
        assert equal


def kill_saves(count: int, seed: int) -> None:
    rng = random.Random(seed)
    outcomes: Counter[str] = Counter()
    longest = 0.0
    with tempfile.TemporaryDirectory() as root:
        for number in range(count):
            ranks = 1 + number % 2
            victim = rng.randrange(ranks)
            call = rng.randrange(FILE_CALLS[min(victim, 1)])
            folder = Path(root) / str(number)
            save(folder, 1)
            reached = os.pipe()
            children = [
                _fork(folder, rank, ranks, call if rank == victim else None, reached[1]) for rank in range(ranks)
            ]
            os.close(reached[1])
            os.read(reached[0], 1)  # the victim is at its call, or has ended
            time.sleep(rng.random() * 0.002)
            at = time.monotonic()
            os.kill(children[victim], signal.SIGKILL)
            codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
            longest = max(longest, time.monotonic() - at)
            os.close(reached[0])
            complete, skipped = complete_checkpoints(folder)
            assert not skipped, skipped
            step = int(complete[0].name.removeprefix("step-"))
            assert step in (1, 2), complete
            assert_loads(complete[0], step)
            left = bool(list(folder.glob(".*")))
            save(folder, 3, keep=1)
            assert names(folder) == ["LATEST", "step-00000003"], names(folder)
            killed = "killed" if codes[victim] < 0 else "over before"
            outcomes[
                f"{ranks} ranks, rank {victim} {killed}, {'new' if step == 2 else 'old'} state"
                f"{', remains that the next save removed' if left else ''}"
            ] += 1
    print(f"{count} kills during saves, seed {seed}: the others gone after {longest:.2f} s at most")
    for outcome, times in sorted(outcomes.items()):
        print(f"  {times:4} {outcome}")


def _fork(folder: Path, rank: int, ranks: int, call: int | None, reached: int) -> int:
    """A process that saves, and says so when it is at a call of the file system."""
    child = os.fork()
    if child:
        return child
    code = 0
    try:
        group = None
        if ranks > 1:
            dist.init_process_group("gloo", init_method=f"file://{folder}.store", rank=rank, world_size=ranks)
            group = dist.group.WORLD
        built, count = parts(2.0), [0]

        def look(event: str, _: Any) -> None:
            if event in ("open", "os.mkdir", "os.rename", "os.remove", "os.rmdir"):
                if count[0] == call:
                    os.write(reached, b"x")
                count[0] += 1

        if call is not None:
            sys.addaudithook(look)
        save_checkpoint(folder, 2, *built, {"step": 2}, keep=1, group=group)
    except (RuntimeError, VlkitError):
        code = 1
    os._exit(code)


def fill_disk() -> None:
    """Sizes around what one and two saves need; first with the look at the free space before, then without."""
    with tempfile.TemporaryDirectory() as root:
        for spare, sizes in ((run_checkpoint.SPARE, range(64, 112, 8)), (-(2**20), range(8, 56, 4))):
            run_checkpoint.SPARE = spare
            for size in sizes:
                subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}k", "tmpfs", root], check=True)
                try:
                    print(f"{size} KiB: {_save_twice(Path(root) / 'checkpoints')}")
                finally:
                    subprocess.run(["umount", root], check=True)


def _save_twice(folder: Path) -> str:
    try:
        save(folder, 1)
        save(folder, 2)
    except DiskFullError as error:
        found = set(names(folder)) - {"LATEST"} if folder.exists() else set()
        if found:
            assert found == {"step-00000001"}, found
            assert_loads(folder / "step-00000001", 1)
        return f"{'the old state loads' if found else 'nothing is left'}: {error}"
    return "both saves fit"


if __name__ == "__main__":
    torch.set_num_threads(1)
    what, *rest = sys.argv[1:]
    number, seed = (int(rest[0]) if rest else 10), (int(rest[1]) if len(rest) > 1 else 0)
    if what == "ranks":
        kill_ranks(number, seed)
    elif what == "saves":
        kill_saves(number, seed)
    else:
        fill_disk()
