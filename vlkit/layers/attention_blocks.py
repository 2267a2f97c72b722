"""Which items of a pack one kernel call computes together, so that many small items take few calls.

lengths -> plan_blocks -> blocks; for each: take [tokens, heads, dim] -> [rows, heads, length, dim] -> kernel -> put
"""

from __future__ import annotations

from functools import lru_cache
from itertools import accumulate, groupby, zip_longest
from typing import NamedTuple

import torch
from torch import Tensor


class Block(NamedTuple):
    """Items that one kernel call computes: `rows` rows of `length` places.

    Attributes:
        first: First token, where the items lie end to end; unused otherwise.
        gather: int64 [rows * length], the token of every place; None where the items lie end to end. Padding repeats
            the first token of its own item, so that nothing of one item, not even a NaN, reaches another.
        real: int64, the places that are not padding; None without padding.
        target: int64, the tokens at those places; None without padding.
        mask: [rows, 1, 1, length], 0 at tokens and -inf at padding; None without padding.
    """

    rows: int
    length: int
    first: int
    gather: Tensor | None = None
    real: Tensor | None = None
    target: Tensor | None = None
    mask: Tensor | None = None


# Measured on AVX-512 with torch 2.14: a kernel call with its views costs about 25 microseconds, as much as gathering 8k
# elements or computing 300k more products. The kernel is slow at the end of a row that is no multiple of 16: 15 keys
# take twice as long as 16.
_SMALL = 8192
_PRODUCTS_OF_A_CALL = 300_000
_LANES = 16


@lru_cache(maxsize=512)
def plan_blocks(lengths: tuple[int, ...], width: int) -> tuple[Block, ...]:
    """Blocks that cover all items: equal neighbours as views, small items gathered with those of like length.

    Args:
        width: Elements of one token's queries.
    """
    starts = (0, *accumulate(lengths))
    blocks: list[Block] = []
    small: dict[int, list[int]] = {}  # by places
    item = 0
    for length, run in groupby(lengths):
        count = len(list(run))
        if length * width >= _SMALL or (count == len(lengths) and _places(length) == length):
            blocks.append(Block(count, length, starts[item]))
        else:
            small.setdefault(-(-length // _LANES), []).extend(range(item, item + count))
        item += count
    waiting: list[int] = []
    sizes = sorted(small)
    for size, larger in zip_longest(sizes, sizes[1:]):
        waiting += small[size]
        if larger is not None:
            products = len(waiting) * (larger**2 - size**2) * _LANES**2 * width
            if products < _PRODUCTS_OF_A_CALL:
                continue
        if len(waiting) == 1:
            blocks.append(Block(1, lengths[waiting[0]], starts[waiting[0]]))
        else:
            blocks.append(gather_block([starts[i] for i in waiting], [lengths[i] for i in waiting]))
        waiting = []
    return tuple(blocks)


def _places(length: int) -> int:
    """The length itself, or the next multiple of the kernel's lanes where that is quicker."""
    return -(-length // _LANES) * _LANES if length % _LANES >= _LANES // 2 else length


def gather_block(starts: list[int], lengths: list[int]) -> Block:
    """The block of the items that begin at `starts`, padded to the longest, or beyond it to whole lanes of the kernel."""
    length = _places(max(lengths))
    place = torch.arange(length)
    inside = place < torch.tensor(lengths)[:, None]  # [rows, length]
    index = (torch.tensor(starts)[:, None] + place * inside).flatten()
    if min(lengths) == length:
        return Block(len(lengths), length, -1, index)
    real = inside.flatten().nonzero().flatten()
    mask = torch.zeros(inside.shape).masked_fill_(~inside, float("-inf"))[:, None, None]
    return Block(len(lengths), length, -1, index, real, index[real], mask)


def take(x: Tensor, block: Block) -> Tensor:
    """The block's tokens as [rows, heads, length, dim]."""
    x = x.narrow(0, block.first, block.rows * block.length) if block.gather is None else x.index_select(0, block.gather)
    return x.view(block.rows, block.length, *x.shape[1:]).transpose(1, 2)


def put(whole: Tensor, part: Tensor, block: Block) -> None:
    """Write [rows, length, heads, ...] into the block's tokens of [tokens, heads, ...]."""
    part = part.flatten(0, 1)
    if block.gather is None:
        whole.narrow(0, block.first, block.rows * block.length).copy_(part)
    elif block.real is None or block.target is None:
        whole.index_copy_(0, block.gather, part.to(whole.dtype))
    else:
        whole.index_copy_(0, block.target, part.index_select(0, block.real).to(whole.dtype))
