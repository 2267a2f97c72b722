"""Sampling draws from exactly the truncated distribution."""

from __future__ import annotations

import pytest
import torch

from vlkit.errors import ConfigError
from vlkit.generation import Sampler
from vlkit.generation.sampling import sequence_seeds, truncated_probabilities

LOGITS = torch.log(torch.tensor([[0.1, 0.4, 0.2, 0.25, 0.05]]))


@pytest.mark.parametrize(
    ("options", "want"),
    [
        ({}, [0.1, 0.4, 0.2, 0.25, 0.05]),
        ({"top_k": 2}, [0, 0.4 / 0.65, 0, 0.25 / 0.65, 0]),
        ({"top_p": 0.6}, [0, 0.4 / 0.65, 0, 0.25 / 0.65, 0]),  # 0.4 is short of 0.6: the next one is in
        ({"top_p": 0.39}, [0, 1.0, 0, 0, 0]),
        ({"top_p": 1e-9}, [0, 1.0, 0, 0, 0]),
        ({"top_k": 3, "top_p": 0.7}, [0, 0.4 / 0.65, 0, 0.25 / 0.65, 0]),  # 0.4/0.85 + 0.25/0.85 > 0.7
        ({"top_k": 99}, [0.1, 0.4, 0.2, 0.25, 0.05]),
    ],
)
def test_truncation(options: dict, want: list[float]) -> None:
    got = truncated_probabilities(LOGITS, temperature=1.0, **options)
    torch.testing.assert_close(got, torch.tensor([want]))


def test_temperature_sharpens() -> None:
    got = truncated_probabilities(LOGITS, temperature=0.5)
    square = LOGITS.exp() ** 2
    torch.testing.assert_close(got, square / square.sum())


def test_draws_follow_the_distribution() -> None:
    """20,000 draws: every frequency within four standard deviations."""
    count = 20_000
    sampler = Sampler(1, temperature=1.0, top_k=3, seed=5)
    want = truncated_probabilities(LOGITS, temperature=1.0, top_k=3)[0]
    drawn = sampler(LOGITS.expand(count, -1), [0] * count)
    got = torch.bincount(drawn, minlength=5) / count
    assert bool(((got - want).abs() <= 4 * (want * (1 - want) / count).sqrt()).all())


def test_greedy_takes_the_likeliest() -> None:
    assert Sampler(1)(LOGITS, [0]).tolist() == [1]


@pytest.mark.parametrize(
    "options", [{"temperature": -1.0}, {"top_p": 0.0}, {"top_p": 1.1}, {"top_k": -1}, {"temperature": float("nan")}]
)
def test_options_out_of_range_are_refused(options: dict) -> None:
    with pytest.raises(ConfigError, match=next(iter(options))):
        Sampler(1, **options)


def test_neighbouring_seeds_share_no_draws() -> None:
    """Best-of-n with seeds 0, 1, 2, ... must not repeat answers shifted by one sequence."""
    seeds = [sequence_seeds(seed, 8) for seed in range(50)]
    assert len({each for row in seeds for each in row}) == 400
    assert all(0 <= each < 2**63 for row in seeds for each in row)
    assert sequence_seeds(7, 3) == sequence_seeds(7, 8)[:3]


def test_seeds_can_be_given_one_by_one() -> None:
    logits = torch.randn(1, 50).expand(3, 50)
    whole = Sampler(3, temperature=1.0, seed=4)(logits, [0, 1, 2])
    alone = [Sampler(1, temperature=1.0, seed=[seed])(logits[:1], [0]) for seed in sequence_seeds(4, 3)]
    assert torch.equal(whole, torch.cat(alone))
    with pytest.raises(ConfigError, match="2 seeds for 3 sequences"):
        Sampler(3, seed=[1, 2])
