"""Small random batches that fit a model."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from vlkit.packing import Batch, Layout, Packed

if TYPE_CHECKING:
    from vlkit.models.vlm import VisionLanguageModel

Grid = tuple[int, ...]


def random_patches(
    grids: Sequence[Grid], patch_dim: int, *, seed: int = 0, dtype: torch.dtype = torch.float32
) -> Packed:
    """Normal-distributed patches of images with these grids (rows, columns), or (time, rows, columns) for videos.

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
            merge to one token; (time, rows, columns) makes a video. Text is spread before, between and behind them.
        seed: Of ids and patches.
        labels: Whether to add labels: the ids, with -100 at placeholders.
    """
    config = model.config
    generator = torch.Generator().manual_seed(seed)
    merge = config.projector.merge_size  # type: ignore[attr-defined]
    image, video = config.image_token_id, config.video_token_id
    placeholders = [image] if video is None else sorted((image, video))
    packed_ids: list[torch.Tensor] = []
    lengths: list[int] = []
    grids: list[Grid] = []
    for num_text, images in sequences:
        text = torch.randint(config.llm.vocab_size - len(placeholders), (num_text,), generator=generator)  # type: ignore[attr-defined]
        for placeholder in placeholders:
            text += text >= placeholder  # never a placeholder
        parts = list(text.tensor_split(len(images) + 1))
        ids = [parts[0]]
        for grid, after in zip(images, parts[1:], strict=True):
            time, rows, columns = grid if len(grid) == 3 else (1, *grid)
            grids.append((time, rows * merge, columns * merge))
            length = math.prod(config.projector.out_grid(grids[-1]))  # type: ignore[attr-defined]
            ids += [torch.full((length,), video if time > 1 and video is not None else image), after]
        packed_ids.append(torch.cat(ids))
        lengths.append(len(packed_ids[-1]))
    tokens = torch.cat(packed_ids)
    dtype = next(model.parameters()).dtype
    return Batch(
        ids=Packed(tokens, Layout(tuple(lengths))),
        patches=random_patches(grids, config.vision.patch_dim, seed=seed, dtype=dtype) if grids else None,  # type: ignore[attr-defined]
        labels=tokens.masked_fill(torch.isin(tokens, torch.tensor(placeholders)), -100) if labels else None,
        seconds=tuple(0.75 * (grid[0] > 1) for grid in grids) if any(grid[0] > 1 for grid in grids) else None,
    )
