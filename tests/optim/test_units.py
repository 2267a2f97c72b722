"""A unit in a larger parameter gets what it would get as a parameter of its own, bit for bit."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from vlkit.errors import ConfigError
from vlkit.optim import Muon
from vlkit.optim.units import Units, spans_of, units_of

Pieces = Callable[[Tensor], Sequence[Tensor]]

WAYS: dict[str, tuple[tuple[int, ...], dict[str, Any], Pieces]] = {
    "whole": ((9, 7), {}, lambda w: [w]),
    "stack": ((5, 9, 7), {}, lambda w: list(w)),
    "one expert": ((1, 9, 7), {}, lambda w: list(w)),
    "fused rows": ((23, 10), {"muon_splits": (15, 4, 4)}, lambda w: w.split((15, 4, 4))),
    "fused rows of a stack": (
        (3, 23, 10),
        {"muon_splits": (15, 4, 4)},
        lambda w: [part for matrix in w for part in matrix.split((15, 4, 4))],
    ),
    "gate and up of a stack": (
        (3, 14, 5),
        {"muon_splits": (7, 7)},
        lambda w: [part for matrix in w for part in matrix.split(7)],
    ),
    "heads in rows": ((12, 10), {"muon_splits": (3,) * 4}, lambda w: w.split(3)),
    "heads in columns": ((10, 12), {"muon_column_splits": (3,) * 4}, lambda w: w.split(3, dim=1)),
    "uneven columns": ((10, 12), {"muon_column_splits": (5, 6, 1)}, lambda w: w.split((5, 6, 1), dim=1)),
    "columns of a stack": (
        (2, 6, 8),
        {"muon_column_splits": (4, 4)},
        lambda w: [part for matrix in w for part in matrix.split(4, dim=1)],
    ),
    "convolution": ((12, 5, 3, 3), {}, lambda w: [w.flatten(1)]),
    "convolution over clips": ((6, 4, 2, 3, 3), {}, lambda w: [w.flatten(1)]),
    "convolution over sound": ((6, 5, 3), {"muon_flatten": True}, lambda w: [w.flatten(1)]),
    "stack stored as [in, out]": ((4, 9, 6), {"muon_transposed": True}, lambda w: list(w.mT)),
    "matrix stored as [in, out]": ((9, 6), {"muon_transposed": True}, lambda w: [w.mT]),
    "gate and up stored as [in, out]": (
        (3, 5, 14),
        {"muon_transposed": True, "muon_splits": (7, 7)},
        lambda w: [part for matrix in w.mT for part in matrix.split(7)],
    ),
}


def declared(shape: tuple[int, ...], attributes: dict[str, Any]) -> nn.Parameter:
    parameter = nn.Parameter(torch.randn(shape, generator=torch.Generator().manual_seed(0)))
    for name, value in attributes.items():
        setattr(parameter, name, value)
    return parameter


@pytest.mark.parametrize("adjust_lr", ["match_rms_adamw", "original", "spectral_unclamped"])
@pytest.mark.parametrize("way", WAYS)
def test_a_unit_is_a_parameter_of_its_own(way: str, adjust_lr: str) -> None:
    """Weight, momentum and decay, over three steps; the factor on the rate is that of the unit's own shape."""
    shape, attributes, pieces = WAYS[way]
    whole = declared(shape, attributes)
    alone = [nn.Parameter(piece.detach().clone(memory_format=torch.contiguous_format)) for piece in pieces(whole)]
    first, second = Muon([whole], 0.1, adjust_lr=adjust_lr), Muon(alone, 0.1, adjust_lr=adjust_lr)
    for step in range(3):
        whole.grad = torch.randn(shape, generator=torch.Generator().manual_seed(step + 1))
        for parameter, grad in zip(alone, pieces(whole.grad), strict=True):
            parameter.grad = grad.clone(memory_format=torch.contiguous_format)
        first.step()
        second.step()
    for parameter, piece in zip(alone, pieces(whole.detach()), strict=True):
        assert torch.equal(parameter, piece)


def test_a_large_matrix_in_columns_is_its_columns() -> None:
    """Large units go matrix by matrix, through views with gaps."""
    whole = declared((260, 520), {"muon_column_splits": (260, 260)})
    alone = [nn.Parameter(piece.detach().clone()) for piece in whole.split(260, dim=1)]
    whole.grad = torch.randn(260, 520, generator=torch.Generator().manual_seed(1))
    for parameter, grad in zip(alone, whole.grad.split(260, dim=1), strict=True):
        parameter.grad = grad.clone()
    Muon([whole], 0.1).step()
    Muon(alone, 0.1).step()
    assert torch.equal(whole, torch.cat(alone, dim=1))


@pytest.mark.parametrize("way", WAYS)
def test_units_are_views_that_cover_the_parameter_once(way: str) -> None:
    shape, attributes, _ = WAYS[way]
    weight = torch.zeros(shape)
    for name, value in attributes.items():
        setattr(weight, name, value)
    for units in units_of(weight):
        units.view(weight).add_(1)
        units.view(weight.view(-1)).add_(1)  # a flat tensor will do
    assert weight.eq(2).all()


@pytest.mark.parametrize("way", WAYS)
def test_spans_hold_whole_units_and_everything(way: str) -> None:
    """Whoever gathers the elements of a span has all that its units need."""
    shape, attributes, pieces = WAYS[way]
    weight = declared(shape, attributes).detach()
    for name, value in attributes.items():
        setattr(weight, name, value)
    spans = spans_of(units_of(weight))
    assert [span.start for span in spans] == [0, *(span.stop for span in spans[:-1])]
    assert spans[-1].stop == weight.numel()
    found = []
    for span in spans:
        gathered = weight.view(-1)[span.start : span.stop].clone()
        found += [units.view(gathered)[0] for units in span.units]
    assert all(torch.equal(a, b) for a, b in zip(found, pieces(weight), strict=True))
    has_gaps = "columns" in way or way == "gate and up stored as [in, out]"
    assert all(len(span.units) == 1 and span.units[0].fills for span in spans) is not has_gaps


def test_equal_heads_are_one_batch() -> None:
    """What is one step apart is one view, whatever the number of heads."""
    heads = units_of(declared((12, 10), {"muon_column_splits": (2,) * 5}))
    assert heads == [Units(5, 12, 2, 0, (2, 10, 1))]


@pytest.mark.parametrize(
    ("shape", "attributes", "words"),
    [
        ((10, 4), {"muon_splits": (5, 4)}, "muon_splits=.* adds up to 9 rows, the weight has 10"),
        ((10, 4), {"muon_column_splits": (5,)}, "muon_column_splits=.* adds up to 5 columns, the weight has 4"),
        ((10, 4), {"muon_splits": (10, 0)}, "muon_splits"),
        ((10, 4), {"muon_splits": (5, 5), "muon_column_splits": (2, 2)}, "set one of them"),
        ((5,), {}, r"shape \(5,\): Muon takes matrices"),
    ],
)
def test_units_that_cannot_be_are_refused(shape: tuple[int, ...], attributes: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        Muon([declared(shape, attributes)], 0.1)
