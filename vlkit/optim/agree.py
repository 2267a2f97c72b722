"""Ranks that tell one another small things: tables, verdicts, failures. A group of None is one process alone."""

from __future__ import annotations

import json
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from vlkit import errors
from vlkit.errors import VlkitError


def world() -> dist.ProcessGroup | None:
    """All ranks of this run, or None in a process that is alone."""
    return dist.group.WORLD if dist.is_available() and dist.is_initialized() else None


def rank_in(group: dist.ProcessGroup | None) -> int:
    return dist.get_rank(group) if group is not None else 0


def num_ranks_in(group: dist.ProcessGroup | None) -> int:
    return dist.get_world_size(group) if group is not None else 1


def wire_device(group: dist.ProcessGroup) -> torch.device:
    """Where a tensor has to lie that this group carries."""
    if "gloo" in dist.get_backend(group) or "cpu" in str(dist.get_backend_config(group)):
        return torch.device("cpu")
    return torch.device(torch.accelerator.current_accelerator() or "cpu")


def gather_json(value: Any, group: dist.ProcessGroup | None) -> list[Any]:
    """What every rank gave, in the order of the ranks, on every rank; as JSON, so that nothing is unpickled."""
    if group is None:
        return [value]
    device = wire_device(group)
    text = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8).to(device)
    lengths = [torch.zeros(1, dtype=torch.int64, device=device) for _ in range(num_ranks_in(group))]
    dist.all_gather(lengths, torch.tensor([len(text)], device=device), group=group)
    longest = max(int(length) for length in lengths)
    texts = [torch.zeros(longest, dtype=torch.uint8, device=device) for _ in lengths]
    dist.all_gather(texts, torch.nn.functional.pad(text, (0, longest - len(text))), group=group)
    return [json.loads(bytes(text[: int(length)].cpu().numpy())) for text, length in zip(texts, lengths, strict=True)]


def broadcast_json(value: Any, group: dist.ProcessGroup | None) -> Any:
    """What rank 0 gave, on every rank; what the others give is not looked at."""
    if group is None:
        return value
    device = wire_device(group)
    if dist.get_rank(group) == 0:
        text = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8).to(device)
        length = torch.tensor([len(text)], device=device)
    else:
        length = torch.zeros(1, dtype=torch.int64, device=device)
    dist.broadcast(length, group=group, group_src=0)
    if dist.get_rank(group) != 0:
        text = torch.zeros(int(length), dtype=torch.uint8, device=device)
    dist.broadcast(text, group=group, group_src=0)
    return json.loads(bytes(text.cpu().numpy()))


def raise_together(failure: Exception | None, group: dist.ProcessGroup | None) -> None:
    """Collective. If something failed on any rank, every rank raises, so that none waits for one that has gone.

    Raises:
        Exception: The rank's own failure; else that of the first rank that has one, named.
    """
    found = gather_json(None if failure is None else [type(failure).__name__, str(failure)], group)
    if failure is not None:
        raise failure
    for rank, said in enumerate(found):
        if said is not None:
            kind = getattr(errors, said[0], VlkitError)
            raise kind(f"rank {rank}: {said[1]}")


def broadcast_tensor(tensor: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """The tensor of rank 0, on every rank; the others give one of its shape and dtype to be written to."""
    if group is not None and tensor.numel():
        carried = tensor.to(wire_device(group)).contiguous()
        dist.broadcast(carried, group=group, group_src=0)
        if carried is not tensor:
            tensor.copy_(carried)
    return tensor
