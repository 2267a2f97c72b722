"""What contrastive training has besides a vision-language model: the way from images and from texts into one space.

    features of the tower -> attention pooling -> linear -> unit vectors [images, dim]   \\
    ids -> text encoder   -> attention pooling -> linear -> unit vectors [texts, dim]    -> SigLIP: exp(log_scale) * <x, z> + bias

    heads = ContrastHeads.from_pretrained("runs/contrast/model/contrast")
    similarity = heads.images(model.vision(batch.patches)) @ heads.texts(ids).T
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Self

import torch.nn.functional as F
from jaxtyping import Float
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from vlkit.config import Config, Size
from vlkit.errors import CheckpointError, ConfigError, KeyMismatchError
from vlkit.hub.atomic import write_folder
from vlkit.hub.strict_json import read_json
from vlkit.layers.pooling import AttentionPool
from vlkit.objectives.siglip import SigLIP
from vlkit.packing import Packed
from vlkit.training.text_encoder import TextEncoder, TextEncoderConfig

CONFIG, WEIGHTS = "config.json", "model.safetensors"


class ContrastConfig(Config):
    """Sizes of the heads.

    Attributes:
        image_dim: Width of the tower's features.
        dim: Of the space that images and texts share.
        pool_heads: Heads of the pooling of images.
        text: Of the text encoder; its pooling has as many heads as its blocks.
    """

    image_dim: Size
    dim: Size
    pool_heads: Size
    text: TextEncoderConfig

    def check(self) -> None:
        if self.image_dim % self.pool_heads:
            raise ConfigError(
                f"ContrastConfig: the tower's features are {self.image_dim} wide, no multiple of pool_heads={self.pool_heads}"
            )


class ContrastHeads(nn.Module):
    """Pooling and projection of both sides, the text encoder, and the scale and bias of the similarity.

    Source: SigLIP, arXiv:2303.15343.
    """

    def __init__(self, config: ContrastConfig) -> None:
        super().__init__()
        self.config = config
        self.image_pool = AttentionPool(config.image_dim, config.pool_heads)
        self.image_proj = nn.Linear(config.image_dim, config.dim, bias=False)
        self.text = TextEncoder(config.text)
        self.text_pool = AttentionPool(config.text.dim, config.text.num_heads)
        self.text_proj = nn.Linear(config.text.dim, config.dim, bias=False)
        self.similarity = SigLIP()

    def images(self, features: Packed) -> Float[Tensor, "images dim"]:
        """Unit vectors, in the dtype of the heads.

        Args:
            features: Of the tower, [patches, image_dim], one item per image.
        """
        pooled = self.image_pool(features.to(self.image_proj.weight.dtype))
        return F.normalize(self.image_proj(pooled), dim=-1)

    def texts(self, ids: Packed) -> Float[Tensor, "texts dim"]:
        """Unit vectors of texts.

        Args:
            ids: [tokens], one item per text.
        """
        return F.normalize(self.text_proj(self.text_pool(self.text(ids))), dim=-1)

    def save_pretrained(self, folder: str | os.PathLike[str]) -> None:
        """Write config.json and model.safetensors, both or neither.

        Raises:
            CheckpointError: The folder cannot be written.
        """

        def write(new: Path) -> None:
            (new / CONFIG).write_text(json.dumps(self.config.to_dict(), indent=2) + "\n", encoding="utf-8")
            save_file({name: value.contiguous().cpu() for name, value in self.state_dict().items()}, new / WEIGHTS)

        write_folder(Path(folder), write)

    @classmethod
    def from_pretrained(cls, folder: str | os.PathLike[str]) -> Self:
        """The inverse of `save_pretrained`.

        Raises:
            CheckpointError: No such files, or broken ones.
            ConfigError: A config that does not describe heads.
            KeyMismatchError: Weights of other heads.
        """
        folder = Path(folder)
        heads = cls(ContrastConfig.from_dict(read_json(folder / CONFIG)))
        try:
            state = load_file(folder / WEIGHTS)
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"{folder / WEIGHTS}: cannot be read: {error}") from error
        wanted, found = ({name: tuple(t.shape) for name, t in each.items()} for each in (heads.state_dict(), state))
        if wanted != found:
            name = sorted({*wanted.items()} ^ {*found.items()})[0][0]
            raise KeyMismatchError(
                f"{folder}: {name} is {found.get(name, 'missing')} in the file and {wanted.get(name, 'unknown')} by the config"
            )
        heads.load_state_dict(state)
        return heads
