"""Mixture of experts: a router chooses a few gated MLPs per token, whose outputs are added with the router's weights.

    tokens [tokens, dim] -> Router -> Routing(experts [tokens, k], weights [tokens, k],
                                       scores and logits [tokens, num_experts])
           -> sorted by expert -> each expert once, on its rows: down(silu(gate(x)) * up(x)) -> weighted sum per token
           (+ a shared MLP that every token uses)

The experts of a layer are three stacks [experts, out, in]. On the CPU an expert is visited once per step, as a slice
of the stacks: no weight is copied, and the backward writes every expert's gradient straight into its slice of one
gradient stack.

An expert's rows are filled up to whole blocks of `ROW_BLOCK`, because a matrix product computes full blocks alike and
the rest by another kernel, which rounds differently. So the bits of one token do not depend on how many others chose the
same expert. This was measured, not promised by the library of products: see the last test of tests/layers/test_moe.py.
It does not hold in fp64 for odd widths (37 and 29, say), nor for one token alone, which has a path of its own.
"""

from __future__ import annotations

from typing import Any, Literal, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from vlkit.errors import ConfigError
from vlkit.layers.autocast import autocast_dtype, without_autocast

CHUNK_BYTES = 2**20  # experts whose rows fit a core's cache together share the steps between their products
ROW_BLOCK = 8  # rows; a multiple of the row tile of the CPU kernels measured (MKL: 4 in fp64, 4 in fp32 below 12 rows)


class Routing(NamedTuple):
    """Which experts each token uses.

    Attributes:
        experts: Chosen experts, int64 [tokens, k].
        weights: What the outputs are multiplied with, fp32 (fp64 for fp64 tokens) [tokens, k].
        scores: Scores of all experts, without the selection bias, [tokens, num_experts]: what balance losses need.
        logits: What the scores were made of, [tokens, num_experts]: what the z-loss needs.
    """

    experts: Tensor
    weights: Tensor
    scores: Tensor
    logits: Tensor | None = None

    def load(self, num_experts: int) -> Int[Tensor, " num_experts"]:
        """How many tokens chose each expert."""
        chosen = self.experts.flatten()
        return chosen.new_zeros(num_experts).scatter_add_(0, chosen, torch.ones_like(chosen))


class Router(nn.Module):
    """Scores every expert for every token and picks the best few.

    All of it is computed in fp32 (fp64 for fp64 tokens), also under autocast: in bf16, scores in [0.5, 1) closer than
    1/256 can round to the same value, and top-k does not define which of two equal scores wins.

    Args:
        dim: Width of a token.
        num_experts: Experts to choose from.
        top_k: Experts per token.
        scoring: "softmax" over all experts (Qwen3), or "sigmoid" of each (DeepSeek-V3).
        selection_bias: Keep a bias per expert that is added for the choice only, never to the weights. It is a buffer:
            load balancing sets it, training does not; and it stays fp32 when the module is cast to a narrower type.
        num_groups: Experts are cut into so many equal groups; a group's score is the sum of its two best.
        top_groups: Only experts of so many best groups can be chosen.
        normalize: Divide the weights of a token by their sum.
        scale: Multiply the weights, after normalising.

    Raises:
        ConfigError: Numbers that do not fit each other.

    Source: DeepSeek-V3, arXiv:2412.19437, section 2.1.2 (sigmoid, bias, groups); Qwen3, arXiv:2505.09388 (softmax).
    """

    bias: Tensor | None

    def __init__(
        self,
        dim: int,
        num_experts: int,
        *,
        top_k: int,
        scoring: Literal["softmax", "sigmoid"] = "softmax",
        selection_bias: bool = False,
        num_groups: int = 1,
        top_groups: int = 1,
        normalize: bool = True,
        scale: float = 1.0,
    ) -> None:
        super().__init__()
        check_routing(num_experts, top_k, num_groups, top_groups)
        if scoring not in ("softmax", "sigmoid"):
            raise ConfigError(f"Router: scoring {scoring!r} is not one of softmax, sigmoid")
        self.top_k = top_k
        self.scoring = scoring
        self.num_groups = num_groups
        self.top_groups = top_groups
        self.normalize = normalize
        self.scale = scale
        self.weight = nn.Parameter(torch.empty(num_experts, dim))
        self.register_buffer("bias", torch.empty(num_experts, dtype=torch.float32) if selection_bias else None)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.normal_(self.weight, std=0.02)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def _apply(self, fn: Any, recurse: bool = True) -> Router:
        kept = self.bias
        super()._apply(fn, recurse)
        if kept is not None and self.bias is not None and self.bias.element_size() < 4:
            # The cast rounded it: take the values from before. On meta there are none, and only the type matters.
            self.bias = torch.empty_like(self.bias, dtype=kept.dtype) if kept.is_meta else kept.to(self.bias.device)
        return self

    def forward(self, x: Float[Tensor, "tokens dim"]) -> Routing:
        dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
        with without_autocast(x):
            logits = F.linear(x.to(dtype), self.weight.to(dtype))
            scores = logits.softmax(-1) if self.scoring == "softmax" else logits.sigmoid()
            with torch.no_grad():
                choice = scores if self.bias is None else scores + self.bias
                if self.top_groups < self.num_groups:
                    choice = self._within_best_groups(choice)
                experts = choice.topk(self.top_k, dim=-1).indices
            weights = scores.gather(-1, experts)
            if self.normalize:
                weights = weights / (
                    weights.sum(-1, keepdim=True) + 1e-20
                )  # 1e-20: all chosen sigmoids may underflow to 0
            return Routing(experts, weights * self.scale if self.scale != 1 else weights, scores, logits)

    def _within_best_groups(self, choice: Tensor) -> Tensor:
        groups = choice.unflatten(-1, (self.num_groups, -1))  # [tokens, groups, experts of a group]
        value = groups.topk(2, dim=-1).values.sum(-1)
        best = value.topk(self.top_groups, dim=-1).indices
        closed = torch.ones_like(value, dtype=torch.bool).scatter_(-1, best, False)
        return groups.masked_fill(closed[..., None], float("-inf")).flatten(-2)

    def extra_repr(self) -> str:
        num_experts, dim = self.weight.shape
        return f"dim={dim}, num_experts={num_experts}, top_k={self.top_k}, scoring={self.scoring}"


def check_routing(num_experts: int, top_k: int, num_groups: int = 1, top_groups: int = 1) -> None:
    """Raise ConfigError where the numbers of a router do not fit each other."""
    if num_experts % num_groups or not 1 <= top_groups <= num_groups:
        raise ConfigError(
            f"{num_experts} experts cannot be cut into {num_groups} equal groups of which {top_groups} are kept; "
            "num_groups must divide num_experts and top_groups must lie in 1..num_groups"
        )
    if top_groups < num_groups and num_experts // num_groups < 2:
        raise ConfigError(
            f"{num_groups} groups of one expert each: a group is scored by its two best, so it needs two experts"
        )
    selectable = top_groups * (num_experts // num_groups)
    if not 1 <= top_k <= selectable:
        raise ConfigError(f"top_k={top_k} does not lie in 1..{selectable}, the experts that can be chosen")


class Experts(nn.Module):
    """Many gated MLPs, down(silu(gate(x)) * up(x)) without biases, as three stacks [experts, out, in].

    Kernels: "loop" visits each expert once (any device; on a GPU it waits for the counts once per layer); "grouped" is
    torch's grouped matrix product, for which counts are data; "auto" takes "grouped" on CUDA where it can run, "loop"
    elsewhere. The grouped kernel was compared with the loop on the CPU only.

    Attributes:
        exchange: Sends tokens to the ranks that hold their experts, and brings the outputs back; None where all experts are
            here. See `vlkit.training.experts`.
    """

    exchange: Exchange | None = None

    def __init__(
        self, dim: int, mlp_dim: int, num_experts: int, *, kernel: Literal["auto", "loop", "grouped"] = "auto"
    ) -> None:
        super().__init__()
        if kernel not in ("auto", "loop", "grouped"):
            raise ConfigError(f"Experts: kernel {kernel!r} is not one of auto, loop, grouped")
        self.kernel = kernel
        self.gate = nn.Parameter(torch.empty(num_experts, mlp_dim, dim))
        self.up = nn.Parameter(torch.empty(num_experts, mlp_dim, dim))
        self.down = nn.Parameter(torch.empty(num_experts, dim, mlp_dim))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        for stack in (self.gate, self.up, self.down):
            nn.init.normal_(stack, std=0.02)

    @property
    def num_experts(self) -> int:
        return self.gate.shape[0]

    def forward(
        self, x: Float[Tensor, "tokens dim"], experts: Int[Tensor, "tokens k"], weights: Float[Tensor, "tokens k"]
    ) -> Float[Tensor, "tokens dim"]:
        """The weighted sum of the chosen experts' outputs, accumulated in fp32 (fp64 for fp64 tokens).

        Args:
            experts: Chosen experts of each token; all of one token differ.
            weights: Factors of their outputs.
        """
        if self.exchange is not None:
            return self.exchange(self, x, experts, weights)
        return self.weighted_sum(x, experts, weights, self.gate, self.up, self.down)

    def weighted_sum(
        self,
        x: Float[Tensor, "tokens dim"],
        experts: Int[Tensor, "tokens k"],
        weights: Float[Tensor, "tokens k"],
        gate: Float[Tensor, "experts mlp_dim dim"],
        up: Float[Tensor, "experts mlp_dim dim"],
        down: Float[Tensor, "experts dim mlp_dim"],
    ) -> Float[Tensor, "tokens dim"]:
        """`forward` with these stacks, such as a few of the experts; `experts` counts within them."""
        dtype = autocast_dtype(x)
        if dtype is not None:
            x, gate, up, down = x.to(dtype), gate.to(dtype), up.to(dtype), down.to(dtype)
        if self.kernel == "grouped" or (self.kernel == "auto" and _grouped_can_run(x, gate)):
            return _grouped_experts(x, experts, weights, gate, up, down)
        keep = torch.is_grad_enabled() and any(t.requires_grad for t in (x, weights, gate, up, down))
        if torch.compiler.is_compiling() or x.is_meta:
            return torch.ops.vlkit.experts(x, experts, weights, gate, up, down, keep)[0]
        if keep:  # the same functions without the dispatcher, which costs more than a small expert does
            return _ExpertsFunction.apply(x, experts, weights, gate, up, down)
        with torch.no_grad():
            return _experts_forward(x, experts, weights, gate, up, down, False)[0]

    def extra_repr(self) -> str:
        num_experts, mlp_dim, dim = self.gate.shape
        return f"dim={dim}, mlp_dim={mlp_dim}, num_experts={num_experts}"


class Exchange(Protocol):
    """Experts that lie on several ranks: the same sum, for the tokens of this rank."""

    def __call__(
        self,
        held: Experts,
        x: Float[Tensor, "tokens dim"],
        experts: Int[Tensor, "tokens k"],
        weights: Float[Tensor, "tokens k"],
    ) -> Float[Tensor, "tokens dim"]: ...


class MoE(nn.Module):
    """Router, experts, and optionally one MLP that every token uses, whose output is added without any weight.

    Source: DeepSeekMoE, arXiv:2401.06066.
    """

    def __init__(self, router: Router, experts: Experts, shared: nn.Module | None = None) -> None:
        super().__init__()
        self.router = router
        self.experts = experts
        self.shared = shared

    def forward(self, x: Float[Tensor, "tokens dim"]) -> tuple[Float[Tensor, "tokens dim"], Routing]:
        routing = self.router(x)
        out = self.experts(x, routing.experts, routing.weights)
        return (out if self.shared is None else out + self.shared(x)), routing

    def inactive_parameters(self) -> int:
        """Parameters that one token does not use: those of the experts that were not chosen."""
        num_experts = self.experts.num_experts
        per_expert = sum(p.numel() for p in self.experts.parameters()) // num_experts
        return (num_experts - self.router.top_k) * per_expert


# What follows computes the experts. A slot is (token, choice); a row is a place in the order by expert. H is mlp_dim.


def _experts_forward(
    x: Tensor, experts: Tensor, weights: Tensor, gate: Tensor, up: Tensor, down: Tensor, keep: bool
) -> tuple[Tensor, Tensor]:
    """The output [tokens, dim] and, if keep, gate and up before the activation as [2, capacity, H] for the backward."""
    (num_experts, mlp_dim, dim), num_tokens = gate.shape, x.shape[0]
    kept = x.new_empty((2, _capacity(experts.numel(), num_experts) if keep else 0, mlp_dim))
    if num_tokens == 1 and not keep and x.device.type == "cpu":
        return _one_token(x, experts, weights, gate, up, down), kept

    plan = _plan(experts, weights, gate)
    out = x.new_zeros((num_tokens, dim), dtype=weights.dtype)
    x_buffer, y_buffer = x.new_empty((2, plan.longest, dim)).unbind()
    g_buffer, u_buffer = kept if keep else x.new_empty((2, plan.longest, mlp_dim)).unbind()
    gates, ups, downs = (stack.mT.unbind() for stack in (gate, up, down))
    for start, end, members, sizes in plan.chunks:
        n, at, token = end - start, start if keep else 0, plan.token[start:end]
        x_n, y, g, u = x_buffer[:n], y_buffer[:n], g_buffer[at : at + n], u_buffer[at : at + n]
        torch.index_select(x, 0, token, out=x_n)
        for e, x_e, g_e, u_e in zip(members, x_n.split(sizes), g.split(sizes), u.split(sizes), strict=True):
            torch.mm(x_e, gates[e], out=g_e)
            torch.mm(x_e, ups[e], out=u_e)
        a = F.silu(g).mul_(u)
        for e, a_e, y_e in zip(members, a.split(sizes), y.split(sizes), strict=True):
            torch.mm(a_e, downs[e], out=y_e)
        weight = plan.weight[start:end]
        out.index_add_(0, token, y.mul_(weight) if y.dtype == weight.dtype else y * weight)
    return out.to(x.dtype), kept


def _experts_backward(
    grad: Tensor,
    kept: Tensor,
    x: Tensor,
    experts: Tensor,
    weights: Tensor,
    gate: Tensor,
    up: Tensor,
    down: Tensor,
    train: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, weights, gate, up and down; those of the stacks are empty unless train.

    With y = down(a), a = silu(g) * u and out = w * y: the gradient of w is <grad, y> = <grad down, a>, so y need not
    be kept.
    """
    _, mlp_dim, dim = gate.shape
    plan = _plan(experts, weights, gate)
    grad_x = x.new_zeros(x.shape, dtype=weights.dtype)
    grad_rows = plan.weight.new_empty(plan.weight.shape[0])
    grad_gate, grad_up, grad_down = (stack.new_empty(stack.shape if train else 0) for stack in (gate, up, down))
    x_buffer, y_buffer = x.new_empty((2, plan.longest, dim)).unbind()
    a_buffer = x.new_empty((plan.longest, mlp_dim))
    gates, ups, downs = gate.unbind(), up.unbind(), down.unbind()
    for start, end, members, sizes in plan.chunks:
        n, token = end - start, plan.token[start:end]
        x_n, d_y, d_a, g, u = x_buffer[:n], y_buffer[:n], a_buffer[:n], kept[0, start:end], kept[1, start:end]
        torch.index_select(x, 0, token, out=x_n)
        torch.index_select(grad, 0, token, out=d_y)
        for e, d_y_e, d_a_e in zip(members, d_y.split(sizes), d_a.split(sizes), strict=True):
            torch.mm(d_y_e, downs[e], out=d_a_e)
        s = F.silu(g)
        a = s * u
        weight = plan.weight[start:end].to(x.dtype)
        torch.sum(d_a * a, -1, dtype=weights.dtype, out=grad_rows[start:end])
        d_a.mul_(weight)
        d_g = torch.ops.aten.silu_backward(d_a * u, g)
        d_u = d_a.mul_(s)
        if train:
            columns = (t.t().split(sizes, 1) for t in (d_g, d_u, d_y))
            rows = (t.split(sizes) for t in (x_n, a.mul_(weight)))
            for e, d_g_e, d_u_e, d_y_e, x_e, a_e in zip(members, *columns, *rows, strict=True):
                torch.mm(d_g_e, x_e, out=grad_gate[e])
                torch.mm(d_u_e, x_e, out=grad_up[e])
                torch.mm(d_y_e, a_e, out=grad_down[e])
        d_x = x_n  # its values are not needed any more
        for e, d_g_e, d_u_e, d_x_e in zip(members, d_g.split(sizes), d_u.split(sizes), d_x.split(sizes), strict=True):
            torch.mm(d_g_e, gates[e], out=d_x_e).addmm_(d_u_e, ups[e])
        grad_x.index_add_(0, token, d_x if d_x.dtype == grad_x.dtype else d_x.to(grad_x.dtype))
    for expert in plan.unused if train else ():
        for stack in (grad_gate, grad_up, grad_down):
            stack[expert].zero_()
    grad_weights = torch.empty_like(grad_rows[: plan.order.shape[0]])
    grad_weights.index_copy_(0, plan.order, grad_rows.index_select(0, plan.place))
    return grad_x.to(x.dtype), grad_weights.view_as(weights), grad_gate, grad_up, grad_down


class _Plan(NamedTuple):
    """Slots sorted by expert, every expert's rows filled up to whole blocks.

    What fills up is the expert's last slot once more, with weight 0: nothing of one token, not even a NaN, can reach
    another.
    """

    order: Tensor  # [slots] slots sorted by expert
    place: Tensor  # [slots] row of each of them
    token: Tensor  # [rows] token of each row
    weight: Tensor  # [rows, 1]
    chunks: list[tuple[int, int, list[int], list[int]]]  # first row, end, experts, rows of each
    unused: list[int]  # experts without a token
    longest: int  # most rows of a chunk


def _plan(experts: Tensor, weights: Tensor, gate: Tensor) -> _Plan:
    """Sort slots by expert, and put experts together until the rows of a chunk fill CHUNK_BYTES."""
    num_experts, chosen = gate.shape[0], experts.flatten()
    row_bytes = max(gate.shape[1:]) * gate.element_size()
    by_expert, order = chosen.sort(stable=True)
    counts = torch.bincount(chosen, minlength=num_experts)
    counts_list = counts.tolist()
    padded = [-(-count // ROW_BLOCK) * ROW_BLOCK for count in counts_list]
    chunks: list[tuple[int, int, list[int], list[int]]] = []
    start = end = 0
    members: list[int] = []
    for expert, rows in enumerate(padded):
        if members and (end + rows - start) * row_bytes > CHUNK_BYTES:
            chunks.append((start, end, members, [padded[e] for e in members]))
            start, members = end, []
        if rows:
            members.append(expert)
            end += rows
    if members:
        chunks.append((start, end, members, [padded[e] for e in members]))

    rows_of = torch.tensor(padded, device=chosen.device)
    first = counts.cumsum(0) - counts  # [experts] first sorted slot of each
    shift = rows_of.cumsum(0) - rows_of - first  # rows that the experts before it have been filled up with
    number = torch.arange(max(end, order.shape[0]), device=chosen.device)
    place = shift.index_select(0, by_expert).add_(number[: order.shape[0]])
    of_row = torch.repeat_interleave(rows_of, output_size=end)  # [rows] expert
    slot = order.index_select(0, torch.minimum(number[:end] - shift[of_row], (first + counts - 1)[of_row]))
    weight = weights.new_zeros(end).index_copy_(0, place, weights.flatten().index_select(0, order))
    return _Plan(
        order,
        place,
        slot // experts.shape[1],
        weight.unsqueeze(1),
        chunks,
        [expert for expert, count in enumerate(counts_list) if not count],
        max((end - start for start, end, *_ in chunks), default=0),
    )


def _capacity(num_slots: int, num_experts: int) -> int:
    """Rows that are enough for any routing, known from the shapes alone."""
    return num_slots + (ROW_BLOCK - 1) * num_experts


def _one_token(x: Tensor, experts: Tensor, weights: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
    """Decoding: the weights of the chosen experts are read once, and nothing else counts."""
    out = torch.zeros_like(x, dtype=weights.dtype)
    for expert, weight in zip(experts[0].tolist(), weights[0].tolist(), strict=True):
        a = F.silu(_matrix_vector(gate[expert], x)).mul_(_matrix_vector(up[expert], x))
        out.add_(_matrix_vector(down[expert], a), alpha=weight)
    return out.to(x.dtype)


def _matrix_vector(matrix: Tensor, row: Tensor) -> Tensor:
    """matrix @ row as [1, out]. In fp32 MKL reads a matrix with one thread for a vector, but with all for two columns."""
    if row.dtype == torch.bfloat16:
        return F.linear(row, matrix)
    return torch.mm(matrix, row.expand(2, -1).contiguous().t())[:, 0].unsqueeze(0)


class _ExpertsFunction(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, experts: Tensor, weights: Tensor, gate: Tensor, up: Tensor, down: Tensor
    ) -> Tensor:
        out, kept = _experts_forward(x, experts, weights, gate, up, down, True)
        ctx.save_for_backward(kept, x, experts, weights, gate, up, down)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        train = any(ctx.needs_input_grad[3:])
        kept, x, experts, weights, gate, up, down = ctx.saved_tensors
        d_x, d_weights, *stacks = _experts_backward(grad, kept, x, experts, weights, gate, up, down, train)
        return d_x, None, d_weights, *(stacks if train else (None, None, None))


# torch.compile sees the two functions as one operator each, so the counts inside are data and no guards.


@torch.library.custom_op("vlkit::experts", mutates_args=())
def _experts_op(
    x: Tensor, experts: Tensor, weights: Tensor, gate: Tensor, up: Tensor, down: Tensor, keep: bool
) -> tuple[Tensor, Tensor]:
    return _experts_forward(x, experts, weights, gate, up, down, keep)


@_experts_op.register_fake
def _(
    x: Tensor, experts: Tensor, weights: Tensor, gate: Tensor, up: Tensor, down: Tensor, keep: bool
) -> tuple[Tensor, Tensor]:
    rows = _capacity(experts.shape[0] * experts.shape[1], gate.shape[0]) if keep else 0
    return x.new_empty(x.shape), x.new_empty((2, rows, gate.shape[1]))


@torch.library.custom_op("vlkit::experts_backward", mutates_args=())
def _experts_backward_op(
    grad: Tensor,
    kept: Tensor,
    x: Tensor,
    experts: Tensor,
    weights: Tensor,
    gate: Tensor,
    up: Tensor,
    down: Tensor,
    train: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    return _experts_backward(grad, kept, x, experts, weights, gate, up, down, train)


@_experts_backward_op.register_fake
def _(
    grad: Tensor,
    kept: Tensor,
    x: Tensor,
    experts: Tensor,
    weights: Tensor,
    gate: Tensor,
    up: Tensor,
    down: Tensor,
    train: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    gate, up, down = (s.new_empty(s.shape if train else 0) for s in (gate, up, down))
    return x.new_empty(x.shape), weights.new_empty(weights.shape), gate, up, down


def _save_for_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(output[1], *inputs[:6])
    ctx.mark_non_differentiable(output[1])


def _op_backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    train = any(ctx.needs_input_grad[3:6])
    d_x, d_weights, *stacks = torch.ops.vlkit.experts_backward(grad, *ctx.saved_tensors, train)
    return d_x, None, d_weights, *(stacks if train else (None, None, None)), None


_experts_op.register_autograd(_op_backward, setup_context=_save_for_backward)


def _grouped_can_run(x: Tensor, gate: Tensor) -> bool:
    """Whether torch's grouped matrix product takes these tensors: CUDA, SM80 or later, bf16, rows of whole 16 bytes."""
    if x.device.type != "cuda" or gate.dtype != torch.bfloat16 or not hasattr(F, "grouped_mm"):
        return False
    _, mlp_dim, dim = gate.shape
    return dim % 8 == 0 and mlp_dim % 8 == 0 and torch.cuda.get_device_capability(x.device) >= (8, 0)


def _grouped_experts(x: Tensor, experts: Tensor, weights: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
    """The same with three grouped matrix products. Counts stay on the device; autograd and torch.compile see it all."""
    num_experts, (num_tokens, top_k) = gate.shape[0], experts.shape
    chosen = experts.flatten()
    order = chosen.argsort(stable=True)
    counts = chosen.new_zeros(num_experts).scatter_add_(0, chosen, torch.ones_like(chosen))
    ends = counts.cumsum(0).to(torch.int32)
    rows = x[order // top_k]
    a = F.silu(F.grouped_mm(rows, gate.transpose(1, 2), offs=ends)) * F.grouped_mm(rows, up.transpose(1, 2), offs=ends)
    y = F.grouped_mm(a, down.transpose(1, 2), offs=ends)
    place = torch.empty_like(order).scatter_(0, order, torch.arange(order.shape[0], device=order.device))
    y = y[place].view(num_tokens, top_k, -1)
    return (y * weights.unsqueeze(-1)).sum(1).to(x.dtype)
