"""Which items one kernel call computes together."""

from __future__ import annotations

import torch

from vlkit.layers.attention_blocks import plan_blocks


def test_many_small_items_take_few_kernel_calls() -> None:
    """What makes packs of small images cheap: here 64 of them in at most four calls."""
    lengths = tuple(torch.randint(4, 33, (64,)).tolist())
    assert len(plan_blocks(lengths, 96)) <= 4
    assert len(plan_blocks((1024, 1024, 1024), 1152)) == 1
    places = [
        place
        for block in plan_blocks(lengths, 96)
        for place in (block.target if block.target is not None else block.gather)
    ]
    assert sorted(map(int, places)) == list(range(sum(lengths)))
