"""Weights of a sharded model: drawn or read, without the whole model in the memory of any rank.

    allocate_shards(model)         a model that was built and sharded on meta gets memory for this rank's shares
    draw_shards(model)             first values: every tensor is drawn whole, as on one process, and let go when its share
                                   is kept, so at most a few tensors are whole at once
    read_shards(model, folder)     of a folder in a family's Hub layout each rank reads its shares, through mapped files

All three are called on every rank.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map

from vlkit.errors import RankError
from vlkit.models.factory import draw_weights
from vlkit.models.pretrained import read_weights
from vlkit.models.vlm import VisionLanguageModel
from vlkit.optim.agree import gather_json, raise_together, world
from vlkit.optim.parts import is_dtensor, local_box


def held_of(tensor: Tensor) -> tuple[Tensor, tuple[slice, ...]]:
    """This rank's share of a parameter, as memory to write to, and where in the whole it lies."""
    box = local_box(tensor)
    place = tuple(slice(start, start + size) for start, size in zip(box.offsets, box.sizes, strict=True))
    return _share(tensor), place


def allocate_shards(model: VisionLanguageModel, device: torch.device | str) -> None:
    """Memory for this rank's shares of a model on meta, without values yet."""
    model.to_empty(device=device)


def draw_shards(model: VisionLanguageModel) -> int:
    """Draw all weights anew: the bits that `create_model` gives on one process from the same random state.

    Returns:
        Bytes of the tensors that were whole at once, at most.

    Raises:
        RankError: Ranks in different random states; seed all alike.
        ConfigError: A tensor that no `reset_parameters` gives values to.
    """
    states = gather_json(zlib.crc32(torch.get_rng_state().numpy().tobytes()), world())
    if len(set(states)) > 1:
        odd = next(rank for rank, state in enumerate(states) if state != states[0])
        raise RankError(
            f"ranks 0 and {odd} have different random states, so they would draw shares of different weights; call "
            "torch.manual_seed with the same number on all"
        )
    draws = _WholeDraws(list(model.parameters()))
    with _together():
        draw_weights(model, during=draws, local=_share)
    return draws.most_bytes


def read_shards(model: VisionLanguageModel, folder: Path, **options: Any) -> None:
    """Read this rank's shares from a folder in a family's Hub layout, casting them to the dtype of the model.

    Args:
        model: Its config is the folder's; has memory already.
        folder: Seen by every rank.
        options: strict, layout, check_finite, allow_quantized, allow_pickle, as in `from_pretrained`.

    Raises:
        CheckpointError: Whatever is wrong on one rank, on all.
    """
    with _together():
        read_weights(model, folder, holding=held_of, **options)


@contextmanager
def _together() -> Iterator[None]:
    """What fails on one rank is raised on all of them, so that none waits for it later."""
    failure = None
    try:
        yield
    except Exception as error:
        failure = error
    raise_together(failure, world())


def _share(tensor: Tensor) -> Tensor:
    found = tensor.detach()
    return found.to_local() if is_dtensor(found) else found


class _WholeDraws(TorchFunctionMode):
    """While it is active, what is written into a sharded parameter goes into a whole tensor in its place.

    The share of it is kept as soon as another parameter is written to and nobody holds a view. A parameter that is
    written to a second time, as decoders do with the weights of their layers, is whole a second time.

    Attributes:
        most_bytes: Most bytes of whole tensors at once.
    """

    def __init__(self, parameters: Sequence[Tensor]) -> None:
        super().__init__()
        self.sharded = {id(p): p for p in parameters if is_dtensor(p)}
        self.open: dict[int, Tensor] = {}
        self.drawn: set[int] = set()
        self.most_bytes = 0

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if _asks_only(func):
            return func(*args, **(kwargs or {}))
        fresh = func in OVERWRITES or getattr(func, "__module__", None) == "torch.nn.init"
        touched: dict[int, Tensor] = {}

        def whole(value: Any) -> Any:
            parameter = self.sharded.get(id(value)) if isinstance(value, Tensor) else None
            if parameter is None:
                return value
            touched[id(parameter)] = parameter
            return self._whole(parameter, fresh)

        args, kwargs = tree_map(whole, tuple(args)), tree_map(whole, kwargs or {})
        made = func(*args, **kwargs)
        for key, parameter in touched.items():
            if made is self.open[key]:
                return parameter  # in-place functions give back what they were given
        return made

    def __exit__(self, *failure: Any) -> None:
        super().__exit__(*failure)
        self._keep(set(self.open))

    def _whole(self, parameter: Tensor, fresh: bool) -> Tensor:
        key = id(parameter)
        if key not in self.open:
            self._keep({other for other, tensor in self.open.items() if not _is_viewed(tensor)})
            again = key in self.drawn and not fresh  # what reads the first values needs them from all ranks
            self.open[key] = parameter.detach().full_tensor() if again else _empty(parameter)  # type: ignore[attr-defined]
            self.drawn.add(key)
            self.most_bytes = max(self.most_bytes, sum(tensor.nbytes for tensor in self.open.values()))
        return self.open[key]

    @torch.no_grad()
    def _keep(self, keys: set[int]) -> None:
        for key in keys:
            local, place = held_of(self.sharded[key])
            local.copy_(self.open.pop(key)[place])


OVERWRITES = {Tensor.normal_, Tensor.uniform_, Tensor.zero_, Tensor.fill_, Tensor.copy_}
_QUESTIONS = {Tensor.size, Tensor.dim, Tensor.numel, Tensor.stride, Tensor.element_size, Tensor.is_floating_point}


def _asks_only(func: Callable[..., Any]) -> bool:
    """Whether a function looks at shape, type or place of a tensor, not at its values."""
    getter = getattr(func, "__name__", "") == "__get__" and func not in (Tensor.data.__get__, Tensor.T.__get__)  # type: ignore[attr-defined]
    return getter or func in _QUESTIONS


def _empty(parameter: Tensor) -> Tensor:
    return torch.empty(parameter.shape, dtype=parameter.dtype, device=_share(parameter).device)


def _is_viewed(tensor: Tensor) -> bool:
    """Whether another tensor looks at the same memory."""
    storage = tensor.untyped_storage()
    return bool(torch._C._storage_Use_Count(storage._cdata) > _ALONE)


_ALONE = 0
_ALONE = torch._C._storage_Use_Count((_probe := torch.empty(1)).untyped_storage()._cdata)
