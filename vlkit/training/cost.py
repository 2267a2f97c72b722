"""What a forward and a backward cost, counted by running the model's own code on meta: shapes, no memory, no values.

    model on meta -> image_cost(model, grids)         -> Cost of tower and projector for images
                  -> text_cost(model, lengths)        -> Cost of embedding, blocks and norm for sequences
                  -> head_cost(model, num_targets)    -> Cost of head and loss

Nothing here knows an architecture, so it holds for any tower, projector and decoder that fit together. Operations are what
PyTorch dispatches; a product of [n, k] and [k, m] counts 2 n k m. Attention and experts are one operator each on meta:

    attention            2 pairs heads (key_dim + value_dim); its backward makes the scores again, 2 pairs heads (3 key_dim +
                         2 value_dim). Pairs are (query, key) inside an item: length^2, causal length (length + 1) / 2
    experts              3 products per (token, chosen expert) forward, 6 backward (3 where the experts are frozen)

What is kept for the backward are the tensors that autograd saves, each memory once, parameters left out. Equal blocks (same
parameters' shapes, same inputs' shapes) are run once and counted as often as they occur.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from vlkit.errors import ConfigError
from vlkit.llm.output import Deep
from vlkit.models.vlm import VisionLanguageModel
from vlkit.packing import Layout, Packed
from vlkit.training.recompute import blocks_of

aten, own = torch.ops.aten, torch.ops.vlkit


@dataclass(frozen=True, kw_only=True)
class Cost:
    """Operations (multiplications and additions) of one pass, and what is kept between forward and backward.

    Attributes:
        forward: Operations of all matrix products but attention's.
        backward: The same, of the backward.
        attention: Operations of attention, forward: the part that grows with the square of an item's length.
        attention_backward: The same, of the backward.
        kept: Bytes that the backward needs.
        kept_outside: Those of them that are kept whether or not blocks are computed again: what lies outside of blocks.
        inputs: Bytes of the blocks' inputs, all that is kept of blocks that are computed again.
        largest_block: Bytes that the block keeps that keeps most.
        products: Bytes of the results of the blocks' products, attentions and experts: what is kept of blocks besides their
            inputs where the rest is computed again.
        block_forward: Operations of the blocks' forward with their attention: what computing them again costs.
    """

    forward: int = 0
    backward: int = 0
    attention: int = 0
    attention_backward: int = 0
    kept: int = 0
    kept_outside: int = 0
    inputs: int = 0
    largest_block: int = 0
    products: int = 0
    block_forward: int = 0

    @property
    def operations(self) -> int:
        """Of forward and backward."""
        return self.forward + self.backward + self.attention + self.attention_backward

    def __add__(self, other: Cost) -> Cost:
        total = {f.name: getattr(self, f.name) + getattr(other, f.name) for f in fields(self)}
        return Cost(**{**total, "largest_block": max(self.largest_block, other.largest_block)})

    def times(self, count: int) -> Cost:
        """Of `count` such passes at once."""
        return Cost(**{f.name: count * getattr(self, f.name) for f in fields(self)})


def image_cost(model: VisionLanguageModel, grids: Sequence[tuple[int, int, int]]) -> Cost:
    """Images through tower and projector.

    Args:
        model: On meta.
        grids: (time, rows, columns) of each image, in patches.
    """
    layout = Layout.from_grids(grids)
    patches = torch.empty(layout.num_tokens, model.config.vision.patch_dim, device="meta")  # type: ignore[attr-defined]
    return _count(model, lambda: model.encode_images(Packed(patches, layout)).tokens)


def text_cost(model: VisionLanguageModel, lengths: Sequence[int], *, num_visual: int = 0) -> Cost:
    """Sequences through embedding, blocks and last norm.

    Args:
        model: On meta.
        lengths: Tokens of each sequence.
        num_visual: How many of the tokens come from images.

    Raises:
        SequenceTooLongError: A sequence beyond the decoder's positions.
    """
    layout, llm, config = Layout(tuple(lengths)), model.llm, model.config
    width = config.projector.out_dim * getattr(config.projector, "num_levels", 1)  # type: ignore[attr-defined]

    def run() -> Tensor:
        x = llm.embed(torch.empty(layout.num_tokens, dtype=torch.int64, device="meta"))
        deep = None
        if num_visual:
            images = torch.empty(num_visual, width, dtype=x.dtype, device="meta", requires_grad=True)
            rows = torch.empty(num_visual, dtype=torch.int64, device="meta")
            first, *rest = images.split(x.shape[1], dim=1)
            x = x.index_copy(0, rows, first)
            deep = Deep(rows, tuple(rest)) if rest else None
        return llm(Packed(x, layout), deep=deep).hidden.tokens

    return _count(model, run)


def head_cost(model: VisionLanguageModel, num_targets: int) -> Cost:
    """Head and loss of `num_targets` tokens: logits, and the gradients of hidden rows and head.

    The loss makes both gradients in its forward, a chunk of rows at a time, and keeps them: the rows' in the model's dtype,
    the head's in fp32.
    """
    weight = model.llm.head_weight
    product = 2 * num_targets * weight.numel()
    wide = max(4, weight.element_size())
    kept = num_targets * (weight.shape[1] * weight.element_size() + 8) + (
        weight.numel() * wide if weight.requires_grad else 0
    )
    return Cost(forward=product, backward=product * (1 + weight.requires_grad), kept=kept, kept_outside=kept)


def count_products(run: Callable[[], object]) -> int:
    """Operations of all matrix products that `run` dispatches."""
    tally = _Tally()
    with torch.no_grad(), tally:
        run()
    return tally.counts.total()


# ---- counting -------------------------------------------------------------------------------------------------------


def _matrix_product(a: Tensor, b: Tensor) -> int:
    """Also of batches: [..., n, k] and [..., k, m]."""
    return 2 * a.numel() * b.shape[-1]


def _pairs(offsets: Tensor, causal: bool) -> int:
    lengths = [b - a for a, b in pairwise(offsets.tolist())]
    return sum(n * (n + 1) // 2 if causal else n * n for n in lengths)


def _attention(q: Tensor, k: Tensor, v: Tensor, offsets: Tensor, causal: bool, scale: float) -> int:
    return 2 * _pairs(offsets, causal) * q.shape[1] * (q.shape[2] + v.shape[2])


def _attention_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, offsets: Tensor, causal: bool, scale: float
) -> int:
    return 2 * _pairs(offsets, causal) * q.shape[1] * (3 * q.shape[2] + 2 * v.shape[2])


def _experts(x: Tensor, experts: Tensor, weights: Tensor, gate: Tensor, *_: Any) -> int:
    return 3 * 2 * experts.numel() * gate.shape[1] * gate.shape[2]


def _experts_backward(grad: Tensor, kept: Tensor, x: Tensor, experts: Tensor, weights: Tensor, *rest: Any) -> int:
    gate, train = rest[0], rest[-1]
    return (6 if train else 3) * 2 * experts.numel() * gate.shape[1] * gate.shape[2]


PRODUCTS: dict[Any, Callable[..., int]] = {
    aten.mm: _matrix_product,
    aten.addmm: lambda add, a, b: _matrix_product(a, b),
    own.experts: _experts,
    own.experts_backward: _experts_backward,
}
ATTENTION: dict[Any, Callable[..., int]] = {
    own.attention: _attention,
    own.attention_backward: _attention_backward,
    # on meta, torch's own attention is two batched products: a resampler's queries at the patches
    aten.bmm: _matrix_product,
    aten.baddbmm: lambda add, a, b: _matrix_product(a, b),
}
_BACKWARD = {"forward": "backward", "attention": "attention_backward"}


class _Tally(TorchDispatchMode):
    """Counts operations, and which memory autograd keeps."""

    def __init__(self, parameters: Iterable[Tensor] = ()) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()
        self.results = 0
        self.in_backward = False
        self.kept: dict[int, torch.UntypedStorage] = {}
        self.not_kept = {_memory(p) for p in parameters}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        for name, table in (("forward", PRODUCTS), ("attention", ATTENTION)):
            if func.overloadpacket in table:
                name = _BACKWARD[name] if self.in_backward else name
                self.counts[name] += table[func.overloadpacket](*args)
        result = func(*args, **(kwargs or {}))
        if not self.in_backward and (func.overloadpacket in PRODUCTS or func.overloadpacket in ATTENTION):
            self.results += sum(t.numel() * t.element_size() for t in tree_leaves(result))
        return result

    def keep(self, tensor: Tensor) -> Tensor:
        """What autograd calls with every tensor that it saves."""
        if tensor.is_meta and _memory(tensor) not in self.not_kept:  # boundaries of items stay on the host
            # Held, so that no other memory can take its place.
            self.kept[_memory(tensor)] = tensor.untyped_storage()
        return tensor

    def differentiate(self, results: Sequence[Tensor]) -> None:
        results = [result for result in results if result.requires_grad]
        self.in_backward = True
        if results:
            torch.autograd.backward(results, [torch.empty_like(result) for result in results])
        self.in_backward = False


class _Trace:
    """A forward and a backward in which equal blocks are run once.

    A block's output is cut off from what made it, so the graph falls into pieces, each of which is differentiated for itself.
    """

    def __init__(self, model: VisionLanguageModel) -> None:
        self.model = model
        self.tally = _Tally(model.parameters())
        self.known: dict[object, tuple[Cost, Any]] = {}
        self.blocks = Cost()
        self.ends: list[Tensor] = []

    def run(self, forward: Callable[[], Tensor]) -> Cost:
        tally = self.tally
        try:
            with self._in_place(), torch.enable_grad(), tally, saved_tensors_hooks(tally.keep, lambda tensor: tensor):
                result = forward()
                tally.differentiate([*self.ends, result])
        finally:
            self.model.zero_grad(set_to_none=True)
        outside = sum(storage.nbytes() for storage in tally.kept.values())
        return Cost(**tally.counts, kept=outside, kept_outside=outside) + self.blocks

    @contextmanager
    def _in_place(self) -> Iterator[None]:
        """Calls of blocks come here, as long as the context lasts."""
        blocks: list[Any] = [*blocks_of(self.model.vision), *blocks_of(self.model.llm)]
        own = [vars(block).pop("forward", None) for block in blocks]
        for block in blocks:
            block.forward = partial(self._block, block, block.forward)
        try:
            yield
        finally:
            for block, forward in zip(blocks, own, strict=True):
                vars(block).pop("forward")
                if forward is not None:
                    block.forward = forward

    def _block(self, block: nn.Module, forward: Callable[..., Any], x: Tensor, *args: Any, **kwargs: Any) -> Any:
        if x.grad_fn is not None:
            self.ends.append(x)
        key = (*map(_kind, block.parameters()), _kind(x), *map(_kind, tree_leaves((args, kwargs))))
        if key not in self.known:
            self.known[key] = self._first(forward, x, args, kwargs)
        cost, output = self.known[key]
        self.blocks += cost
        return tree_map_only(Tensor, lambda t: torch.empty_like(t).requires_grad_(t.requires_grad), output)

    def _first(
        self, forward: Callable[..., Any], x: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[Cost, Any]:
        tally = self.tally
        shared = {_memory(t) for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        before, tally.counts = tally.counts, Counter()
        results, tally.results = tally.results, 0
        outside, tally.kept = tally.kept, {}
        output = forward(x.detach().requires_grad_(x.requires_grad), *args, **kwargs)
        again, products = tally.counts.total(), tally.results
        tally.differentiate(
            tree_leaves(output)[:1]
        )  # x; what else a block tells, such as its routing, is no part of the loss
        kept = sum(storage.nbytes() for memory, storage in tally.kept.items() if memory not in shared)
        cost = Cost(
            **tally.counts,
            kept=kept,
            inputs=x.untyped_storage().nbytes(),
            largest_block=kept,
            products=products,
            block_forward=again,
        )
        tally.kept = outside | {memory: storage for memory, storage in tally.kept.items() if memory in shared}
        tally.counts, tally.results = before, results
        return cost, output


def _count(model: VisionLanguageModel, forward: Callable[[], Tensor]) -> Cost:
    if not all(parameter.is_meta for parameter in model.parameters()):
        raise ConfigError("costs are counted on meta: build the model with device='meta'")
    return _Trace(model).run(forward)


def _kind(leaf: Any) -> object:
    """What of an argument decides about the cost of a block."""
    if not isinstance(leaf, Tensor):
        return leaf if isinstance(leaf, Layout) else None
    return (leaf.shape, leaf.dtype, leaf.requires_grad) if leaf.is_meta else tuple(leaf.flatten().tolist())


def _memory(tensor: Tensor) -> int:
    """The same number for tensors that share memory, on meta too."""
    return tensor.untyped_storage()._cdata
