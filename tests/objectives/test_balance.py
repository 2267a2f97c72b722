"""Balance losses equal the sums of the papers, sequence by sequence; figures say what they name."""

from __future__ import annotations

import math

import pytest
import torch
from torch.autograd import gradcheck

from vlkit.errors import ConfigError, LayoutError
from vlkit.layers.moe import Router, Routing
from vlkit.objectives import expert_load, load_figures, router_z_loss, sequence_balance_loss
from vlkit.packing import Layout

LAYOUT = Layout((4, 1, 8))


def routed(dim: int = 6, num_experts: int = 7, top_k: int = 3) -> tuple[Router, torch.Tensor, Routing]:
    generator = torch.Generator().manual_seed(0)
    router = Router(dim, num_experts, top_k=top_k, scoring="sigmoid", selection_bias=True).double()
    assert router.bias is not None
    with torch.no_grad():
        router.weight.copy_(torch.randn(num_experts, dim, generator=generator))
        router.bias.copy_(torch.randn(num_experts, generator=generator) * 0.1)
    tokens = torch.randn(13, dim, generator=generator, dtype=torch.float64, requires_grad=True)
    return router, tokens, router(tokens)


def written_out(experts: list[list[int]], scores: torch.Tensor, raw: bool) -> torch.Tensor:
    """sum_i f_i P_i of one sequence, expert by expert."""
    num_tokens, num_experts = scores.shape
    loss = torch.zeros((), dtype=scores.dtype)
    for i in range(num_experts):
        chose = sum(i in chosen for chosen in experts)
        f = num_experts / (len(experts[0]) * num_tokens) * chose
        shares = [token[i] if raw else token[i] / token.sum() for token in scores]
        loss = loss + f * torch.stack(shares).sum() / num_tokens
    return loss


@pytest.mark.parametrize("scores", ["normalised", "raw"])
def test_every_sequence_has_the_loss_of_the_paper(scores: str) -> None:
    router, _, routing = routed()
    ours = sequence_balance_loss(routing, LAYOUT, coefficient=0.3, scores=scores)  # type: ignore[arg-type]
    parts = zip(routing.experts.split(LAYOUT.lengths), routing.scores.split(LAYOUT.lengths), strict=True)
    theirs = 0.3 * torch.stack([written_out(e.tolist(), s, scores == "raw") for e, s in parts])
    torch.testing.assert_close(ours, theirs, rtol=1e-13, atol=0)
    got = torch.autograd.grad(ours.sum(), router.weight, retain_graph=True)
    torch.testing.assert_close(got, torch.autograd.grad(theirs.sum(), router.weight), rtol=1e-11, atol=1e-15)


def test_a_pack_has_the_losses_of_its_sequences_alone() -> None:
    router, tokens, routing = routed()
    together = sequence_balance_loss(routing, LAYOUT)
    alone = [sequence_balance_loss(router(part), Layout((len(part),))) for part in tokens.split(LAYOUT.lengths)]
    torch.testing.assert_close(together, torch.cat(alone), rtol=1e-13, atol=0)
    whole = sequence_balance_loss(routing, Layout((13,)))
    assert abs(whole - together.mean()) > 1e-6  # balance of a pack is another thing than balance of its sequences


@pytest.mark.parametrize("scoring", ["softmax", "sigmoid"])
def test_uniform_routing_gives_the_coefficient(scoring: str) -> None:
    """8 tokens choose 2 of 4 experts each, all equally often, with equal scores."""
    value = 0.25 if scoring == "softmax" else 0.5
    experts = torch.tensor([[0, 1], [2, 3]] * 4)
    routing = Routing(experts, torch.ones(8, 2), torch.full((8, 4), value))
    assert sequence_balance_loss(routing, Layout((8,)), coefficient=0.125).tolist() == [0.125]


def test_collapse_onto_the_same_experts_costs_most() -> None:
    """All tokens on K of E with all the score: E/K times the coefficient."""
    scores = torch.tensor([[0.5, 0.5, 0.0, 0.0]]).repeat(8, 1)
    routing = Routing(torch.tensor([[0, 1]] * 8), torch.ones(8, 2), scores)
    assert sequence_balance_loss(routing, Layout((8,)), coefficient=1.0).tolist() == [2.0]


def test_z_loss_is_the_sum_of_squared_logsumexps() -> None:
    router, tokens, routing = routed()
    ours = router_z_loss(routing, coefficient=0.5)
    theirs = 0.5 * sum((tokens @ router.weight.T)[t].exp().sum().log() ** 2 for t in range(13))
    torch.testing.assert_close(ours, theirs, rtol=1e-13, atol=0)


def test_finite_differences_agree() -> None:
    router, tokens, _ = routed()
    for loss in (lambda x: sequence_balance_loss(router(x), LAYOUT), lambda x: router_z_loss(router(x))):
        assert gradcheck(loss, (tokens,))


def test_load_is_counted_for_the_tokens_of_a_mask() -> None:
    *_, routing = routed()
    is_image = torch.arange(13) % 3 == 0
    assert torch.equal(expert_load(routing), routing.load(7))
    assert torch.equal(expert_load(routing, is_image) + expert_load(routing, ~is_image), routing.load(7))
    assert int(expert_load(routing, is_image).sum()) == 5 * 3


def test_figures_of_even_and_uneven_loads() -> None:
    even = load_figures(torch.tensor([[4, 4, 4, 4]]))
    assert even == {
        "max_violation": 0.0,
        "max_violation_worst": 0.0,
        "entropy": 1.0,
        "dead": 0.0,
        "largest_share": 0.25,
        "smallest_share": 0.25,
    }
    mixed = load_figures(torch.tensor([[4, 4, 4, 4], [8, 0, 8, 0]]), [torch.tensor([0.1, -0.25, 0, 0]), torch.zeros(4)])
    entropy = (1 + math.log(2) / math.log(4)) / 2
    assert mixed == pytest.approx(
        {
            "max_violation": 0.5,
            "max_violation_worst": 1.0,
            "entropy": entropy,
            "dead": 0.25,
            "largest_share": 0.5,
            "smallest_share": 0.0,
            "bias_min": -0.25,
            "bias_max": 0.1,
        },
        rel=1e-7,
    )


def test_layers_without_tokens_say_nothing() -> None:
    assert load_figures(torch.zeros(2, 4, dtype=torch.int64)) == {}
    assert load_figures(torch.tensor([[0, 0], [3, 3]])) == load_figures(torch.tensor([3, 3]))


def test_mistakes_are_named() -> None:
    *_, routing = routed()
    with pytest.raises(ConfigError, match="'mean' is not one of normalised, raw"):
        sequence_balance_loss(routing, LAYOUT, scores="mean")  # type: ignore[arg-type]
    with pytest.raises(LayoutError, match="of 13 tokens, the layout of 5"):
        sequence_balance_loss(routing, Layout((5,)))
    with pytest.raises(ConfigError, match="holds no logits"):
        router_z_loss(routing._replace(logits=None))
