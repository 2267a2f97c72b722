"""Expert parallelism: the experts of every layer are spread over ranks, and tokens travel to them.

    tokens, choices -> slots sorted by expert -> counts exchanged -> rows to the ranks of their experts
                    -> each rank: its experts on all rows that came -> rows back -> weighted sum per token

A slot is (token, choice). Every rank holds whole experts, in order: of E experts over N ranks the first has ceil(E / N),
and so on. No token is dropped and there is no capacity: a rank gets as many rows as chose its experts, none or all.
The gradient of an expert is made where it lies, from the tokens of all these ranks that chose it, divided by their number:
a mean over ranks, as `shard_model` takes it of all other gradients.

Source: GShard, arXiv:2006.16668; without its capacity, as MegaBlocks, arXiv:2211.15841.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, Literal

import torch
import torch.distributed as dist
from jaxtyping import Float, Int
from torch import Tensor, nn

from vlkit.errors import ConfigError
from vlkit.layers.moe import Experts, Router
from vlkit.optim.parts import is_dtensor

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh


def parallel_experts(model: nn.Module, axis: DeviceMesh) -> list[Experts]:
    """Spread the experts of every layer over the ranks of a mesh axis, in place.

    The stacks become DTensors, Shard(0). `shard_model` does this for a mesh of `make_mesh(expert_parallel=...)`.

    Args:
        model: The same weights on every rank, or on meta.
        axis: One axis of a mesh.

    Returns:
        The layers' experts; none for a dense model.

    Raises:
        ConfigError: A rank would be without experts.
    """
    from torch.distributed.tensor import DTensor, Shard  # here, because a run on one process need not wait for it

    found = [module for module in model.modules() if isinstance(module, Experts)]
    for experts in found:
        exchange = RankExchange(axis, experts.num_experts)
        for name, stack in list(experts.named_parameters()):
            local = stack.detach().split(exchange.num_held)[axis.get_local_rank()].clone()
            spread = DTensor.from_local(
                local, axis, [Shard(0)], run_check=False, shape=stack.shape, stride=stack.stride()
            )
            setattr(experts, name, nn.Parameter(spread, requires_grad=stack.requires_grad))
        experts.exchange = exchange
    return found


class RankExchange:
    """Runs the experts of one layer over the ranks of a mesh axis. See the top of this file.

    Args:
        axis: One axis of a mesh.
        num_experts: Experts of the layer.

    Attributes:
        num_held: Experts of each rank.

    Raises:
        ConfigError: A rank would be without experts.
    """

    def __init__(self, axis: DeviceMesh, num_experts: int) -> None:
        self.group, ranks = axis.get_group(), axis.size()
        most = -(-num_experts // ranks)
        self.num_held = [max(0, min(most, num_experts - rank * most)) for rank in range(ranks)]
        if not all(self.num_held):
            raise ConfigError(
                f"{num_experts} experts over {ranks} ranks, {most} each: the last would have none; spread them over "
                f"{-(-num_experts // most)} ranks"
            )

    def __call__(
        self,
        held: Experts,
        x: Float[Tensor, "tokens dim"],
        experts: Int[Tensor, "tokens k"],
        weights: Float[Tensor, "tokens k"],
    ) -> Float[Tensor, "tokens dim"]:
        chosen, num_experts = experts.flatten(), sum(self.num_held)
        order = chosen.sort(stable=True).indices  # [slots], by expert
        token = order // experts.shape[1]
        load = torch.bincount(chosen, minlength=num_experts)
        sent = [int(part.sum()) for part in load.cpu().split(self.num_held)]  # rows for each rank
        came = self._counts(load)  # [ranks, held experts]
        rows = _Travel.apply(x.index_select(0, token), sent, came.sum(1).tolist(), self.group)
        # From each rank the rows of my first expert, those of the second, ...
        local = torch.arange(came.shape[1]).repeat(came.shape[0]).repeat_interleave(came.flatten()).to(x.device)
        stacks = (self._mine(stack) for stack in (held.gate, held.up, held.down))
        ones = weights.new_ones(len(local), 1)
        y = held.weighted_sum(rows, local[:, None], ones, *stacks)
        y = _Travel.apply(y, came.sum(1).tolist(), sent, self.group)
        weight = weights.flatten().index_select(0, order)
        out = weights.new_zeros(x.shape).index_add(0, token, y * weight[:, None])
        return out.to(x.dtype)

    def _mine(self, stack: Tensor) -> Tensor:
        local: Tensor = stack.to_local() if is_dtensor(stack) else stack
        if local.requires_grad and torch.is_grad_enabled():
            local.register_hook(lambda grad: grad / len(self.num_held))
        return local

    def _counts(self, load: Int[Tensor, " experts"]) -> Int[Tensor, "ranks held"]:
        """How many rows each rank sends for each expert of this one, on the host."""
        ranks, mine = len(self.num_held), self.num_held[dist.get_rank(self.group)]
        found = load.new_empty(ranks * mine)
        dist.all_to_all_single(found, load, [mine] * ranks, self.num_held, group=self.group)
        return found.cpu().view(ranks, mine)


class _Travel(torch.autograd.Function):
    """Rows to other ranks; their gradients take the way back."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, sent: list[int], came: list[int], group: dist.ProcessGroup) -> Tensor:
        ctx.way = came, sent, group
        found = rows.new_empty(sum(came), rows.shape[1])
        dist.all_to_all_single(found, rows.contiguous(), came, sent, group=group)
        return found

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        return _Travel.apply(*grads, *ctx.way), None, None, None


@torch.no_grad()
def balance_experts(
    model: nn.Module,
    load: Int[Tensor, "layers experts"],
    rate: float,
    *,
    rule: Literal["centred", "sign"] = "centred",
    group: dist.ProcessGroup | None = None,
) -> Int[Tensor, "layers experts"]:
    """Once per step: experts with fewer tokens than the mean become easier to choose, the others harder.

    With e the mean count of a layer minus an expert's, over all packs and ranks of the step, its bias changes by

        "sign"      rate * sign(e_i)                          DeepSeek-V3
        "centred"   rate * (sign(e_i) - mean_j sign(e_j))     Moonlight; the mean of a layer's biases stays where it is

    Adding one number to all biases chooses no other expert, so both choose alike; the first lets the biases drift together.

    Args:
        model: Its routers have a selection bias.
        load: `Output.expert_load`, summed over the step's forwards of this rank.
        rate: By how much, such as 1e-3; 0 changes nothing.
        rule: Which of the two.
        group: The ranks of the step; None is all.

    Returns:
        The tokens that each expert got on all ranks.

    Raises:
        ConfigError: Counts for another number of layers than have a bias, or another rule.

    Source: arXiv:2408.15664, algorithm 1; with the mean taken out, Moonlight, arXiv:2502.16982.
    """
    if rule not in ("centred", "sign"):
        raise ConfigError(f"balance_experts: rule {rule!r} is not one of centred, sign")
    total = load.clone()
    if dist.is_initialized():
        dist.all_reduce(total, group=group)
    biases = [m.bias for m in _routers(model) if m.bias is not None]
    if len(biases) != len(total):
        raise ConfigError(f"load counts {len(total)} layers, but {len(biases)} routers of the model have a bias")
    for bias, counts in zip(biases, total.to(torch.float32), strict=True):
        lacking = (counts.mean() - counts).sign()
        bias += rate * (lacking - lacking.mean() if rule == "centred" else lacking).to(bias.device)
    return total


def _routers(model: nn.Module) -> Iterable[Router]:
    return (module for module in model.modules() if isinstance(module, Router))
