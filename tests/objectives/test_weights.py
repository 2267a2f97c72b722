"""Weights share the loss between answers as they say, however samples are packed."""

from __future__ import annotations

import pytest
import torch

from vlkit.errors import ConfigError
from vlkit.objectives import segment_sum, token_weights
from vlkit.packing import Layout


@pytest.mark.parametrize(("normalise", "share"), [("token", 10 / 1010), ("sample", 0.5), ("square", 1 / 11)])
def test_shares_of_a_short_and_a_long_answer(normalise: str, share: float) -> None:
    """10 and 1000 supervised tokens, among others without a target: 1 and 99 %, 50 and 50 %, 9 and 91 %."""
    layout = Layout((17, 1003))
    targets = torch.full((1020,), -100)
    targets[5:15] = 0  # id 0 is a token like others
    targets[20:] = 7
    weights = token_weights(targets, layout, normalise)  # type: ignore[arg-type]
    of_short, of_long = segment_sum(weights, layout).tolist()
    assert weights.dtype == torch.float32
    assert not weights[targets == -100].any()
    assert of_short / (of_short + of_long) == pytest.approx(share, rel=1e-5)


@pytest.mark.parametrize("normalise", ["token", "sample", "square"])
def test_an_item_without_targets_weighs_nothing(normalise: str) -> None:
    weights = token_weights(torch.tensor([-100, -100, 3]), Layout((2, 1)), normalise)  # type: ignore[arg-type]
    assert weights.tolist() == [0, 0, 1]


@pytest.mark.parametrize("normalise", ["token", "sample", "square"])
def test_weights_do_not_depend_on_the_pack(normalise: str) -> None:
    targets = torch.tensor([4, -100, 3, 2, 1, -100, 9])
    together = token_weights(targets, Layout((5, 2)), normalise)  # type: ignore[arg-type]
    alone = [token_weights(part, Layout((len(part),)), normalise) for part in targets.split((5, 2))]  # type: ignore[arg-type]
    assert torch.equal(together, torch.cat(alone))


def test_other_words_are_mistakes() -> None:
    with pytest.raises(ConfigError, match="'mean' is not one of token, sample, square"):
        token_weights(torch.tensor([1]), Layout((1,)), "mean")  # type: ignore[arg-type]
