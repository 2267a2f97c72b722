"""Building on the meta device: shapes without memory, and without drawing values for it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode


@contextmanager
def on_meta() -> Iterator[None]:
    """Modules made inside have no memory. Their initial values are not drawn: on meta there is nothing to hold them.

    Drawing there would cost more than time: torch's random functions on meta import its compiler, more than a second.
    """
    with torch.device("meta"), _NoDraws():
        yield


class _NoDraws(TorchFunctionMode):
    """Random filling of meta tensors does nothing."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if func in _DRAWS or getattr(func, "__module__", None) == "torch.nn.init":
            target = kwargs["tensor"] if "tensor" in kwargs else args[0]
            if isinstance(target, Tensor) and target.is_meta:
                return target
        return func(*args, **kwargs)


_DRAWS = {Tensor.normal_, Tensor.uniform_}
