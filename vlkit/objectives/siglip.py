"""The sigmoid loss of image-text pairs, over all pairs of all ranks.

    images [n, dim], texts [n, dim] -> rows of length 1 -> logits = exp(log_scale) * images @ texts^T + bias
                                    -> every pair alone: is it one or not?

Every rank has n pairs, N together, and meets the texts of all ranks block by block, forward and backward:

    exchange="gather"   all texts at once, [N, dim] on every rank
    exchange="ring"     one block travels from rank to rank, and in the backward its gradient with it, home at the end

Logits exist for one block, or `chunk` rows of it, and are made again in the backward: nothing of [n, N] is kept. The gradients of
texts that other ranks have seen come back, so that a mean over ranks, as data parallel training takes it, is the exact gradient.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, Literal

import torch
import torch.distributed as dist
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from vlkit.errors import ConfigError, LayoutError, RankError

Exchange = Literal["gather", "ring"]


class SigLIP(nn.Module):
    """`siglip_loss` with its learnt temperature and bias.

    Temperature 10 and bias -10 let training begin near a model that says no to every pair, which is right for nearly all. Both
    are scalars for AdamW, without weight decay, which would pull the temperature to 1: `muon_param_groups` puts them into such a
    group, because of `decays`.

    Args:
        exchange: How ranks meet the texts of others, see the top of this file.
        chunk: Images whose logits exist at once; None is all of this rank.

    Raises:
        ConfigError: Another word, or a chunk below 1.

    Source: SigLIP, arXiv:2303.15343, sections 3.2 (initial values) and 3.3 (ranks).
    """

    decays = False

    def __init__(self, *, exchange: Exchange = "gather", chunk: int | None = None) -> None:
        super().__init__()
        _check(exchange, chunk)
        self.exchange: Exchange = exchange
        self.chunk = chunk
        self.log_scale = nn.Parameter(torch.empty(()))
        self.bias = nn.Parameter(torch.empty(()))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.constant_(self.log_scale, math.log(10))
        nn.init.constant_(self.bias, -10.0)

    def forward(
        self,
        images: Float[Tensor, "pairs dim"],
        texts: Float[Tensor, "pairs dim"],
        *,
        group: dist.ProcessGroup | None = None,
        ignore: Bool[Tensor, "pairs all_pairs"] | None = None,
    ) -> Float[Tensor, ""]:
        """This rank's part of the loss, see `siglip_loss`."""
        return siglip_loss(
            images,
            texts,
            self.log_scale,
            self.bias,
            group=group,
            exchange=self.exchange,
            chunk=self.chunk,
            ignore=ignore,
        )


def siglip_loss(
    images: Float[Tensor, "pairs dim"],
    texts: Float[Tensor, "pairs dim"],
    log_scale: Float[Tensor, ""],
    bias: Float[Tensor, ""],
    *,
    group: dist.ProcessGroup | None = None,
    exchange: Exchange = "gather",
    chunk: int | None = None,
    ignore: Bool[Tensor, "pairs all_pairs"] | None = None,
) -> Float[Tensor, ""]:
    """This rank's part of the loss; the mean of the parts over the ranks is the loss of all pairs:

        -1/N sum_ij log sigmoid(s_ij * (exp(log_scale) * <x_i, y_j> + bias)),   s_ij = 1 where i = j, else -1

    with x and y the vectors at length 1. The part is W/N times the sum over this rank's images and all texts, for W ranks, so
    ranks may have different numbers of pairs, also none. Computed in fp32 (fp64 for fp64 inputs). First derivatives only.

    Args:
        images: One vector per image, of any length.
        texts: The same of the texts; row i belongs to image i.
        log_scale: Logarithm of the temperature that multiplies.
        bias: Added to every logit.
        group: The ranks; None is all, or this process where there are no others. All of them have to call, and to go backward.
        exchange: How ranks meet the texts of others, see the top of this file; the loss is the same.
        chunk: Images whose logits exist at once; None is all of this rank.
        ignore: Pairs that do not count, such as two with the same text (see `repeated_pairs`): a row for each image of this rank,
            a column for each text of all ranks, in the order of the ranks.

    Raises:
        ConfigError: Another word for exchange, or a chunk below 1.
        LayoutError: Images, texts and ignore do not fit.
        RankError: Gradients are recorded on some ranks and not on others, which would wait for each other in the backward.

    Source: SigLIP, arXiv:2303.15343, equation 1 and algorithm 1.
    """
    _check(exchange, chunk)
    if images.ndim != 2 or images.shape != texts.shape:
        raise LayoutError(
            f"expected images and texts as rows of pairs, found {list(images.shape)} and {list(texts.shape)}"
        )
    wide = torch.float64 if images.dtype == torch.float64 else torch.float32
    x, y = (F.normalize(vectors.to(wide), dim=-1) for vectors in (images, texts))
    learn = [t.requires_grad and torch.is_grad_enabled() for t in (x, y, log_scale, bias)]
    ranks = _meet(len(x), learn[1], any(learn), group, x.device)
    if ignore is not None and ignore.shape != (len(x), sum(ranks.sizes)):
        raise LayoutError(
            f"ignore has a row per image of this rank and a column per text of all ranks, [{len(x)}, {sum(ranks.sizes)}]; "
            f"found {list(ignore.shape)}"
        )
    loss: Tensor = _Pairs.apply(
        x, y, log_scale.to(wide), bias.to(wide), ranks, exchange, chunk or max(len(x), 1), ignore
    )
    return loss


def repeated_pairs(
    keys: Int[Tensor, " pairs"], *, group: dist.ProcessGroup | None = None
) -> Bool[Tensor, "pairs all_pairs"]:
    """Which pairs are none although image and text fit: those of two samples with the same key, for `siglip_loss(ignore=)`.

    Args:
        keys: A number per sample that says what it shows, such as a hash of its text.
        group: As in `siglip_loss`.
    """
    ranks = _meet(len(keys), False, False, group, keys.device)
    same = torch.empty(len(keys), sum(ranks.sizes), dtype=torch.bool, device=keys.device)

    def compare(owner: int, block: Tensor, _: Tensor | None) -> None:
        columns = same[:, ranks.columns(owner)]
        torch.eq(keys[:, None], block.T, out=columns)
        if owner == ranks.rank:
            columns.fill_diagonal_(False)

    EXCHANGES["gather"](compare, keys[:, None], ranks, False)
    return same


def _check(exchange: str, chunk: int | None) -> None:
    if exchange not in ("gather", "ring"):
        raise ConfigError(f"siglip: exchange {exchange!r} is not one of gather, ring")
    if chunk is not None and chunk < 1:
        raise ConfigError(f"siglip: expected a chunk of at least 1 image, found {chunk}")


class _Pairs(torch.autograd.Function):
    """W/N times the sum of softplus(-s * logit) over this rank's images and everybody's texts."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        y: Tensor,
        log_scale: Tensor,
        bias: Tensor,
        ranks: _Ranks,
        exchange: Exchange,
        chunk: int,
        ignore: Tensor | None,
    ) -> Tensor:
        total = x.new_zeros(())

        def add(owner: int, block: Tensor, _: Tensor | None) -> None:
            for rows in _slices(len(x), chunk):
                against = _against(x[rows], block, log_scale, bias, rows.start if owner == ranks.rank else None)
                # softplus; torch's own is linear above 20, which fp64 notices
                losses = F.logsigmoid(against.neg_()).neg_()
                if ignore is not None:
                    losses.masked_fill_(ignore[rows, ranks.columns(owner)], 0)
                total.add_(losses.sum())

        EXCHANGES[exchange](add, y, ranks, False)
        ctx.save_for_backward(x, y, log_scale, bias, ignore)
        ctx.options = ranks, exchange, chunk
        return total * ranks.factor

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        x, y, log_scale, bias, ignore = ctx.saved_tensors
        ranks, exchange, chunk = ctx.options
        scale = log_scale.exp()
        grad_x, grad_scale, grad_bias = torch.zeros_like(x), torch.zeros_like(log_scale), torch.zeros_like(bias)

        def add(owner: int, block: Tensor, grad_block: Tensor | None) -> None:
            for rows in _slices(len(x), chunk):
                own = rows.start if owner == ranks.rank else None
                grad = _against(x[rows], block, log_scale, bias, own).sigmoid_()
                if own is not None:
                    grad.diagonal(own).neg_()
                if ignore is not None:
                    grad.masked_fill_(ignore[rows, ranks.columns(owner)], 0)
                grad.mul_(upstream * ranks.factor)
                with torch.autocast(x.device.type, enabled=False):
                    grad_rows = scale * (grad @ block)
                    grad_x[rows] += grad_rows
                    grad_scale.add_((grad_rows * x[rows]).sum())  # = sum of grad * scale * cosine
                    grad_bias.add_(grad.sum())
                    if grad_block is not None:
                        grad_block.addmm_(grad.T, scale * x[rows])

        grad_y = EXCHANGES[exchange](add, y, ranks, ranks.texts_learn)
        return grad_x, grad_y, grad_scale, grad_bias, *[None] * 4


def _against(
    rows: Tensor, block: Tensor, log_scale: Tensor, bias: Tensor, diagonal: int | None
) -> Float[Tensor, "rows block"]:
    """-s * logit: how much speaks against what is so. From `diagonal` on, row i and column diagonal + i are a pair."""
    with torch.autocast(rows.device.type, enabled=False):
        logits = (rows @ block.T).mul_(log_scale.exp()).add_(bias)
    if diagonal is not None:
        logits.diagonal(diagonal).neg_()
    return logits


def _slices(count: int, chunk: int) -> list[slice]:
    return [slice(start, min(start + chunk, count)) for start in range(0, count, chunk)]


# Ranks


@dataclass(frozen=True)
class _Ranks:
    """Who takes part: pairs of every rank, whether texts learn on any, and this rank's number."""

    sizes: tuple[int, ...]
    texts_learn: bool
    rank: int
    group: dist.ProcessGroup | None

    @property
    def factor(self) -> float:
        """W/N; 0 where nobody has a pair."""
        return len(self.sizes) / max(sum(self.sizes), 1)

    def columns(self, owner: int) -> slice:
        """Where the texts of a rank stand among all."""
        end = list(accumulate(self.sizes))[owner]
        return slice(end - self.sizes[owner], end)


def _meet(
    num_pairs: int, texts_learn: bool, any_learns: bool, group: dist.ProcessGroup | None, device: torch.device
) -> _Ranks:
    """Ranks tell each other how many pairs they have and whether they will go backward."""
    if not dist.is_initialized() or dist.get_world_size(group) == 1:
        return _Ranks((num_pairs,), texts_learn, 0, None)
    told = torch.tensor([num_pairs, texts_learn, any_learns], device=device)
    heard = told.new_empty(dist.get_world_size(group), 3)
    dist.all_gather(list(heard.unbind()), told, group=group)
    sizes, texts, learning = heard.T.tolist()
    if len(set(learning)) > 1:
        still = [rank for rank, learns in enumerate(learning) if not learns]
        raise RankError(
            f"siglip: gradients are recorded on some ranks but not on {still}, which would be waited for in the backward; "
            "let the same parameters learn on all, and run what is only measured under no_grad on all"
        )
    return _Ranks(tuple(sizes), any(texts), dist.get_rank(group), group)


Visit = Callable[[int, Tensor, Tensor | None], None]
"""(rank that a block of texts is from, the block, what to add its gradient to or None)."""


def _gather(visit: Visit, y: Tensor, ranks: _Ranks, learns: bool) -> Tensor | None:
    """Show a visitor the texts of all ranks; the gradient of this rank's, if it made one."""
    num_ranks, most = len(ranks.sizes), max(ranks.sizes)
    if num_ranks == 1:
        grad = torch.zeros_like(y) if learns else None
        visit(0, y, grad)
        return grad
    blocks = y.new_empty(num_ranks, most, y.shape[1])
    padded = F.pad(y, (0, 0, 0, most - len(y)))  # collectives want equal sizes
    dist.all_gather(list(blocks.unbind()), padded, group=ranks.group)
    grads = torch.zeros_like(blocks) if learns else None
    for owner, size in enumerate(ranks.sizes):
        visit(owner, blocks[owner, :size], None if grads is None else grads[owner, :size])
    if grads is None:
        return None
    home = torch.empty_like(grads)  # what each rank found for this one's texts
    dist.all_to_all_single(home, grads, group=ranks.group)
    return home.sum(0)[: len(y)]


def _ring(visit: Visit, y: Tensor, ranks: _Ranks, learns: bool) -> Tensor | None:
    """The same, with one block at a time: blocks move on to the next rank, their gradients with them."""
    num_ranks, dim = len(ranks.sizes), y.shape[1]
    block, grad = y, torch.zeros_like(y) if learns else None
    for step in range(num_ranks):
        owner = (ranks.rank - step) % num_ranks
        visit(owner, block, grad)
        if num_ranks == 1:
            return grad
        if step < num_ranks - 1:
            moved = _pass_on(block if grad is None else torch.cat((block, grad), 1), owner, ranks)
            block, grad = (moved, None) if grad is None else (moved[:, :dim], moved[:, dim:])
    return None if grad is None else _pass_on(grad, (ranks.rank + 1) % num_ranks, ranks)


def _pass_on(rows: Tensor, owner: int, ranks: _Ranks) -> Tensor:
    """Send a block to the next rank and get that of the one before; blocks without rows are not sent."""
    num_ranks, group = len(ranks.sizes), ranks.group or dist.group.WORLD
    assert group is not None
    found = rows.new_empty(ranks.sizes[owner - 1], rows.shape[1])
    after, before = (dist.get_global_rank(group, (ranks.rank + way) % num_ranks) for way in (1, -1))
    moves = [
        dist.P2POp(move, tensor, peer, group)
        for move, tensor, peer in ((dist.isend, rows.contiguous(), after), (dist.irecv, found, before))
        if tensor.numel()
    ]
    for work in dist.batch_isend_irecv(moves) if moves else ():
        work.wait()
    return found


EXCHANGES: dict[Exchange, Callable[[Visit, Tensor, _Ranks, bool], Tensor | None]] = {"gather": _gather, "ring": _ring}
