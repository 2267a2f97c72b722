"""Units: the matrices inside a parameter on which the orthogonalisation runs.

weight [out, in]                    one unit
stack of experts [experts, out, in]  one unit per expert
fused weight [q + k + v, in]         one unit per declared row block
convolution [out, in, kh, kw]        one unit [out, in * kh * kw]
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor

from vlkit.errors import ConfigError


@dataclass(frozen=True)
class Units:
    """Equal matrices inside one parameter: seen as [count, parent_rows, cols], rows `start` to `start + rows` of each.

    Attributes:
        count: Matrices: the experts of a stack, else 1.
        parent_rows: Rows of one matrix before it is split in row blocks.
        start: First row.
        rows: Rows of a unit.
        cols: Columns of a unit.
    """

    count: int
    parent_rows: int
    start: int
    rows: int
    cols: int

    def view(self, tensor: Tensor) -> Tensor:
        """The units of a contiguous tensor of the parameter's shape, [count, rows, cols], sharing memory."""
        whole = tensor.view(self.count, self.parent_rows, self.cols)
        return whole if self.rows == self.parent_rows else whole[:, self.start : self.start + self.rows]


def units_of(parameter: Tensor, name: str = "parameter") -> list[Units]:
    """The units of a parameter, in row order.

    2-D is one matrix, 3-D a stack of matrices, more axes a convolution kernel flattened to [out, everything else]. Two
    attributes of the parameter say otherwise: `muon_splits`, row counts of the blocks of a fused weight (query, key and
    value; gate and up; or the heads of a projection, one by one), and `muon_flatten = True`, for 3-D kernels of 1-D
    convolutions.

    Raises:
        ConfigError: Fewer than two axes, or splits that do not add up to the rows.
    """
    shape = tuple(parameter.shape)
    if len(shape) < 2:
        raise ConfigError(
            f"{name} has shape {shape}: Muon takes matrices. Give it to a group with algorithm='adamw', "
            f"as muon_param_groups(model) does"
        )
    if len(shape) == 3 and not getattr(parameter, "muon_flatten", False):
        count, rows, cols = shape
    else:
        count, rows, cols = 1, shape[0], math.prod(shape[1:])
    declared = tuple(getattr(parameter, "muon_splits", ()))
    splits = declared or (rows,)
    if declared and (sum(splits) != rows or min(splits) < 1):
        raise ConfigError(f"{name}: muon_splits={splits} adds up to {sum(splits)} rows, the weight has {rows}")
    starts = [sum(splits[:i]) for i in range(len(splits))]
    return [Units(count, rows, start, size, cols) for start, size in zip(starts, splits, strict=True)]
