"""A two-layer MLP on every patch by itself: as many tokens as patches.

    [patches, in_dim] -> linear -> GELU -> linear -> [patches, out_dim]

Source: LLaVA-1.5, arXiv:2310.03744, section 3.3; constants from the published code of LLaVA.
"""

from __future__ import annotations

from torch import nn

from vlkit.config import Config, Size
from vlkit.errors import LayoutError
from vlkit.hub.keymap import KeyMap, rename
from vlkit.layers.mlp import MLP
from vlkit.packing import Packed
from vlkit.registry import register_component


class MLPProjectorConfig(Config):
    """Sizes of the projector; the defaults are those of LLaVA-1.5-7B.

    Attributes:
        in_dim: Width of the tower's features.
        out_dim: Width of the decoder.
        hidden_dim: Width between the two linear layers; None means out_dim.
    """

    in_dim: Size = 1024
    out_dim: Size = 4096
    hidden_dim: Size | None = None

    @property
    def merge_size(self) -> int:
        """Patches are not merged."""
        return 1

    def out_grid(self, grid: tuple[int, int, int]) -> tuple[int, int, int]:
        """The grid of tokens, (time, rows, columns): the grid of patches."""
        return grid


class MLPProjector(nn.Module):
    """fc2(GELU(fc1(features))), with the exact GELU."""

    def __init__(self, config: MLPProjectorConfig) -> None:
        super().__init__()
        self.config = config
        hidden_dim = config.out_dim if config.hidden_dim is None else config.hidden_dim
        self.mlp = MLP(config.in_dim, hidden_dim, out_dim=config.out_dim, activation="gelu")

    def forward(self, features: Packed) -> Packed:
        """[patches, in_dim] -> [patches, out_dim], with the same layout.

        Raises:
            LayoutError: No grids, or features of another width.
        """
        if features.tokens.shape[1:] != (self.config.in_dim,):
            raise LayoutError(
                f"features have shape {tuple(features.tokens.shape)}; expected {self.config.in_dim} channels each"
            )
        if features.layout.grids is None:
            raise LayoutError("a projector needs the grid of every image; make the layout with Layout.from_grids")
        return features.with_tokens(self.mlp(features.tokens))


KEYS = KeyMap(
    rename("0.{kind}", "mlp.fc1.{kind}"),
    rename("2.{kind}", "mlp.fc2.{kind}"),
)
"""LLaVA's names, there under `model.mm_projector.`."""

register_component(
    "projector",
    MLPProjectorConfig,
    MLPProjector,
    {"mlp": MLPProjectorConfig(), "mlp-tiny": MLPProjectorConfig(in_dim=32, out_dim=32)},
)
