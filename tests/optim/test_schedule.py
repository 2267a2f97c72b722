from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

from vlkit.errors import ConfigError
from vlkit.optim import Muon, warmup_decay


def test_rise_middle_and_fall() -> None:
    factors = [warmup_decay(step, total=10, warmup=4, decay=4, shape="linear", final=0.2) for step in range(12)]
    assert factors == pytest.approx([0.25, 0.5, 0.75, 1, 1, 1, 1, 0.8, 0.6, 0.4, 0.2, 0.2])


def test_cosine_falls_over_all_that_follows_the_warm_up() -> None:
    assert warmup_decay(3, total=10, warmup=2) == pytest.approx(
        0.9619, abs=1e-4
    )  # an eighth of the way: cos(22.5 degrees)
    assert warmup_decay(6, total=10, warmup=2) == pytest.approx(0.5)
    assert warmup_decay(6, total=10, warmup=2, final=0.1) == pytest.approx(0.55)


def test_no_decay_stays_constant_to_the_end() -> None:
    assert [warmup_decay(step, total=3, decay=0) for step in range(3)] == [1.0, 1.0, 1.0]


@pytest.mark.parametrize("bad", [{"total": 5, "warmup": 6}, {"total": 5, "warmup": 3, "decay": 3}, {"total": 0}])
def test_what_does_not_fit_is_refused(bad: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="do not fit"):
        warmup_decay(0, **bad)


def test_unknown_shape_is_refused() -> None:
    with pytest.raises(ConfigError, match="cosine"):
        warmup_decay(0, total=5, shape="square")  # type: ignore[arg-type]


def test_it_drives_an_optimizer() -> None:
    parameter = nn.Parameter(torch.ones(3, 3))
    optimizer = Muon([parameter], lr=0.4)
    scheduler = LambdaLR(optimizer, partial(warmup_decay, total=6, warmup=2, decay=2, shape="linear"))
    rates = []
    for _ in range(6):
        rates.append(scheduler.get_last_lr()[0])
        parameter.grad = torch.ones(3, 3)
        optimizer.step()
        scheduler.step()
    assert rates == pytest.approx([0.2, 0.4, 0.4, 0.4, 0.4, 0.2])
