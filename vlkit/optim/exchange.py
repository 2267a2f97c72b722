"""Units that several ranks share: gathered on the rank that orthogonalises them, and handed back.

    shares of directions -> gather  -> whole spans, on their workers
    orthogonalised spans -> give_back -> every rank's share of them

Both start at once and are waited for later, so that a rank can orthogonalise what is its own while elements travel. A
rank sends at most one message to every other rank, with everything that this rank works on. Who sends what follows from
the splits alone, which are the same on all ranks, so no rank waits for a message that nobody sends.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from vlkit.optim.partition import Share, Split


@dataclass(frozen=True)
class Carrier:
    """How elements travel: the group, this rank in it, and the number format and device of messages."""

    group: dist.ProcessGroup
    rank: int
    dtype: torch.dtype
    device: torch.device

    def swap(self, outgoing: dict[int, list[Tensor]], incoming: dict[int, int]) -> Callable[[], dict[int, Tensor]]:
        """Start to send 1-D tensors to ranks, and to receive so many elements from ranks; the result waits for them."""
        operations, messages, received = [], [], {}
        for peer in sorted(outgoing.keys() | incoming.keys()):
            if outgoing.get(peer):
                messages.append(torch.cat(outgoing[peer]))
                operations.append(dist.P2POp(dist.isend, messages[-1], group=self.group, group_peer=peer))
            if incoming.get(peer):
                received[peer] = torch.empty(incoming[peer], dtype=self.dtype, device=self.device)
                operations.append(dist.P2POp(dist.irecv, received[peer], group=self.group, group_peer=peer))
        works = dist.batch_isend_irecv(operations) if operations else []

        def wait() -> dict[int, Tensor]:
            for work in works:
                work.wait()
            messages.clear()
            return received

        return wait


def gather(
    splits: Sequence[Split], pieces: Sequence[Tensor | None], carrier: Carrier
) -> Callable[[], dict[int, Tensor]]:
    """Bring every span together on its workers.

    Args:
        splits: The same on all ranks, in the same order.
        pieces: This rank's share of each, 1-D, or None where it has none.
        carrier: Its number format is that of the pieces.

    Returns:
        A function that waits, and gives the elements of the spans that this rank works on, by their index.
    """
    outgoing: dict[int, list[Tensor]] = {}
    parts: list[tuple[int, Share]] = []  # what this rank receives, in the order of every sender's message
    for index, (split, piece) in enumerate(zip(splits, pieces, strict=True)):
        if piece is not None:
            for worker in split.workers:
                if worker != carrier.rank:
                    outgoing.setdefault(worker, []).append(piece)
        if carrier.rank in split.workers:
            parts += [(index, share) for share in split.shares]
    wait = carrier.swap(outgoing, _sizes(share for _, share in parts if share.rank != carrier.rank))

    def spans() -> dict[int, Tensor]:
        messages = _Reader(wait())
        whole: dict[int, Tensor] = {}
        for index, share in parts:
            if index not in whole:
                whole[index] = torch.empty(splits[index].numel, dtype=carrier.dtype, device=carrier.device)
            piece = pieces[index] if share.rank == carrier.rank else messages.take(share)
            assert piece is not None
            share.of(whole[index]).copy_(piece.view(share.sizes))
        return whole

    return spans


def give_back(splits: Sequence[Split], results: dict[int, Tensor], carrier: Carrier) -> Callable[[], dict[int, Tensor]]:
    """Send every rank its share of the spans that one rank has worked on.

    Args:
        splits: As for gather.
        results: The spans that this rank worked on, 1-D, by index.
        carrier: Its number format is that of the results.

    Returns:
        A function that waits, and gives this rank's share of every span it has a share of, 1-D, by index.
    """
    outgoing: dict[int, list[Tensor]] = {}
    mine: dict[int, Tensor] = {}
    parts: list[tuple[int, Share]] = []
    for index, split in enumerate(splits):
        for share in split.shares:
            if share.rank in split.workers:  # has the whole result already
                if share.rank == carrier.rank:
                    mine[index] = share.of(results[index]).reshape(-1)
            elif split.workers[0] == carrier.rank:
                outgoing.setdefault(share.rank, []).append(share.of(results[index]).reshape(-1))
            elif share.rank == carrier.rank:
                parts.append((index, share._replace(rank=split.workers[0])))
    wait = carrier.swap(outgoing, _sizes(share for _, share in parts))

    def shares() -> dict[int, Tensor]:
        messages = _Reader(wait())
        return {**mine, **{index: messages.take(share) for index, share in parts}}

    return shares


def _sizes(shares: Iterable[Share]) -> dict[int, int]:
    """Elements by sender."""
    sizes: dict[int, int] = {}
    for share in shares:
        sizes[share.rank] = sizes.get(share.rank, 0) + share.numel
    return sizes


class _Reader:
    """Takes one share after another out of the messages of all senders."""

    def __init__(self, messages: dict[int, Tensor]) -> None:
        self.messages = messages
        self.position = dict.fromkeys(messages, 0)

    def take(self, share: Share) -> Tensor:
        start = self.position[share.rank]
        self.position[share.rank] = start + share.numel
        return self.messages[share.rank][start : start + share.numel]
