"""Where images and videos stand in the text: the rows of their placeholders, and the positions that follow from their grids.

ids, layouts of text and of visual tokens -> placeholder_rows -> rows [visual tokens]
rows, grids                               -> grid_positions   -> (time, row, column) of every token
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from functools import partial
from math import floor
from typing import Literal

import torch
from jaxtyping import Int
from torch import Tensor

from vlkit.errors import PlaceholderMismatchError
from vlkit.packing import Layout

PositionRule = Literal["original", "transformers-5"]


def placeholder_rows(mask: Tensor, text: Layout, visual: Layout) -> Int[Tensor, " rows"]:
    """Where the tokens of every image and video go, in their order.

    One look at the mask on the host per forward: placeholders are found by id, so that a batch cannot claim others.

    Args:
        mask: True at placeholders [tokens].
        text: Layout of the sequences.
        visual: Layout of the projected images and videos.

    Raises:
        PlaceholderMismatchError: Names the first image whose placeholders are not one run of its length in one sequence.
    """
    rows = mask.nonzero().squeeze(1)
    host = rows.tolist()
    if len(host) == visual.num_tokens:
        spans = [
            (host[start], host[start + n - 1], n) for start, n in zip(visual.offsets, visual.lengths, strict=False)
        ]
        item_of = partial(bisect_right, text.offsets)
        if all(last - first == n - 1 and item_of(first) == item_of(last) for first, last, n in spans):
            return rows
    boundaries = set(text.offsets)
    runs: list[int] = []
    for previous, row in zip([-2, *host], host, strict=False):
        if row != previous + 1 or row in boundaries:
            runs.append(0)
        runs[-1] += 1
    for image, tokens in enumerate(visual.lengths):
        found = runs[image] if image < len(runs) else 0
        if found != tokens:
            grid = visual.grids[image] if visual.grids else None
            raise PlaceholderMismatchError(
                f"image {image}: the text has {found} placeholders but the image gives {tokens} tokens "
                f"(grid {grid} after merging; {len(host)} placeholders in {len(runs)} runs for {visual.num_items} images "
                f"with {visual.num_tokens} tokens in all). Was the chat rendered with another processor?"
            )
    raise PlaceholderMismatchError(
        f"the text has {len(host)} placeholders in {len(runs)} runs, "
        f"the {visual.num_items} images give {visual.num_tokens} tokens"
    )


def grid_positions(
    text: Layout,
    rows: Sequence[int],
    visual: Layout,
    *,
    ticks: Sequence[float] | None = None,
    starts: Sequence[int] | None = None,
    rule: PositionRule = "original",
) -> Int[Tensor, "tokens 3"]:
    """(time, row, column) of every token, as M-RoPE counts them.

    A counter p runs through a sequence. Text takes (p, p, p) and p grows by one. The token of an image or video at time
    step k, row r and column c takes (p + floor(k * ticks), p + r, p + c); after it p is one more than the highest number
    used.

    Args:
        text: Layout of the sequences.
        rows: The first placeholder of every image and video, rising.
        visual: Layout of their tokens, with merged grids.
        ticks: Positions between two time steps of each; None means 1.
        starts: Where each sequence begins to count; None means 0.
        rule: "transformers-5" advances p by the longer side of the merged grid only, as that library's releases 5.x do for
            videos: text after a video of many time steps then shares positions with it. Images are the same under both.

    Returns:
        int64, on the host.

    Source: Qwen2-VL, arXiv:2409.12191, section 2.1; time steps: Qwen2.5-VL, arXiv:2502.13923, section 2.1.2.
    """
    positions = torch.empty(text.num_tokens, 3, dtype=torch.int64)
    assert visual.grids is not None
    visuals = list(zip(rows, visual.grids, ticks or [1.0] * visual.num_items, strict=True))
    done = 0
    for item, (begin, end) in enumerate(zip(text.offsets, text.offsets[1:], strict=False)):
        p, row = (starts[item] if starts is not None else 0), begin
        while done < len(visuals) and visuals[done][0] < end:
            first, (t, h, w), step = visuals[done]
            done += 1
            positions[row:first] = torch.arange(p, p + first - row)[:, None]
            p += first - row
            times = torch.tensor([floor(k * step) for k in range(t)])
            row = first + t * h * w
            positions[first:row] = p + torch.cartesian_prod(times, torch.arange(h), torch.arange(w)).view(-1, 3)
            p += max(h, w) if rule == "transformers-5" else max(int(times[-1]) + 1, h, w)
        positions[row:end] = torch.arange(p, p + end - row)[:, None]
    return positions
