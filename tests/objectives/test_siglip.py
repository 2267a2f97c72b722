"""The sigmoid loss is the double sum of the paper, and the same over any number of ranks, however texts travel.

Measured over 2, 3 and 4 ranks with 0 to 4 pairs each, against the double sum of one process in fp64: loss and gradients, relative
to the largest, 6e-16 apart in fp64 and 2.3e-7 in fp32.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.autograd import gradcheck

from tests.objectives.memory import Made
from tests.ranks import all_of, run_ranks
from vlkit.errors import ConfigError, LayoutError, RankError
from vlkit.objectives import SigLIP, repeated_pairs, siglip_loss
from vlkit.optim import muon_param_groups

Inputs = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]
Found = list[torch.Tensor]


def inputs(pairs: int, dtype: torch.dtype = torch.float64, dim: int = 5) -> Inputs:
    generator = torch.Generator().manual_seed(0)
    images, texts = torch.randn(2, pairs, dim, generator=generator, dtype=torch.float64).to(dtype)
    log_scale, bias = torch.tensor([math.log(7), -1.5], dtype=dtype)
    return (
        images.clone().requires_grad_(),
        texts.clone().requires_grad_(),
        log_scale.clone().requires_grad_(),
        bias.clone().requires_grad_(),
    )


def written_out(
    images: torch.Tensor,
    texts: torch.Tensor,
    log_scale: torch.Tensor,
    bias: torch.Tensor,
    ignore: torch.Tensor | None = None,
) -> torch.Tensor:
    """-1/N sum_ij log sigmoid(s_ij logit_ij), pair by pair."""
    loss = torch.zeros((), dtype=images.dtype)
    for i, x in enumerate(images):
        for j, y in enumerate(texts):
            if ignore is None or not ignore[i, j]:
                cosine = x @ y / (x.norm() * y.norm())
                sign = 1 if i == j else -1
                loss = loss - torch.log(torch.sigmoid(sign * (log_scale.exp() * cosine + bias)))
    return loss / len(images)


def with_gradients(loss: torch.Tensor, given: Inputs) -> tuple[torch.Tensor, ...]:
    return (loss.detach(), *torch.autograd.grad(loss, given))


@pytest.mark.parametrize("chunk", [None, 1, 3, 50])
@pytest.mark.parametrize("exchange", ["gather", "ring"])
def test_one_process_gives_the_double_sum_with_gradients(exchange: Any, chunk: int | None) -> None:
    given = inputs(7)
    ignore = torch.rand(7, 7, generator=torch.Generator().manual_seed(3)) < 0.3
    for left_out in (None, ignore):
        ours = with_gradients(siglip_loss(*given, exchange=exchange, chunk=chunk, ignore=left_out), given)
        torch.testing.assert_close(ours, with_gradients(written_out(*given, left_out), given), rtol=1e-12, atol=1e-14)


def test_finite_differences_agree() -> None:
    assert gradcheck(lambda *given: siglip_loss(*given, chunk=2), inputs(3))


def test_large_logits_are_not_rounded_away() -> None:
    """A certain and right answer at logit 30 costs exp(-30), not 0; a wrong one at 21 costs a little more than 21."""
    pair = torch.ones(1, 1, dtype=torch.float64)
    loss = siglip_loss(pair, pair, torch.tensor(0.0), torch.tensor(29.0))
    assert loss.item() == pytest.approx(math.log1p(math.exp(-30)), rel=1e-12)
    loss = siglip_loss(pair, -pair, torch.tensor(0.0), torch.tensor(-20.0))
    assert loss.item() == pytest.approx(21 + math.log1p(math.exp(-21)), rel=1e-13)


# Ranks

SIZES = {2: (3, 4), 3: (2, 0, 3), 4: (2, 2, 1, 3)}


def on_a_rank(rank: int, sizes: tuple[int, ...], dtype: torch.dtype, ignored: bool) -> dict[str, Found]:
    """Loss and gradients of each form, as data parallel training would make them of the parts."""
    torch.manual_seed(0)
    start = sum(sizes[:rank])
    mine = slice(start, start + sizes[rank])
    found = {}
    exchange: Any
    for exchange in ("gather", "ring"):
        for chunk in (None, 2):
            images, texts, *scalars = inputs(sum(sizes), dtype)
            given = (images.detach()[mine].requires_grad_(), texts.detach()[mine].requires_grad_(), *scalars)
            left_out = repeated_pairs(KEYS[: sum(sizes)][mine]) if ignored else None
            part = siglip_loss(*given, exchange=exchange, chunk=chunk, ignore=left_out)
            # Each rank's own factor: a gradient that came from another rank must carry that rank's.
            mean = [part.detach().clone(), *torch.autograd.grad(part * (1 + rank), given)]
            for tensor in (mean[0], *mean[3:]):
                dist.all_reduce(tensor)
                tensor /= len(sizes)
            mean[1:3] = [tensor / len(sizes) for tensor in mean[1:3]]
            found[f"{exchange} {chunk}"] = mean
    return found


KEYS = torch.tensor([5, 3, 5, 9, 5, 3, 1, 2])


def expected(sizes: tuple[int, ...], dtype: torch.dtype, ignored: bool) -> Found:
    given = inputs(sum(sizes), dtype)
    left_out = None
    if ignored:
        keys = KEYS[: sum(sizes)]
        left_out = (keys[:, None] == keys) & ~torch.eye(len(keys), dtype=torch.bool)
    loss = written_out(*given, left_out)
    # The rows of rank r count 1 + r times in the gradients.
    rows = torch.cat([torch.full((n,), 1.0 + rank, dtype=dtype) for rank, n in enumerate(sizes)])
    weighed = torch.zeros((), dtype=dtype)
    for row in range(sum(sizes)):
        only = torch.ones(sum(sizes), sum(sizes), dtype=torch.bool)
        only[row] = False if left_out is None else left_out[row]
        weighed = weighed + rows[row] * written_out(*given, only)
    return [loss.detach(), *torch.autograd.grad(weighed, given)]


def furthest(results: list[dict[str, Found]], want: Found) -> float:
    far = 0.0
    for form in results[0]:
        parts = [result[form] for result in results]
        whole = [parts[0][0], *(torch.cat([part[i] for part in parts]) for i in (1, 2)), *parts[-1][3:]]
        far = max(far, *(float((a - b).abs().max() / b.abs().max()) for a, b in zip(whole, want, strict=True)))
    return far


def both_types(rank: int, sizes: tuple[int, ...]) -> list[dict[str, Found]]:
    return [on_a_rank(rank, sizes, dtype, ignored) for dtype, ignored in FORMS]


FORMS = [(torch.float64, False), (torch.float64, True), (torch.float32, False)]


@pytest.mark.parametrize(
    "num_ranks", [2, pytest.param(3, marks=pytest.mark.slow), pytest.param(4, marks=pytest.mark.slow)]
)
def test_ranks_give_the_double_sum_with_all_gradients(num_ranks: int) -> None:
    """Of both towers, of scale and bias; ring and gather, in chunks or not, with unequal numbers of pairs, 0 among them."""
    sizes = SIZES[num_ranks]
    results = run_ranks(both_types, num_ranks, sizes)
    for (dtype, ignored), *found in zip(FORMS, *results, strict=True):
        far = furthest(found, expected(sizes, torch.float64, ignored))
        assert far < (1e-13 if dtype == torch.float64 else 1e-6), (dtype, ignored, far)


def test_equal_captions_on_one_process_are_marked() -> None:
    marked = repeated_pairs(torch.tensor([4, 2, 4]))
    assert marked.tolist() == [[False, False, True], [False, False, False], [True, False, False]]


def learning_apart(rank: int) -> tuple[float, float, bool, str]:
    images, texts, *scalars = inputs(2)
    part = siglip_loss(images, texts.detach(), *scalars, exchange="ring")
    part.backward()
    with torch.no_grad():
        alone = siglip_loss(images, texts, *scalars)
    try:
        with torch.set_grad_enabled(rank == 0):
            siglip_loss(images, texts, *scalars)
    except RankError as error:
        return part.item(), alone.item(), images.grad is not None, str(error)
    raise AssertionError("nothing was said")


def in_a_subgroup(rank: int) -> tuple[float, int]:
    """Its part in a ring, and the largest tensor that was made, in elements."""
    group = dist.new_group([0, 1])
    images, texts, *scalars = inputs(23)
    mine = slice(0, 12) if rank == 0 else slice(12, 23)
    with Made() as made:
        part = siglip_loss(images[mine], texts[mine], *scalars, exchange="ring", group=group)
        part.backward()
    return part.item(), made.largest


@pytest.fixture(scope="module")
def on_two() -> list[Any]:
    works: list[Any] = [(learning_apart, ()), (in_a_subgroup, ())]
    return [list(results) for results in zip(*run_ranks(all_of, 2, works), strict=True)]


def test_ranks_that_would_wait_for_each_other_are_named(on_two: list[Any]) -> None:
    for part, alone, learns, error in on_two[0]:
        assert part == pytest.approx(alone, rel=1e-12)
        assert learns
        assert "not on [1]" in error


def test_a_ring_holds_pairs_of_two_ranks_at_once(on_two: list[Any]) -> None:
    """12 and 11 of the 23 pairs are on each: at most 12 x 12 and 11 x 12 numbers, not 12 x 23; in a group of its own."""
    parts = [part for part, _ in on_two[1]]
    assert sum(parts) / 2 == pytest.approx(written_out(*inputs(23)).item(), rel=1e-12)
    assert [largest for _, largest in on_two[1]] == [12 * 12, 11 * 12]


def test_the_loss_begins_with_the_temperature_and_bias_of_the_paper() -> None:
    module = SigLIP()
    assert (module.log_scale.exp().item(), module.bias.item()) == (pytest.approx(10), -10)
    images, texts, *_ = inputs(4, torch.float32)
    assert torch.equal(module(images, texts), siglip_loss(images, texts, module.log_scale, module.bias))


def test_temperature_and_bias_do_not_decay_and_are_not_for_muon() -> None:
    groups = muon_param_groups(torch.nn.ModuleDict({"tower": torch.nn.Linear(3, 4), "contrast": SigLIP()}))
    of = {name: group for group in groups for name in group["param_names"]}
    for name in ("contrast.log_scale", "contrast.bias"):
        assert (of[name]["algorithm"], of[name]["weight_decay"]) == ("adamw", 0.0)
    assert "weight_decay" not in of["tower.bias"]


def test_no_pairs_give_zero_loss_and_zero_gradients() -> None:
    given = inputs(0)
    loss, *grads = with_gradients(siglip_loss(*given), given)
    assert loss.item() == 0
    assert not any(grad.any() for grad in grads)


def test_mistakes_are_named() -> None:
    given = inputs(3)
    with pytest.raises(ConfigError, match="'tree' is not one of gather, ring"):
        SigLIP(exchange="tree")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="at least 1 image, found 0"):
        siglip_loss(*given, chunk=0)
    with pytest.raises(LayoutError, match=r"\[3, 5\] and \[2, 5\]"):
        siglip_loss(given[0], given[1][:2], *given[2:])
    with pytest.raises(LayoutError, match=r"\[3, 3\]; found \[3, 4\]"):
        siglip_loss(*given, ignore=torch.zeros(3, 4).bool())
