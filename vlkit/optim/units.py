"""Units: the matrices inside a parameter on which the orthogonalisation runs.

    weight [out, in]                     one unit
    stack of experts [experts, out, in]  one unit per expert
    fused weight [q + k + v, in]         one unit per declared row block
    projection of heads                  one unit per head, where asked for: rows of q, k and v, columns of the output
    convolution [out, in, kh, kw]        one unit [out, in * kh * kw]

A unit is a view of the flattened parameter, so whoever holds only some of its elements can say which: a `Span` is a run
of elements that holds whole units.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Literal, NamedTuple

from torch import Tensor

from vlkit.errors import ConfigError


@dataclass(frozen=True)
class Units:
    """Equal matrices inside one parameter, as a view [count, rows, cols] of its elements in row-major order.

    Attributes:
        count: Matrices.
        rows: Rows of one; with cols, what the factor on the learning rate is made of.
        cols: Columns of one.
        offset: First element.
        strides: Elements from one matrix, row and column to the next.
    """

    count: int
    rows: int
    cols: int
    offset: int
    strides: tuple[int, int, int]

    def view(self, tensor: Tensor) -> Tensor:
        """The units of a contiguous tensor, [count, rows, cols], sharing memory.

        Args:
            tensor: Of the parameter's shape, or flat; for the units of a span, flat with the span's elements.
        """
        assert tensor.is_contiguous()
        return tensor.as_strided(
            (self.count, self.rows, self.cols), self.strides, tensor.storage_offset() + self.offset
        )

    @property
    def fills(self) -> bool:
        """Whether every matrix is a run of elements, without gaps."""
        return self.strides[1:] in ((self.cols, 1), (1, self.rows))

    def one(self, index: int, start: int = 0) -> Units:
        """Matrix `index` alone, with offsets counted from element `start`."""
        return Units(1, self.rows, self.cols, self.offset + index * self.strides[0] - start, self.strides)

    def bounds(self, index: int) -> tuple[int, int]:
        """First element of matrix `index`, and the one after its last."""
        first = self.offset + index * self.strides[0]
        return first, first + (self.rows - 1) * self.strides[1] + (self.cols - 1) * self.strides[2] + 1


class Span(NamedTuple):
    """A run of a parameter's elements that holds whole units: one, or the interleaved columns of several.

    Attributes:
        start: First element, in row-major order.
        stop: The one after the last.
        units: What lies there; offsets count from `start`.
    """

    start: int
    stop: int
    units: tuple[Units, ...]


class Cut(NamedTuple):
    """What a parameter's shape does not say about its matrices.

    Attributes:
        axis: Rows (0) or columns (1) are cut.
        sizes: Rows or columns of each piece; none leaves matrices whole.
        flatten: A 3-D parameter is one matrix, the kernel of a 1-D convolution.
        transposed: A matrix is stored as [in, out].
    """

    axis: Literal[0, 1] = 0
    sizes: tuple[int, ...] = ()
    flatten: bool = False
    transposed: bool = False


def cut_of(parameter: Tensor, name: str = "parameter") -> Cut:
    """What has been declared of a parameter: by its own attributes, each for itself, else by muon_param_groups.

    Raises:
        ConfigError: Rows and columns are both to be cut.
    """
    found: Cut = getattr(parameter, "muon_cut", Cut())
    rows, columns = getattr(parameter, "muon_splits", None), getattr(parameter, "muon_column_splits", None)
    if rows is not None and columns is not None:
        raise ConfigError(f"{name} has muon_splits={rows} and muon_column_splits={columns}; set one of them")
    if rows is not None:
        found = found._replace(axis=0, sizes=tuple(rows))
    if columns is not None:
        found = found._replace(axis=1, sizes=tuple(columns))
    return found._replace(
        flatten=getattr(parameter, "muon_flatten", found.flatten),
        transposed=getattr(parameter, "muon_transposed", found.transposed),
    )


def units_of(parameter: Tensor, name: str = "parameter") -> list[Units]:
    """The units of a parameter, in the order of their first elements.

    2-D is one matrix, 3-D a stack of matrices, more axes a convolution kernel flattened to [out, everything else]. Four
    attributes of the parameter say otherwise: `muon_splits` and `muon_column_splits`, row or column counts of the pieces of
    a matrix (query, key and value; gate and up; the heads of a projection), `muon_flatten = True` for 3-D kernels of 1-D
    convolutions, and `muon_transposed = True` for matrices stored as [in, out], whose rows are then counted as out.

    Raises:
        ConfigError: Fewer than two axes, or splits that do not add up.
    """
    shape = tuple(parameter.shape)
    if len(shape) < 2:
        raise ConfigError(
            f"{name} has shape {shape}: Muon takes matrices. Give it to a group with algorithm='adamw', "
            f"as muon_param_groups(model) does"
        )
    cut = cut_of(parameter, name)
    stacked = len(shape) == 3 and not cut.flatten
    count, sides = (shape[0], shape[1:]) if stacked else (1, (shape[0], math.prod(shape[1:])))
    strides = (sides[1], 1)
    if cut.transposed:
        sides, strides = (sides[1], sides[0]), (1, sides[1])
    length, step = sides[cut.axis], strides[cut.axis]
    sizes = cut.sizes or (length,)
    if cut.sizes and (sum(sizes) != length or min(sizes) < 1):
        what = "muon_column_splits" if cut.axis else "muon_splits"
        raise ConfigError(
            f"{name}: {what}={_listed(sizes)} adds up to {sum(sizes)} {'columns' if cut.axis else 'rows'}, "
            f"the weight has {length}"
        )
    found, start, numel = [], 0, math.prod(sides)
    for size, run in groupby(sizes):
        pieces = len(list(run))
        rows, cols = (sides[0], size) if cut.axis else (size, sides[1])
        if count == 1 or size * pieces * step == numel:  # matrices one step apart, all along
            between = size * step if pieces > 1 else numel
            found.append(Units(count * pieces, rows, cols, start * step, (between, *strides)))
        else:
            starts = range(start, start + size * pieces, size)
            found += [Units(count, rows, cols, first * step, (numel, *strides)) for first in starts]
        start += size * pieces
    return found


def spans_of(units: Sequence[Units]) -> list[Span]:
    """The shortest runs of elements that hold whole units, in order. Together they are all elements of the parameter."""
    single = [(*some.bounds(i), some, i) for some in units for i in range(some.count)]
    spans: list[tuple[int, int, list[tuple[Units, int]]]] = []
    for start, stop, some, i in sorted(single, key=lambda item: item[:2]):
        if spans and start < spans[-1][1]:
            first, last, members = spans[-1]
            spans[-1] = (first, max(last, stop), [*members, (some, i)])
        else:
            spans.append((start, stop, [(some, i)]))
    return [Span(start, stop, tuple(some.one(i, start) for some, i in members)) for start, stop, members in spans]


def _listed(sizes: tuple[int, ...]) -> str:
    return str(sizes) if len(sizes) <= 8 else f"({', '.join(map(str, sizes[:8]))}, ... {len(sizes)} in all)"
