"""Ranks: the processes of a run, and what they tell one another beside the gradients.

one process                 Ranks(0, 1), nothing is sent
torchrun, or RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT in the environment
                            a process group: gloo on the host, nccl between accelerators
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from vlkit.errors import ConfigError, RankError
from vlkit.optim.agree import broadcast_json, gather_json, raise_together

# torch raises a bare RuntimeError where gloo loses a rank; these words are in its messages.
LOST = (
    "connection",
    "closed by peer",
    "reset by peer",
    "broken pipe",
    "timed out",
    "timeout",
    "gloo",
    "nccl",
    "socket",
)


@dataclass(frozen=True)
class Ranks:
    """The processes of a run, as one of them sees them.

    Attributes:
        rank: Which of them this is.
        size: How many they are.
        device: Where this one computes.
        group: The process group; None for one process.
    """

    rank: int
    size: int
    device: torch.device
    group: dist.ProcessGroup | None = None

    @property
    def first(self) -> bool:
        """Whether this is the rank that writes and speaks for all."""
        return self.rank == 0

    def gather(self, *numbers: int) -> list[list[int]]:
        """Whole numbers of every rank, in the order of the ranks, in one exchange."""
        if self.group is None:
            return [list(numbers)]
        ours = torch.tensor(numbers, dtype=torch.int64)
        theirs = [torch.empty_like(ours) for _ in range(self.size)]
        dist.all_gather(theirs, ours, group=self.group)
        return [each.tolist() for each in theirs]

    def sum(self, values: Tensor) -> Tensor:
        """The sum over all ranks, on the host and equal to the bit on all of them."""
        values = values.cpu()
        if self.group is not None:
            dist.all_reduce(values, group=self.group)
        return values

    def from_first(self, value: Any) -> Any:
        """The JSON value that the first rank gives, on all ranks."""
        return broadcast_json(value, self.group)

    @contextmanager
    def together(self) -> Iterator[None]:
        """Around what every rank does alone, without exchanges: if one fails, all raise, and none waits for it.

        Raises:
            Exception: The rank's own; on the others one of the same class, with the number of the rank that failed.
        """
        failure: Exception | None = None
        try:
            yield
        except Exception as error:
            failure = error
        raise_together(failure, self.group)

    def check_equal(self, value: Any, what: str) -> None:
        """Refuse to go on where a rank has another JSON value than the first.

        Raises:
            RankError: On all ranks, with the first difference.
        """
        expected = self.from_first(value)
        for rank, difference in enumerate(gather_json(first_difference(expected, value), self.group)):
            if difference is not None:
                raise RankError(
                    f"{what}: rank {rank} differs from rank 0 in {difference}; start all ranks with one config, one version "
                    "of the code and the same files"
                )


@contextmanager
def launched(device: str, timeout_minutes: float) -> Iterator[Ranks]:
    """The ranks of this run, joined as the environment says; a process group that is there already is used.

    Args:
        device: "auto", "cpu" or "cuda".
        timeout_minutes: How long a rank waits for the others.

    Raises:
        ConfigError: An accelerator is asked for that is not there.
        RankError: The ranks do not find each other.
    """
    own = int(os.environ.get("WORLD_SIZE", "1")) > 1 and not dist.is_initialized()
    place = _device(device)
    if place.type == "cuda":
        torch.cuda.set_device(place)
    if own:
        try:
            dist.init_process_group(
                "cpu:gloo,cuda:nccl" if place.type == "cuda" else "gloo", timeout=timedelta(minutes=timeout_minutes)
            )
        except (ValueError, RuntimeError) as error:
            raise RankError(
                f"the ranks did not find each other: {str(error).splitlines()[0]}; start them with torchrun"
            ) from error
    clean = False
    try:
        if dist.is_initialized() and dist.get_world_size() > 1:
            yield Ranks(dist.get_rank(), dist.get_world_size(), place, dist.group.WORLD)
        else:
            yield Ranks(0, 1, place)
        clean = True
    finally:
        if own and (clean or place.type == "cpu"):  # nccl would wait for ranks that may be gone
            dist.destroy_process_group()


def _device(device: str) -> torch.device:
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda":
        if not torch.cuda.is_available():
            raise ConfigError("device = 'cuda', but torch sees no such device; 'auto' takes what there is")
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    return torch.device(device)


def lost_rank(error: BaseException) -> bool:
    """Whether an error of torch means that another rank is gone or does not answer."""
    if not isinstance(error, RuntimeError) or isinstance(error, RankError):
        return False
    return isinstance(error, dist.DistError) or any(word in str(error).lower() for word in LOST)


def as_mistake(expected: str, found: str) -> str:
    """How a difference is told where both should be equal."""
    return f"found {found}, expected {expected}"


def as_change(before: str, now: str) -> str:
    """How a difference is told where a change is allowed."""
    return f"was {before}, is now {now}"


def first_difference(
    expected: Any, found: Any, where: str = "", tell: Callable[[str, str], str] = as_mistake
) -> str | None:
    """Where two JSON values first differ, with both values as `tell` puts them; None where they are equal."""
    if isinstance(found, tuple):
        found = list(found)
    if isinstance(expected, tuple):
        expected = list(expected)
    if isinstance(expected, dict) and isinstance(found, dict):
        for key in [*expected, *(key for key in found if key not in expected)]:
            inside = f"{where}.{key}" if where else str(key)
            if key not in found or key not in expected:
                return f"{inside}: " + (
                    tell(_short(expected[key]), "nothing") if key in expected else tell("nothing", _short(found[key]))
                )
            if difference := first_difference(expected[key], found[key], inside, tell):
                return difference
        return None
    if isinstance(expected, list) and isinstance(found, list):
        for index, (a, b) in enumerate(zip(expected, found, strict=False)):
            if difference := first_difference(a, b, f"{where}[{index}]", tell):
                return difference
        if len(expected) == len(found):
            return None
        return f"{where}: {tell(str(len(expected)), f'{len(found)} entries')}"
    if expected == found and type(expected) is type(found):
        return None
    return f"{where}: {tell(_short(expected), _short(found))}"


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 200 else text[:200] + " ..."
