"""DPO, BCO with its running threshold, and MPO: published worked cases, written-out formulas, and what survives a restart."""

from __future__ import annotations

import json
import math

import pytest
import torch
from torch import Tensor

from tests.ranks import run_ranks
from vlkit.errors import ConfigError, LayoutError
from vlkit.objectives.preference import (
    Rewards,
    RewardShift,
    bco_loss,
    dpo_loss,
    implicit_rewards,
    mpo_loss,
)


def pairs(*rows: tuple[float, float, float, float], beta: float = 0.1) -> Rewards:
    """Of rows (chosen, rejected, reference of chosen, reference of rejected)."""
    return implicit_rewards(*torch.tensor(rows, dtype=torch.float64).T, beta=beta)


@pytest.mark.parametrize(
    ("row", "loss"),
    [
        ((-10.0, -12.0, -11.0, -11.0), 0.59813887),
        ((-12.0, -10.0, -11.0, -11.0), 0.79813887),
        ((-11.0, -11.0, -11.0, -11.0), 0.69314718),
    ],
)
def test_dpo_of_worked_cases(row: tuple[float, float, float, float], loss: float) -> None:
    assert dpo_loss(pairs(row)).item() == pytest.approx(loss, abs=5e-9)


def test_dpo_equals_its_formula_and_pulls_the_answers_apart() -> None:
    generator = torch.Generator().manual_seed(0)
    given = [torch.randn(7, generator=generator, dtype=torch.float64, requires_grad=True) for _ in range(4)]
    losses = dpo_loss(implicit_rewards(*given, beta=0.3))
    for i in range(7):
        chosen, rejected, reference_chosen, reference_rejected = (each[i].item() for each in given)
        margin = 0.3 * ((chosen - reference_chosen) - (rejected - reference_rejected))
        assert losses[i].item() == pytest.approx(math.log1p(math.exp(-margin)), rel=1e-12)
    up, down = torch.autograd.grad(losses.sum(), given[:2])
    assert bool((up < 0).all())
    torch.testing.assert_close(up, -down, rtol=0, atol=0)


def test_mpo_of_worked_cases() -> None:
    """Rewards of two pairs and of one; the threshold is updated with the pairs that it then judges."""
    shift, two = RewardShift(), pairs((3.0, -1.0, 0.0, 0.0), (-2.0, 1.0, 0.0, 0.0))
    assert shift.update(two) == pytest.approx(0.025, abs=1e-12)
    chosen = torch.tensor([-1.234 * 4, -1.234 * 3], dtype=torch.float64)
    for value, total in ((shift.value, 2.055046), (0.0, 2.055077)):
        found = mpo_loss(two, chosen, shift=value, num_pairs=2, num_tokens=7)
        assert found.total.item() == pytest.approx(total, abs=5e-7)
    one = pairs((-10.0, -12.0, -11.0, -11.5))
    assert RewardShift().update(one) == pytest.approx(0.025, abs=1e-12)
    assert dpo_loss(one).item() == pytest.approx(0.620957, abs=5e-7)
    assert bco_loss(one, 0.025).item() == pytest.approx(1.312700, abs=5e-7)
    assert bco_loss(one, 0.0).item() == pytest.approx(1.312856, abs=5e-7)
    assert (0.8 * dpo_loss(one) + 0.2 * bco_loss(one, 0.025)).item() == pytest.approx(0.759306, abs=5e-7)


def test_parts_of_a_step_add_up_to_its_mpo() -> None:
    generator = torch.Generator().manual_seed(1)
    numbers = torch.randn(4, 5, generator=generator, dtype=torch.float64) - 9

    def total(rows: slice) -> Tensor:
        given = numbers[:, rows]
        rewards = implicit_rewards(*given, beta=0.1)
        return mpo_loss(rewards, given[0], shift=0.01, num_pairs=5, num_tokens=31).total

    torch.testing.assert_close(total(slice(0, 2)) + total(slice(2, 2)) + total(slice(2, 5)), total(slice(0, 5)))


def test_the_threshold_is_the_mean_of_the_means_of_all_updates() -> None:
    steps = [pairs((1.0, 2.0, 0.0, 0.0)), pairs((4.0, 0.0, 0.0, 0.0), (4.0, 4.0, 0.0, 0.0), beta=1.0)]
    shift = RewardShift()
    for rewards in steps:
        shift.update(rewards)
    assert shift.value == pytest.approx((0.15 + 3.0) / 2, rel=1e-12)


def test_the_threshold_carries_no_gradient_and_ignores_what_is_not_finite() -> None:
    shift = RewardShift()
    shift.update(Rewards(torch.ones(2, requires_grad=True), torch.ones(2, requires_grad=True)))
    assert isinstance(shift.value, float)
    before = shift.state_dict()
    shift.update(Rewards(torch.tensor([float("nan")]), torch.ones(1)))
    shift.update(Rewards(torch.empty(0), torch.empty(0)))
    assert shift.state_dict() == before == {"value": 1.0, "updates": 1}


def test_a_restored_threshold_goes_on_to_the_bit() -> None:
    generator = torch.Generator().manual_seed(2)
    steps = [Rewards(*torch.randn(2, 3, generator=generator)) for _ in range(6)]
    whole, first, second = RewardShift(), RewardShift(), RewardShift()
    for step in steps:
        whole.update(step)
    for step in steps[:3]:
        first.update(step)
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    for step in steps[3:]:
        second.update(step)
    assert second.state_dict() == whole.state_dict()


def _update_on(rank: int, shares: list[list[float]]) -> float:
    import torch.distributed as dist

    shift = RewardShift()
    mine = torch.tensor(shares[rank])
    shift.update(Rewards(mine, 2 * mine), dist.group.WORLD)
    return shift.update(Rewards(mine[:0], mine[:0]), dist.group.WORLD)


def test_the_threshold_is_of_the_answers_of_all_ranks_however_they_are_divided() -> None:
    """Two pairs on one rank, none on another, one on the third: not the mean of the ranks' means."""
    assert run_ranks(_update_on, 3, [[1.0, 2.0], [], [6.0]]) == [pytest.approx(4.5, rel=1e-12)] * 3


def test_mistakes_are_named() -> None:
    with pytest.raises(LayoutError, match=r"one log-probability per pair"):
        implicit_rewards(torch.ones(2), torch.ones(2), torch.ones(2), torch.ones(3), 0.1)
    with pytest.raises(ConfigError, match="beta must be above 0, found 0"):
        pairs((1.0, 1.0, 1.0, 1.0), beta=0.0)
    with pytest.raises(ConfigError, match="three weights"):
        mpo_loss(pairs((1.0, 1.0, 1.0, 1.0)), torch.ones(1), shift=0.0, num_pairs=1, num_tokens=1, weights=(0.8, 0.2))
