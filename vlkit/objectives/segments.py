"""Sums and means over the items of a packed tensor: what each sequence, answer or image gets of values per token."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from vlkit.errors import LayoutError
from vlkit.packing import Layout


def segment_sum(values: Float[Tensor, "tokens ..."], layout: Layout) -> Float[Tensor, "items ..."]:
    """The sum of every item's values, fp32 (fp64 for fp64). An item's sum does not depend on its neighbours, by a bit.

    Added up in fp64 where the device has it: one by one in fp32, a thousand equal numbers are already wrong by 1e-5.

    Args:
        values: One value, or one row of values, per token.
        layout: Where each item starts.

    Raises:
        LayoutError: Another number of values than the layout has tokens.
    """
    if values.ndim < 1 or values.shape[0] != layout.num_tokens:
        raise LayoutError(f"expected one value per token of {layout.num_tokens}, found a tensor {list(values.shape)}")
    dtype = torch.float64 if values.dtype == torch.float64 else torch.float32
    exact = torch.float32 if values.device.type == "mps" else torch.float64
    sums = torch.zeros((layout.num_items, *values.shape[1:]), dtype=exact, device=values.device)
    return sums.index_add(0, layout.item_ids(values.device).long(), values.to(exact)).to(dtype)


def segment_mean(
    values: Float[Tensor, " tokens"], mask: Bool[Tensor, " tokens"], layout: Layout
) -> Float[Tensor, " items"]:
    """The mean of every item's values over the tokens that the mask names; 0 for an item without any.

    What is masked out has no effect, not even as infinity or NaN, and gets the gradient 0.

    Args:
        values: One value per token.
        mask: Which tokens count.
        layout: Where each item starts.

    Raises:
        LayoutError: Another number of values or marks than the layout has tokens.
    """
    if values.shape != mask.shape:
        raise LayoutError(f"expected one mark per value, found {list(mask.shape)} for {list(values.shape)}")
    counts = segment_sum(mask.float(), layout)
    return segment_sum(values.masked_fill(~mask, 0), layout) / counts.clamp(min=1)
