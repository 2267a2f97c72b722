"""The Gram form in bf16 on spectra that it could not take with other restarts.

R = x x^T is rounded where x is made anew, so its small eigenvalues no longer are those of x, and the steps until the next
restart amplify the difference. Where singular values come close to the edge of what a polynomial takes, they leave it.
"""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import pytest
import torch
from torch import Tensor

from vlkit.optim.newton_schulz import PRESETS, NewtonSchulz, resolve_polynomial

SHAPE = (256, 400)
LARGEST = {"keller": 1.21, "quintic": 1.15, "polar_express": 1.15, "ps5": 1.03, "ps4": 1.12, "deepseek_v4": 1.01}


@cache
def directions() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    u, _, vh = torch.linalg.svd(torch.randn(*SHAPE, generator=generator), full_matrices=False)
    return u, vh


def with_spectrum(values: Tensor) -> Tensor:
    u, vh = directions()
    return u * values.float() @ vh


def some_ones(count: int, rest: float) -> Tensor:
    """Equal singular values, and all others equal too: what a layer with a few strong directions has."""
    return torch.where(torch.arange(SHAPE[0]) < count, 1.0, rest)


def falling(exponent: float) -> Tensor:
    return torch.arange(1, SHAPE[0] + 1) ** -exponent


# Those of 250 spectra where some choice of restarts failed.
SPECTRA = {
    "1 in 256, rest 0.0258": some_ones(1, 0.0258),
    "1 in 256, rest 0.0625": some_ones(1, 0.0625),
    "8 in 256, rest 0.0625": some_ones(8, 0.0625),
    "64 in 256, rest 0.0346": some_ones(64, 0.0346),
    "64 in 256, rest 0.152": some_ones(64, 0.152),
    "128 in 256, rest 0.0258": some_ones(128, 0.0258),
    "192 in 256, rest 0.0192": some_ones(192, 0.0192),
    "192 in 256, rest 0.113": some_ones(192, 0.113),
    "flat": torch.ones(SHAPE[0]),
    "linear": torch.arange(1, SHAPE[0] + 1) / SHAPE[0],
    "falls by a half": falling(0.5),
    "falls by one": falling(1.0),
    "falls by three": falling(3.0),
    "two decades": torch.logspace(0, -2, SHAPE[0]),
}


def largest(newton_schulz: NewtonSchulz, values: Tensor) -> float:
    return torch.linalg.matrix_norm(newton_schulz(with_spectrum(values)).float(), 2).item()


def gram(preset: str, steps: int | None = None, restarts: tuple[int, ...] | None = None) -> NewtonSchulz:
    polynomial = resolve_polynomial(preset, steps)
    if restarts is not None:
        polynomial = replace(polynomial, restarts=restarts)
    norm = "schatten8" if preset in ("ps4", "ps5") else "frobenius"
    return NewtonSchulz(polynomial, norm, torch.bfloat16, "gram")  # type: ignore[arg-type]


@pytest.mark.parametrize("spectrum", SPECTRA)
@pytest.mark.parametrize("preset", LARGEST)
def test_gram_form_in_bf16_stays_where_exact_arithmetic_ends(preset: str, spectrum: str) -> None:
    """Rounding moves the largest singular value by less than 0.04 here."""
    assert preset in PRESETS
    assert largest(gram(preset), SPECTRA[spectrum]) < LARGEST[preset] + 0.06


@pytest.mark.parametrize("steps", [6, 8])
def test_other_numbers_of_steps_stay_bounded_too(steps: int) -> None:
    for preset in ("keller", "polar_express", "ps5", "ps4"):
        for spectrum in SPECTRA:
            assert largest(gram(preset, steps), SPECTRA[spectrum]) < 1.25, (preset, spectrum)


@pytest.mark.parametrize(
    ("preset", "restarts", "spectrum"),
    [
        ("keller", (2,), "64 in 256, rest 0.0346"),
        ("keller", (4,), "1 in 256, rest 0.0258"),
        ("polar_express", (2,), "192 in 256, rest 0.0192"),
        ("polar_express", (3,), "1 in 256, rest 0.0258"),
        ("ps4", (3,), "two decades"),
    ],
)
def test_fewer_restarts_would_not_do(preset: str, restarts: tuple[int, ...], spectrum: str) -> None:
    """These spectra can tell: the largest singular value is 1.5 at least."""
    assert not largest(gram(preset, restarts=restarts), SPECTRA[spectrum]) < 1.4
