"""Advantages, the clipped loss in its variants, and mirror descent: worked cases, written-out formulas, known optima."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from vlkit.errors import ConfigError, LayoutError
from vlkit.objectives.policy import (
    VARIANTS,
    answer_weights,
    group_advantages,
    informative,
    kl_estimate,
    length_reward,
    mirror_descent_loss,
    overlong_penalty,
    policy_loss,
    tilted_advantages,
)
from vlkit.packing import Layout


def rewards_of(*groups: list[float]) -> tuple[Tensor, Tensor]:
    values = torch.tensor([reward for group in groups for reward in group], dtype=torch.float64)
    return values, torch.tensor([9 - i for i, group in enumerate(groups) for _ in group])


def test_advantages_of_the_worked_case() -> None:
    rewards, groups = rewards_of([1, 0, 0, 1, 1, 0, 0, 0])
    found = group_advantages(rewards, groups, eps=1e-6)
    want = torch.where(rewards > 0, 1.207612, -0.724567)
    torch.testing.assert_close(found, want.float(), rtol=0, atol=5e-7)


def test_a_group_is_compared_with_itself_alone_whatever_the_order() -> None:
    rewards, groups = rewards_of([1, 2, 4], [10, 10.5])
    mixed = torch.tensor([3, 0, 4, 2, 1])
    found = group_advantages(rewards[mixed], groups[mixed], "none")
    torch.testing.assert_close(found, (rewards - torch.tensor([7 / 3] * 3 + [10.25] * 2))[mixed].float())
    deviation = float(torch.tensor([1.0, 2.0, 4.0]).std())
    assert group_advantages(rewards, groups)[0].item() == pytest.approx((1 - 7 / 3) / (deviation + 1e-4), rel=1e-6)
    whole = group_advantages(rewards, groups, "batch")
    torch.testing.assert_close(whole, (group_advantages(rewards, groups, "none") / (rewards.std() + 1e-4)).float())


def test_equal_rewards_and_lone_answers_teach_nothing() -> None:
    rewards, groups = rewards_of([0.1] * 3, [5.0], [0.0, 1.0])
    for scale in ("group", "none"):
        assert group_advantages(rewards, groups, scale)[:4].tolist() == [0.0] * 4  # type: ignore[arg-type]
    assert informative(rewards, groups).tolist() == [False] * 4 + [True] * 2
    assert group_advantages(rewards[:0], groups[:0]).tolist() == []


def written_out(
    log_probs: list[list[float]], old: list[list[float]], reference: list[list[float]], advantages: list[float]
) -> list[list[float]]:
    """-min(q A, clip(q) A) + 0.05 k3, with clips 0.2 and 0.28."""
    found = []
    for ours, before, frozen, a in zip(log_probs, old, reference, advantages, strict=True):
        row = []
        for lp, lo, lr in zip(ours, before, frozen, strict=True):
            q, d = math.exp(lp - lo), lr - lp
            row.append(-min(q * a, min(max(q, 0.8), 1.28) * a) + 0.05 * (math.exp(d) - d - 1))
        found.append(row)
    return found


def test_variants_equal_their_formulas() -> None:
    """Three answers of 2, 0 and 3 tokens behind prompts of 1, 2 and 1: every aggregation, with gradients."""
    generator = torch.Generator().manual_seed(0)
    layout, lengths = Layout((3, 2, 4)), [2, 0, 3]
    mask = torch.tensor([True, True, False, False, False, True, True, True, False])
    answers = [torch.randn(3, n, generator=generator, dtype=torch.float64) * 0.4 for n in lengths]
    advantages = [1.5, -0.5, -0.7]
    flat = torch.zeros(3, 9, dtype=torch.float64)
    flat[:, mask] = torch.cat(answers, dim=1)
    ours = flat[0].clone().requires_grad_()
    spread = torch.tensor(advantages, dtype=torch.float64)[layout.item_ids().long()] * mask
    terms = policy_loss(ours, flat[1], spread, clip=(0.2, 0.28), reference=flat[2], kl_weight=0.05)
    want = written_out(*([answer[k].tolist() for answer in answers] for k in range(3)), advantages)
    wanted = {
        "answer": (sum(want[0]) / 2 + sum(want[2]) / 3) / 3,
        "constant": (sum(want[0]) + sum(want[2])) / (3 * 8),
        "tokens": (sum(want[0]) + sum(want[2])) / 5,
        "local": (sum(want[0]) + sum(want[2])) / 5 / 2,
    }
    for aggregate, expected in wanted.items():
        weights = answer_weights(
            mask,
            layout,
            aggregate,
            num_answers=3,
            num_tokens=10 if aggregate == "local" else 5,
            max_tokens=8,  # type: ignore[arg-type]
        )
        assert (terms.loss * weights).sum().item() == pytest.approx(expected, rel=1e-6)
    q = [math.exp(a - b) for a, b in zip(answers[0][0].tolist(), answers[0][1].tolist(), strict=True)]
    assert terms.clipped[:2].tolist() == [each > 1.28 for each in q]
    (grad,) = torch.autograd.grad(terms.loss.sum(), ours)
    for i, row in enumerate(mask.nonzero().squeeze(1).tolist()):
        lp, lo, lr = torch.cat(answers, dim=1)[:, i].tolist()
        a, ratio = spread[row].item(), math.exp(lp - lo)
        held = (a > 0 and ratio > 1.28) or (a < 0 and ratio < 0.8)
        assert terms.clipped[row].item() == held
        assert grad[row].item() == pytest.approx((0 if held else -ratio * a) + 0.05 * (1 - math.exp(lr - lp)), rel=1e-9)


def test_the_first_step_has_the_policy_gradient() -> None:
    ours = torch.tensor([-1.0, -2.5, -0.3], dtype=torch.float64, requires_grad=True)
    advantages = torch.tensor([0.5, -2.0, 0.0], dtype=torch.float64)
    terms = policy_loss(ours, ours.detach(), advantages, clip=(0.0, 0.0))
    assert terms.loss.tolist() == (-advantages).tolist()
    assert not terms.clipped.any()
    terms = policy_loss(ours, ours.detach(), advantages)
    torch.testing.assert_close(torch.autograd.grad(terms.loss.sum(), ours)[0], -advantages, rtol=0, atol=0)


def test_variants_are_what_their_papers_say() -> None:
    assert (VARIANTS["grpo"].scale, VARIANTS["grpo"].aggregate, VARIANTS["grpo"].clip) == (
        "group",
        "answer",
        (0.2, 0.2),
    )
    assert VARIANTS["dr-grpo"][:2] == ("none", "constant")
    assert VARIANTS["dapo"] == ("group", "tokens", (0.2, 0.28), True)
    assert VARIANTS["bnpo"].aggregate == "local"


def expected_gradient(logits: Tensor, values: Tensor) -> Tensor:
    """Of the sum over actions of p (held) * value: what sampling from the policy itself estimates."""
    weights = logits.softmax(0).detach()
    (grad,) = torch.autograd.grad((weights * values).sum(), logits)
    return grad


def test_gradients_of_the_distance_estimates() -> None:
    """On the policy's own answers: k1 none, k2 that of KL(policy || reference), k3 that of KL(reference || policy)."""
    generator = torch.Generator().manual_seed(3)
    logits = torch.randn(5, generator=generator, dtype=torch.float64, requires_grad=True)
    reference = torch.randn(5, generator=generator, dtype=torch.float64).log_softmax(0)
    ours = logits.log_softmax(0)
    forward = (ours.exp() * (ours - reference)).sum()
    (towards,) = torch.autograd.grad(forward, logits, retain_graph=True)
    (backwards,) = torch.autograd.grad((reference.exp() * (reference - ours)).sum(), logits, retain_graph=True)
    estimates = {kl: kl_estimate(logits.log_softmax(0), reference, kl) for kl in ("k1", "k2", "k3")}  # type: ignore[arg-type]
    torch.testing.assert_close(expected_gradient(logits, estimates["k1"]), torch.zeros_like(logits), rtol=0, atol=1e-15)
    torch.testing.assert_close(expected_gradient(logits, estimates["k2"]), towards)
    torch.testing.assert_close(expected_gradient(logits, estimates["k3"]), backwards)
    assert torch.cosine_similarity(towards, backwards, dim=0) < 0.999
    for kl in ("k1", "k3"):
        mean = (ours.exp() * kl_estimate(ours, reference, kl)).sum()  # type: ignore[arg-type]
        assert mean.item() == pytest.approx(forward.item(), rel=1e-12)


def test_lengths_of_the_worked_case() -> None:
    lengths = torch.tensor([100, 200, 300, 300, 5, 5])
    correct = torch.tensor([True, True, True, False, True, True])
    groups = torch.tensor([4, 4, 4, 4, 1, 1])
    assert length_reward(lengths, correct, groups).tolist() == [0.5, 0.0, -0.5, -0.5, 0.0, 0.0]
    assert length_reward(lengths[:3], torch.tensor([False, False, True]), groups[:3]).tolist() == [0.0, 0.0, -0.5]


def test_the_penalty_for_length_falls_from_the_margin_on() -> None:
    lengths = torch.tensor([0, 6, 7, 8, 10, 11])
    assert overlong_penalty(lengths, 10, 4).tolist() == [0.0, 0.0, -0.25, -0.5, -1.0, -1.0]
    with pytest.raises(ConfigError, match="margin must lie between 1 and max_tokens = 10, found 11"):
        overlong_penalty(lengths, 10, 11)


@pytest.mark.parametrize("tau", [0.1, 1.0, 10.0])
def test_mirror_descent_is_the_surrogate_without_its_factor(tau: float) -> None:
    """grad of the mean of (A - tau * log ratio)^2 is 2 tau times ours."""
    generator = torch.Generator().manual_seed(4)
    table = torch.randn(4, 3, generator=generator, dtype=torch.float64, requires_grad=True)
    old, advantages = torch.randn(2, 4, generator=generator, dtype=torch.float64)
    ours = table.log_softmax(1)[:, 0]
    (found,) = torch.autograd.grad(mirror_descent_loss(ours, old, advantages, tau).mean(), table, retain_graph=True)
    (surrogate,) = torch.autograd.grad((advantages - tau * (ours - old)).square().mean(), table)
    torch.testing.assert_close(found, surrogate / (2 * tau), rtol=1e-12, atol=1e-15)


def test_a_bandit_comes_to_the_tilted_policy() -> None:
    """Three arms, their exact shares as samples: the optimum is old * exp(reward / tau) / Z."""
    tau, rewards = 0.7, torch.tensor([0.0, 1.0, 0.3], dtype=torch.float64)
    counts = torch.tensor([5, 2, 3])
    old = (counts / 10.0).double().log()
    arms = torch.arange(3).repeat_interleave(counts)
    advantages = tilted_advantages(rewards[arms], torch.zeros(10, dtype=torch.long), tau).double()
    logits = old.clone().requires_grad_()
    rule = torch.optim.SGD([logits], lr=2.0)
    for _ in range(80):
        rule.zero_grad()
        ours = logits.log_softmax(0)
        mirror_descent_loss(ours[arms], old[arms], advantages, tau).mean().backward()
        rule.step()
    tilted = (old + rewards / tau).softmax(0)
    torch.testing.assert_close(logits.detach().softmax(0), tilted, rtol=0, atol=1e-6)


def test_equal_rewards_have_tilted_advantages_of_exactly_0() -> None:
    """Of 0.7 and a tau of 0.3 a rounding would be left."""
    rewards = torch.full((3,), 0.7, dtype=torch.float64)
    assert not tilted_advantages(rewards, torch.zeros(3, dtype=torch.long), 0.3).any()


def test_the_mean_reward_is_the_limit_of_the_tilted_one() -> None:
    rewards, groups = rewards_of([0, 1, 1, 0.5], [2, 3])
    torch.testing.assert_close(
        tilted_advantages(rewards, groups, 1e5), group_advantages(rewards, groups, "none"), rtol=0, atol=1e-5
    )
    assert tilted_advantages(torch.tensor([0.0, 1.0]), torch.zeros(2, dtype=torch.long), 0.5)[
        1
    ].item() == pytest.approx(1 - 0.5 * math.log((1 + math.exp(2)) / 2), rel=1e-6)


def test_mistakes_are_named() -> None:
    one = torch.ones(1)
    with pytest.raises(LayoutError, match="one group per answer"):
        group_advantages(torch.ones(2), torch.ones(3))
    with pytest.raises(LayoutError, match="per token"):
        policy_loss(one, torch.ones(2), one)
    with pytest.raises(LayoutError, match="per answer"):
        mirror_descent_loss(one, torch.ones(2), one, 1.0)
    with pytest.raises(LayoutError, match=r"the mask has shape \[1\] for 2 tokens"):
        answer_weights(one.bool(), Layout((2,)), "answer", num_answers=1, num_tokens=1)
    with pytest.raises(ConfigError, match="tau must be above 0, found 0"):
        mirror_descent_loss(one, one, one, 0.0)
    with pytest.raises(ConfigError, match="needs the log-probs of a reference"):
        policy_loss(one, one, one, kl_weight=0.1)
    with pytest.raises(ConfigError, match=r"clip = \(low, high\)"):
        policy_loss(one, one, one, clip=(2.0, 0.2))
    with pytest.raises(ConfigError, match="max_tokens of at least 1, found None"):
        answer_weights(one.bool(), Layout((1,)), "constant", num_answers=1, num_tokens=1)
