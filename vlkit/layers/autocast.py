"""What autocast says of a tensor's device. On meta, where shapes and costs are computed without memory, there is none."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor


def autocast_dtype(x: Tensor) -> torch.dtype | None:
    """The dtype that products are computed in under autocast; None outside of it."""
    if x.is_meta or not torch.is_autocast_enabled(x.device.type):
        return None
    return torch.get_autocast_dtype(x.device.type)


def without_autocast(x: Tensor) -> AbstractContextManager[object]:
    """A context in which autocast changes nothing."""
    return nullcontext() if x.is_meta else torch.autocast(x.device.type, enabled=False)
