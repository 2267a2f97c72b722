"""Another base for the rotary wavelengths of a decoder, as long-context stages begin with.

    frequency of pair i = theta^(-2i / dim)           wavelength = 2 pi / frequency, in tokens
    set_rope_theta(model, 800_000.0)                  # the text decoder alone; the tower's own rotation is another thing

Kimi-VL goes from 50,000 to 800,000 before its sequences grow from 8,192 to 32,768 and 131,072 tokens, and trains on. With
64 rotated channels, as its latent attention has, the longest wavelength goes from 2.2e5 to 3.3e6 tokens.

Source: Kimi-VL, arXiv:2504.07491, 'Joint Long-context Activation Stage'.
"""

from __future__ import annotations

import dataclasses
import math

from torch import nn

from vlkit.config import Config
from vlkit.errors import ConfigError
from vlkit.models.vlm import VisionLanguageModel


def set_rope_theta(model: VisionLanguageModel, theta: float, *, max_positions: int | None = None) -> None:
    """Give the decoder of a model another base for its rotary wavelengths, in place.

    Angles are made from it in every forward, so there are no tables that go stale; a cache made before holds keys that are
    turned by the old one. `model.config` is replaced, so that saving keeps it.

    Args:
        model: With a decoder that has rotary positions.
        theta: The base, above 1.
        max_positions: Positions that the decoder is to accept, where sequences grow beyond those of its config; None
            leaves them.

    Raises:
        ConfigError: Another model, a decoder without such a base, or a value that is none.
    """
    if not isinstance(model, VisionLanguageModel):
        raise ConfigError(
            f"set_rope_theta: expected a VisionLanguageModel, found {type(model).__name__}; a wrapped model is inside its wrapper"
        )
    if isinstance(theta, bool) or not isinstance(theta, int | float) or not 1 < theta < math.inf:
        raise ConfigError(f"set_rope_theta: theta={theta!r} is not a number above 1, such as 50000.0")
    llm: nn.Module = model.llm
    config, rope = llm.config, getattr(llm, "rope", None)
    if not hasattr(config, "theta") or not dataclasses.is_dataclass(rope) or not hasattr(rope, "theta"):
        raise ConfigError(
            f"set_rope_theta: {type(config).__name__} describes a decoder without a base of rotary wavelengths"
        )
    assert isinstance(config, Config)
    changes = {} if max_positions is None else {"max_positions": max_positions}
    config = config.replace(theta=float(theta), **changes)
    whole = model.config.replace(llm=config)  # checked before anything changes
    llm.config, model.config = config, whole
    llm.rope = dataclasses.replace(rope, theta=float(theta))  # type: ignore[type-var, assignment]
