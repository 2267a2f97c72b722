"""How a decoder makes rotary angles of positions. Each decoder is given one of these.

FixedRope      positions [tokens], or [tokens, 3] as (time, row, column) with sections -> Rotary
DynamicRope    positions [tokens] and the prompts' lengths -> Rotary with longer wavelengths for longer prompts
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from vlkit.errors import LayoutError
from vlkit.hub.fields import HubFields
from vlkit.layers.rope import Rotary, make_rotary, rotary_angles, rotary_frequencies
from vlkit.packing import Layout


@runtime_checkable
class Rope(Protocol):
    """Makes what attention needs to know of positions."""

    def __call__(
        self, positions: Tensor, layout: Layout, prompt_lengths: Sequence[int], *, dtype: torch.dtype, training: bool
    ) -> Rotary:
        """Cosines and sines.

        Args:
            positions: [tokens] or [tokens, 3], integers.
            layout: The sequences.
            prompt_lengths: Tokens of each sequence in its first forward.
            dtype: What is computed in: fp32, or fp64 for a model in fp64.
            training: Whether the decoder is in training mode.

        Raises:
            LayoutError: Positions in three coordinates for a decoder that has one.
        """
        ...


@dataclass(frozen=True)
class FixedRope:
    """One wavelength per pair of channels.

    Attributes:
        dim: Channels of a head that are rotated.
        theta: Base of the wavelengths.
        axes: The coordinate of (time, row, column) that each pair follows, as `rotary_sections` gives them; None takes
            positions of one coordinate only. With axes, [tokens] means equal coordinates.
    """

    dim: int
    theta: float
    axes: tuple[int, ...] | None = None

    def __call__(
        self, positions: Tensor, layout: Layout, prompt_lengths: Sequence[int], *, dtype: torch.dtype, training: bool
    ) -> Rotary:
        frequencies = rotary_frequencies(self.dim, self.theta, device=positions.device, dtype=dtype)
        if self.axes is None:
            check_one_coordinate(positions)
        return make_rotary(rotary_angles(positions.to(dtype), frequencies, self.axes if positions.ndim == 2 else None))


@dataclass(frozen=True)
class DynamicRope:
    """Wavelengths that grow with the prompt, and queries that grow with their position, beyond the trained length.

    With n tokens in the prompt and T = trained_length, theta becomes theta * alpha^(dim / (dim - 2)) with
    alpha = max(2^ceil(log2(n / T) + 1) - 1, 1), so 1, 3, 7, ... The cache remembers n, so all tokens of a sequence are turned
    alike, the generated ones too. The query at position p is multiplied by max(log(p + 1) / log(T), 1). Both rest while
    training, as in the published code.

    Attributes:
        dim: Channels of a head; all are rotated.
        theta: Base of the wavelengths of prompts up to the trained length.
        trained_length: T, in tokens.
        grow_wavelengths: Dynamic NTK scaling.
        grow_queries: Scaling of queries by the logarithm of their position.

    Source: Qwen, arXiv:2309.16609, section 2.6; the remote code of Qwen-VL-Chat.
    """

    dim: int
    theta: float
    trained_length: int
    grow_wavelengths: bool = True
    grow_queries: bool = True

    def alpha(self, prompt_length: int) -> int:
        """How much longer the longest wavelength becomes, about."""
        if not self.grow_wavelengths:
            return 1
        return max(2 ** math.ceil(math.log2(prompt_length / self.trained_length) + 1) - 1, 1)

    def __call__(
        self, positions: Tensor, layout: Layout, prompt_lengths: Sequence[int], *, dtype: torch.dtype, training: bool
    ) -> Rotary:
        check_one_coordinate(positions)
        positions = positions.to(dtype)
        alphas = [1 if training else self.alpha(length) for length in prompt_lengths]
        thetas = [self.theta * alpha ** (self.dim / (self.dim - 2)) for alpha in alphas]
        frequencies = [
            rotary_frequencies(self.dim, theta, device=positions.device, dtype=dtype) for theta in dict.fromkeys(thetas)
        ]
        if len(frequencies) == 1:
            rotary = make_rotary(rotary_angles(positions, frequencies[0]))
        else:
            order = {theta: row for row, theta in enumerate(dict.fromkeys(thetas))}
            rows = torch.tensor([order[theta] for theta in thetas], device=positions.device)
            of_tokens = rows[layout.item_ids(positions.device).long()]
            rotary = make_rotary(positions[:, None] * torch.stack(frequencies)[of_tokens])
        if training or not self.grow_queries:
            return rotary
        scale = (positions + 1).log() / math.log(self.trained_length)
        return rotary._replace(query_scale=scale.clamp(min=1.0))


def check_one_coordinate(positions: Tensor) -> None:
    """Refuse positions in time, row and column."""
    if positions.ndim != 1:
        raise LayoutError(
            f"positions have shape {tuple(positions.shape)}; this decoder takes one per token, {positions.shape[0]}: "
            "positions in time, row and column need a decoder with rope_sections"
        )


def read_theta(text: HubFields, *default: float) -> Any:
    """Base of the rotary wavelengths, from rope_theta or from rope_parameters, as transformers 5 writes it.

    Args:
        text: The fields of a language model.
        default: What a file means that says neither.

    Raises:
        ConfigError: Neither is there, or another rotation than the plain one, such as YaRN.
    """
    theta = text.take("rope_theta", None)
    text.expect("partial_rotary_factor", 1.0)
    for name in ("rope_scaling", "rope_parameters"):
        if text.take(name, None) is not None:
            rope = text.part(name)
            for kind in ("type", "rope_type"):
                rope.expect(kind, "default")
            rope.expect("partial_rotary_factor", 1.0)
            theta = rope.take("rope_theta", theta)
            rope.warn_of_rest()
    return text.take("rope_theta", *default) if theta is None else theta
