"""Learning-rate schedules as plain functions of the step, for torch.optim.lr_scheduler.LambdaLR.

scheduler = LambdaLR(optimizer, partial(warmup_decay, total=10_000, warmup=500, decay=2_000))
"""

from __future__ import annotations

import math
from typing import Literal

from vlkit.errors import ConfigError


def warmup_decay(
    step: int,
    *,
    total: int,
    warmup: int = 0,
    decay: int | None = None,
    shape: Literal["cosine", "linear"] = "cosine",
    final: float = 0.0,
) -> float:
    """The factor on the base learning rate at a step: a linear rise, a constant middle, a fall.

    The first step already learns (1 / warmup), the last step of the warm-up and the constant part have factor 1, and
    the factor reaches `final` at step `total` and stays there.

    Args:
        step: Steps done so far, from 0.
        total: Steps of the whole run.
        warmup: Steps of the rise.
        decay: Steps of the fall, at the end of the run; None falls over all that follows the warm-up.
        shape: Of the fall.
        final: Factor at the end.

    Raises:
        ConfigError: Warm-up and decay do not fit into the run, or an unknown shape.
    """
    decay = total - warmup if decay is None else decay
    if total < 1 or warmup < 0 or decay < 0 or warmup + decay > total:
        raise ConfigError(f"warmup={warmup} and decay={decay} steps do not fit into total={total} steps")
    if shape not in ("cosine", "linear"):
        raise ConfigError(f"shape is 'cosine' or 'linear', found {shape!r}")
    if step < warmup:
        return (step + 1) / warmup
    into_decay = step - (total - decay)
    if into_decay <= 0:
        return 1.0 if step < total else final
    progress = min(1.0, into_decay / decay)
    falling = (1 + math.cos(math.pi * progress)) / 2 if shape == "cosine" else 1 - progress
    return final + (1 - final) * falling
