"""Rotary position embedding, for text, images and video by one equation.

    angle[token, pair] = position[token, axis(pair)] * frequency(pair)        radians, fp32
    (a, b) -> (a cos - b sin, a sin + b cos)                                  for the two channels (a, b) of every pair

What differs between models is data: which axis a pair follows (`axes`), its frequency, and which two channels make a
pair (`pairing`: "interleaved" takes 2j and 2j + 1, "half" takes j and j + dim/2). Towers share the pairs between rows and
columns (`rotary_frequencies_2d`), decoders that see images between time, rows and columns (`rotary_sections`).

Source: Su et al., arXiv:2104.09864.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any, Literal, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from vlkit.errors import ConfigError, LayoutError
from vlkit.packing import Layout

Pairing = Literal["interleaved", "half"]
Arrangement = Literal["alternating", "blocked"]


class Rotary(NamedTuple):
    """What attention needs to know of its tokens' positions.

    Attributes:
        cos: Cosine of every token's angles, [tokens, pairs].
        sin: Their sine.
        query_scale: Factor of every token's queries [tokens], where a model scales them with the position; None for 1.
    """

    cos: Tensor
    sin: Tensor
    query_scale: Tensor | None = None


def rotary_frequencies(
    head_dim: int, theta: float, *, device: torch.device | str | None = None, dtype: torch.dtype = torch.float32
) -> Float[Tensor, " pairs"]:
    """theta^(-2i / head_dim) for i = 0 ... head_dim/2 - 1, in radians per position.

    Raises:
        ConfigError: An odd head_dim.
    """
    if head_dim % 2:
        raise ConfigError(f"head_dim={head_dim} is odd; rotary embedding turns pairs of channels")
    return 1.0 / theta ** (torch.arange(0, head_dim, 2, dtype=dtype, device=device) / head_dim)


def rotary_frequencies_2d(
    head_dim: int, theta: float, *, arrangement: Arrangement, device: torch.device | str | None = None
) -> tuple[Float[Tensor, " pairs"], tuple[int, ...]]:
    """Frequencies and axes of the two ways in which vision towers share a head between rows and columns.

    With f_i = theta^(-4i / head_dim), i = 0 ... head_dim/4 - 1, and positions as (time, row, column):
    "alternating" (MoonViT): pair 2i follows the column with f_i, pair 2i + 1 the row with f_i.
    "blocked" (AIMv2, Qwen2-VL): the first half of the pairs follows the row with f_0, f_1, ..., the second the column.

    Returns:
        (frequencies [head_dim/2], axes of head_dim/2 entries), as `rotary_angles` takes them.

    Raises:
        ConfigError: head_dim is not a multiple of 4, or an unknown arrangement.
    """
    if head_dim % 4:
        raise ConfigError(f"head_dim={head_dim} is not a multiple of 4; 2-D rotary embedding halves the pairs")
    each = rotary_frequencies(head_dim // 2, theta, device=device)
    if arrangement == "alternating":
        return each.repeat_interleave(2), (2, 1) * len(each)
    if arrangement == "blocked":
        return each.repeat(2), (1,) * len(each) + (2,) * len(each)
    raise ConfigError(f"arrangement {arrangement!r} is neither 'alternating' nor 'blocked'")


def rotary_sections(sections: Sequence[int], *, interleaved: bool) -> tuple[int, ...]:
    """The axis that each pair of channels follows where a head is shared between time, rows and columns.

    With sections (4, 2, 2): T T T T H H W W, or interleaved T H W T H W T T: the axes take turns, and those that have had
    their share leave the rest to the first. Tokens whose coordinates are all equal are rotated as in one dimension.

    Args:
        sections: Pairs of each axis.
        interleaved: In turns (Qwen3-VL) instead of one block after another (Qwen2-VL).

    Returns:
        One axis per pair, as `rotary_angles` takes them.

    Raises:
        ConfigError: Interleaved sections that do not fit: the first must be the longest.

    Source: M-RoPE, Qwen2-VL, arXiv:2409.12191, section 2.1; interleaved: transformers' qwen3_vl.
    """
    if not interleaved:
        return tuple(axis for axis, pairs in enumerate(sections) for _ in range(pairs))
    count = len(sections)
    axes = tuple(j % count if j < count * sections[j % count] else 0 for j in range(sum(sections)))
    if any(axes.count(axis) != pairs for axis, pairs in enumerate(sections)):
        raise ConfigError(f"sections {tuple(sections)} cannot be interleaved; the first must be the longest")
    return axes


@lru_cache(maxsize=1024)
def _positions_of_grid(grid: tuple[int, int, int]) -> Tensor:
    return torch.cartesian_prod(*(torch.arange(n, dtype=torch.int32) for n in grid)).view(-1, 3)


def grid_positions(layout: Layout, *, device: torch.device | str | None = None) -> Int[Tensor, "tokens 3"]:
    """(time, row, column) of every patch, from 0 in every item, in the order of the layout (raster), int32.

    Raises:
        LayoutError: A layout without grids.
    """
    if layout.grids is None:
        raise LayoutError("patch positions need a layout with grids; make it with Layout.from_grids")
    parts = [_positions_of_grid(grid) for grid in layout.grids]
    return (torch.cat(parts) if parts else torch.empty(0, 3, dtype=torch.int32)).to(device)


def rotary_angles(
    positions: Tensor, frequencies: Float[Tensor, " pairs"], axes: Sequence[int] | None = None
) -> Float[Tensor, "tokens pairs"]:
    """position[token, axis(pair)] * frequency(pair), in radians.

    Args:
        positions: [tokens], or [tokens, axes] when positions have several coordinates. Integers or reals.
        frequencies: Radians per position of each pair.
        axes: The coordinate that each pair follows; None for one-dimensional positions.

    Returns:
        fp32; fp64 when positions are fp64.

    Raises:
        LayoutError: Positions and axes that do not fit each other.
    """
    dtype = torch.float64 if positions.dtype == torch.float64 else torch.float32
    if axes is None:
        if positions.ndim != 1:
            raise LayoutError(f"positions of shape {tuple(positions.shape)} need `axes`, one coordinate per pair")
        coordinates = positions.to(dtype)[:, None]
    else:
        if positions.ndim != 2 or len(axes) != frequencies.shape[0]:
            raise LayoutError(
                f"{len(axes)} axes for {frequencies.shape[0]} frequencies and positions {tuple(positions.shape)}; "
                "expected [tokens, axes] and one axis per pair"
            )
        coordinates = positions.to(dtype)[:, list(axes)]
    return coordinates * frequencies.to(dtype)


def make_rotary(angles: Float[Tensor, "tokens pairs"], dtype: torch.dtype | None = None) -> Rotary:
    """Cosine and sine of the angles, kept in their own dtype unless another is asked for."""
    dtype = angles.dtype if dtype is None else dtype
    return Rotary(angles.cos().to(dtype), angles.sin().to(dtype))


def apply_rotary(
    x: Float[Tensor, "tokens heads dim"], rotary: Rotary, *, pairing: Pairing
) -> Float[Tensor, "tokens heads dim"]:
    """Turn every pair of channels by its angle. Computed in fp32 (fp64 for fp64 input), returned in the dtype of x.

    Args:
        x: Queries or keys.
        rotary: Of the same tokens, dim/2 pairs.
        pairing: "interleaved": channels 2j and 2j + 1 make pair j; "half": channels j and j + dim/2.

    Raises:
        LayoutError: Another number of pairs than dim/2.
        ConfigError: An unknown pairing.
    """
    cos, sin = rotary.cos, rotary.sin
    if 2 * cos.shape[-1] != x.shape[-1]:
        raise LayoutError(f"{cos.shape[-1]} angles for heads of {x.shape[-1]} channels; expected {x.shape[-1] // 2}")
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    wide = x.to(dtype)
    cos, sin = cos.to(dtype)[:, None], sin.to(dtype)[:, None]  # [tokens, 1, pairs]
    if pairing == "interleaved":
        if not torch.compiler.is_compiling():  # one pass over memory instead of seven
            turned = torch.view_as_complex(_paired(wide)) * torch.complex(cos, sin)
            return torch.view_as_real(turned).flatten(-2).to(x.dtype)
        a, b = wide.unflatten(-1, (-1, 2)).unbind(-1)
        return torch.stack([a * cos - b * sin, a * sin + b * cos], dim=-1).flatten(-2).to(x.dtype)
    if pairing == "half":
        if not (torch.compiler.is_compiling() or cos.requires_grad or sin.requires_grad):
            turn = _TurnedHalves.apply if wide.requires_grad and torch.is_grad_enabled() else _turned_halves
            return turn(wide, cos, sin).to(x.dtype)
        a, b = wide.chunk(2, dim=-1)
        return torch.cat([a * cos - b * sin, a * sin + b * cos], dim=-1).to(x.dtype)
    raise ConfigError(f"pairing {pairing!r} is neither 'interleaved' nor 'half'")


def _paired(x: Tensor) -> Tensor:
    """[..., dim] as [..., dim/2, 2] that torch can see as complex numbers; copied only where that needs it."""
    if x.stride(-1) != 1 or x.storage_offset() % 2 or any(stride % 2 for stride in x.stride()[:-1]):
        x = x.contiguous()
    return x.unflatten(-1, (-1, 2))


def _turned_halves(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """The "half" pairing written straight into its result, in a quarter of the formula's time."""
    (a, b), out = x.chunk(2, dim=-1), torch.empty_like(x)
    first, second = out.chunk(2, dim=-1)
    torch.mul(a, cos, out=first).addcmul_(b, sin, value=-1)
    torch.mul(a, sin, out=second).addcmul_(b, cos)
    return out


class _TurnedHalves(torch.autograd.Function):
    """`_turned_halves`, whose gradient turns back."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return _turned_halves(x, cos, sin)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        return _TurnedHalves.apply(grad, cos, -sin), None, None
