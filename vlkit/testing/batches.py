"""Small random batches that fit a model."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from vlkit.packing import Batch, Layout, Packed

if TYPE_CHECKING:
    from vlkit.models.vlm import VisionLanguageModel

Grid = tuple[int, int]


def random_patches(
    grids: Sequence[Grid], patch_dim: int, *, seed: int = 0, dtype: torch.dtype = torch.float32
) -> Packed:
    """Normal-distributed patches of images with these grids (rows, columns).

    The same seed gives the same values in every dtype.
    """
    generator = torch.Generator().manual_seed(seed)
    layout = Layout.from_grids(grids)
    return Packed(torch.randn(layout.num_tokens, patch_dim, generator=generator, dtype=torch.float64).to(dtype), layout)


def random_batch(
    model: VisionLanguageModel,
    sequences: Sequence[tuple[int, Sequence[Grid]]] = ((5, [(1, 2)]), (3, []), (7, [(3, 1), (1, 1)])),
    *,
    seed: int = 0,
    labels: bool = True,
) -> Batch:
    """One random batch.

    Args:
        model: Decides the vocabulary, the patch size and the dtype.
        sequences: For each sequence the number of text tokens and its images' grids (rows, columns) in blocks of patches that
            merge to one token. Text is spread before, between and behind the images.
        seed: Of ids and patches.
        labels: Whether to add labels: the ids, with -100 at placeholders.
    """
    config = model.config
    generator = torch.Generator().manual_seed(seed)
    merge = config.projector.merge_size  # type: ignore[attr-defined]
    packed_ids: list[torch.Tensor] = []
    lengths: list[int] = []
    grids: list[Grid] = []
    for num_text, images in sequences:
        text = torch.randint(config.llm.vocab_size - 2, (num_text,), generator=generator)  # type: ignore[attr-defined]
        for placeholder in sorted({config.image_token_id, config.video_token_id} - {None}):  # type: ignore[type-var]
            text += text >= placeholder  # never a placeholder
        parts = list(text.tensor_split(len(images) + 1))
        ids = [parts[0]]
        for (rows, columns), after in zip(images, parts[1:], strict=True):
            grids.append((rows * merge, columns * merge))
            tokens = math.prod(config.projector.out_grid((1, *grids[-1])))  # type: ignore[attr-defined]
            ids += [torch.full((tokens,), config.image_token_id), after]
        packed_ids.append(torch.cat(ids))
        lengths.append(len(packed_ids[-1]))
    tokens = torch.cat(packed_ids)
    dtype = next(model.parameters()).dtype
    return Batch(
        ids=Packed(tokens, Layout(tuple(lengths))),
        patches=random_patches(grids, config.vision.patch_dim, seed=seed, dtype=dtype) if grids else None,  # type: ignore[attr-defined]
        labels=torch.where(tokens == config.image_token_id, -100, tokens) if labels else None,
    )
