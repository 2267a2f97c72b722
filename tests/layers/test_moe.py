"""Routers, experts and their backward, against code that does one token and one expert after another."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from vlkit.errors import ConfigError
from vlkit.layers.mlp import GatedMLP
from vlkit.layers.moe import ROW_BLOCK, Experts, MoE, Router, Routing

SIZES = [(13, 7, 3, 10, 6), (1, 5, 2, 8, 12), (4, 9, 1, 5, 3), (40, 2, 2, 6, 7)]  # tokens, experts, k, dim, mlp_dim


def one_by_one(x: Tensor, experts: Tensor, weights: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
    rows = []
    for token, chosen, factors in zip(x, experts.tolist(), weights, strict=True):
        outs = [
            f * (down[e] @ (F.silu(gate[e] @ token) * (up[e] @ token))) for e, f in zip(chosen, factors, strict=True)
        ]
        rows.append(torch.stack(outs).sum(0))
    return torch.stack(rows)


def made(size: tuple[int, ...], dtype: torch.dtype = torch.float64, seed: int = 0) -> tuple[Experts, list[Tensor]]:
    tokens, num_experts, k, dim, mlp_dim = size
    generator = torch.Generator().manual_seed(seed)
    module = Experts(dim, mlp_dim, num_experts).to(dtype)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.5)
    x = torch.randn(tokens, dim, generator=generator, dtype=dtype)
    experts = torch.rand(tokens, num_experts, generator=generator).topk(k).indices
    weights = torch.rand(tokens, k, generator=generator, dtype=torch.promote_types(dtype, torch.float32))
    return module, [x, experts, weights]


def gradients(run: Callable[..., Tensor], module: Experts, x: Tensor, experts: Tensor, weights: Tensor) -> list[Tensor]:
    x, weights = x.clone().requires_grad_(), weights.clone().requires_grad_()
    out = run(x, experts, weights)
    direction = torch.linspace(-1, 2, out.numel(), dtype=out.dtype).view_as(out)
    wanted = [x, weights, *(p for p in module.parameters() if p.requires_grad)]
    return [out.detach(), *torch.autograd.grad((out * direction).sum(), wanted)]


@pytest.mark.parametrize("size", SIZES)
def test_experts_and_their_gradients_are_those_of_a_loop_over_tokens(size: tuple[int, ...]) -> None:
    module, inputs = made(size)
    reference = gradients(lambda *args: one_by_one(*args, module.gate, module.up, module.down), module, *inputs)
    for ours, theirs in zip(gradients(module, module, *inputs), reference, strict=True):
        assert torch.allclose(ours, theirs, rtol=1e-12, atol=1e-12)
    with torch.no_grad():
        assert torch.allclose(module(*inputs), reference[0], rtol=1e-12, atol=1e-12)


def test_frozen_experts_give_the_same_gradients_to_tokens_and_none_to_themselves() -> None:
    module, inputs = made(SIZES[0])
    _, d_x, d_weights, *_ = gradients(module, module, *inputs)
    module.requires_grad_(False)
    _, frozen_x, frozen_weights = gradients(module, module, *inputs)
    assert torch.equal(d_x, frozen_x)
    assert torch.equal(d_weights, frozen_weights)


def test_experts_without_tokens_have_zero_gradients() -> None:
    module, (x, experts, weights) = made((6, 5, 2, 8, 4))
    experts = torch.tensor([[0, 3]] * 6)
    stacks = gradients(module, module, x, experts, weights)[3:]
    for stack in stacks:
        assert [bool(stack[e].any()) for e in range(5)] == [True, False, False, True, False]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", [(41, 5, 2, 24, 40), (41, 5, 2, 64, 96)])
def test_a_token_gets_the_same_bits_whoever_else_chose_its_experts(dtype: torch.dtype, size: tuple[int, ...]) -> None:
    """Rows come in whole blocks, so a matrix product treats them alike whatever their number."""
    module, (x, experts, weights) = made(size, dtype)
    others = torch.rand(41, 5, generator=torch.Generator().manual_seed(9)).topk(2).indices
    kept = torch.arange(41) % 5 == 2
    with torch.no_grad():
        first = module(x, experts, weights)
        second = module(x, torch.where(kept[:, None], experts, others), weights)
    assert torch.equal(first[kept], second[kept])
    assert not torch.equal(first[~kept], second[~kept])


def test_bf16_is_as_exact_as_bf16_can_be() -> None:
    """Products round to bf16, the sum over experts does not: the error stays near one rounding."""
    module, (x, experts, weights) = made((50, 8, 6, 64, 32), torch.bfloat16)
    exact = copy.deepcopy(module).double()
    with torch.no_grad():
        want = exact(x.double(), experts, weights.double())
        error = (module(x, experts, weights).double() - want).abs().max() / want.abs().max()
    assert error < 2**-7  # largest seen 2^-8.0


def test_grouped_kernel_is_the_loop() -> None:
    """torch's grouped product also runs on the CPU, for rows of whole 16 bytes; CUDA would make the same calls."""
    module, inputs = made((29, 6, 2, 16, 24), torch.float32)
    loop = gradients(module, module, *inputs)
    module.kernel = "grouped"
    for ours, theirs in zip(gradients(module, module, *inputs), loop, strict=True):
        assert torch.allclose(ours, theirs, rtol=1e-5, atol=1e-5)


def test_compiled_experts_are_one_operator_and_counts_are_data() -> None:
    module, inputs = made(SIZES[0])
    eager = gradients(module, module, *inputs)
    torch._dynamo.reset()
    with torch._dynamo.config.patch(error_on_recompile=True):
        compiled = torch.compile(module, fullgraph=True, dynamic=True, backend="aot_eager")
        for ours, theirs in zip(gradients(compiled, module, *inputs), eager, strict=True):
            assert torch.equal(ours, theirs)
        for seed, tokens in ((1, 13), (2, 30), (3, 9)):  # another routing, and other lengths
            _, other = made((tokens, *SIZES[0][1:]), seed=seed)
            for ours, theirs in zip(
                gradients(compiled, module, *other), gradients(module, module, *other), strict=True
            ):
                assert torch.equal(ours, theirs)


def test_autocast_runs_experts_narrow_and_the_router_wide() -> None:
    module, (x, experts, weights) = made((9, 4, 2, 16, 24), torch.float32)
    router = Router(16, 4, top_k=2)
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        out, routing = module(x, experts, weights), router(x)
    with torch.no_grad():
        assert torch.equal(out, copy.deepcopy(module).bfloat16()(x.bfloat16(), experts, weights))
        assert torch.equal(routing.scores, router(x).scores)
    assert routing.weights.dtype == torch.float32


# The router.


def router_of(scores: list[list[float]], **options: object) -> tuple[Router, Tensor]:
    """A sigmoid router whose scores are these numbers, and tokens that make them."""
    table = torch.tensor(scores, dtype=torch.float64)
    router = Router(len(table), table.shape[1], scoring="sigmoid", **options).double()  # type: ignore[arg-type]
    with torch.no_grad():
        router.weight.copy_(torch.logit(table).T)
    return router, torch.eye(len(table), dtype=torch.float64)


def test_selection_bias_changes_the_choice_and_not_the_weights() -> None:
    router, x = router_of([[0.9, 0.8, 0.5, 0.1]], top_k=2, selection_bias=True, scale=3.0)
    assert router(x).experts.tolist() == [[0, 1]]
    router.bias[3] = 1.0
    routing = router(x)
    assert routing.experts.tolist() == [[3, 0]]
    assert torch.allclose(routing.weights, torch.tensor([[0.3, 2.7]], dtype=torch.float64))
    assert torch.allclose(routing.scores, torch.tensor([[0.9, 0.8, 0.5, 0.1]], dtype=torch.float64))


def test_groups_are_scored_by_their_two_best() -> None:
    # groups (0.9, 0.1, 0.1), (0.6, 0.5, 0.0), (0.7, 0.2, 0.2): sums of two are 1.0, 1.1, 0.9
    scores = [[0.9, 0.1, 0.1, 0.6, 0.5, 0.01, 0.7, 0.2, 0.2]]
    router, x = router_of(scores, top_k=3, num_groups=3, top_groups=2)
    assert sorted(router(x).experts[0].tolist()) == [0, 3, 4]
    free, x = router_of(scores, top_k=3)
    assert sorted(free(x).experts[0].tolist()) == [0, 3, 6]


def test_groups_that_are_closed_are_never_used_even_with_negative_scores() -> None:
    router, x = router_of([[0.5, 0.4, 0.3, 0.2]], top_k=2, num_groups=2, top_groups=1, selection_bias=True)
    router.bias.fill_(-2.0)
    assert sorted(router(x).experts[0].tolist()) == [0, 1]


def test_weights_are_normalized_over_the_chosen_only() -> None:
    x = torch.randn(9, 6, generator=torch.Generator().manual_seed(0))
    router = Router(6, 5, top_k=2)
    raw = copy.deepcopy(router)
    raw.normalize = False
    routing, plain = router(x), raw(x)
    assert torch.allclose(plain.scores.sum(-1), torch.ones(9))
    assert torch.equal(plain.weights, plain.scores.gather(-1, plain.experts))
    assert torch.allclose(routing.weights, plain.weights / plain.weights.sum(-1, keepdim=True))


def test_router_separates_scores_that_bf16_cannot() -> None:
    """Two experts that differ by 1e-4: in bf16 both scores would round to one value."""
    router = Router(2, 2, top_k=1, scoring="sigmoid")
    with torch.no_grad():
        router.weight.copy_(torch.tensor([[1.0, 0.0], [1.0, 2**-12]]))
    x = torch.tensor([[0.5, 0.5]], dtype=torch.bfloat16)
    assert router.bfloat16()(x).experts.tolist() == [[1]]


def test_selection_bias_stays_fp32_with_its_values() -> None:
    router = Router(4, 3, top_k=1, selection_bias=True)
    router.bias.copy_(torch.tensor([1.0001, -1e-4, 3.0]))
    kept = router.bias.clone()
    router.to(torch.bfloat16)
    assert router.weight.dtype == torch.bfloat16
    assert router.bias.dtype == torch.float32
    assert torch.equal(router.bias, kept)
    assert router.double().bias.dtype == torch.float64
    with torch.device("meta"):
        empty = Router(4, 3, top_k=1, selection_bias=True)
    empty = empty.to(torch.bfloat16).to_empty(device="cpu")
    empty.reset_parameters()
    assert empty.bias.dtype == torch.float32
    assert not empty.bias.any()
    assert "bias" in router.state_dict()
    assert [name for name, _ in router.named_parameters()] == ["weight"]


def test_load_counts_every_choice() -> None:
    routing = Routing(torch.tensor([[0, 2], [2, 3], [2, 0]]), torch.ones(3, 2), torch.zeros(3, 5))
    assert routing.load(5).tolist() == [2, 0, 3, 1, 0]


def test_moe_adds_the_shared_mlp_without_scaling_it() -> None:
    router, shared = Router(8, 5, top_k=2, scale=7.0), GatedMLP(8, 12)
    moe = MoE(router, Experts(8, 6, 5), shared)
    x = torch.randn(11, 8, generator=torch.Generator().manual_seed(0))
    out, routing = moe(x)
    routed = moe.experts(x, routing.experts, routing.weights)
    assert torch.equal(out, routed + shared(x))
    assert moe.inactive_parameters() == 3 * (3 * 8 * 6)


def test_gradients_reach_the_router_through_the_weights() -> None:
    moe = MoE(Router(8, 5, top_k=2, scoring="sigmoid", selection_bias=True), Experts(8, 6, 5))
    with torch.no_grad():
        for parameter in moe.parameters():
            parameter.normal_(generator=torch.Generator().manual_seed(parameter.numel()))
    moe(torch.randn(30, 8, generator=torch.Generator().manual_seed(1)))[0].square().sum().backward()
    assert all(bool(parameter.grad.any()) for parameter in moe.parameters())


@pytest.mark.parametrize(
    ("options", "word"),
    [
        ({"top_k": 7}, "top_k=7"),
        ({"top_k": 2, "num_groups": 4}, "4 equal groups"),
        ({"top_k": 2, "num_groups": 3, "top_groups": 4}, "top_groups"),
        ({"top_k": 3, "num_groups": 3, "top_groups": 1}, "top_k=3"),
        ({"top_k": 1, "num_groups": 6, "top_groups": 2}, "one expert each"),
        ({"top_k": 1, "scoring": "tanh"}, "tanh"),
    ],
)
def test_numbers_that_do_not_fit_are_refused(options: dict[str, object], word: str) -> None:
    with pytest.raises(ConfigError, match=word):
        Router(8, 6, **options)  # type: ignore[arg-type]


def test_row_block_is_what_the_matrix_product_needs_here() -> None:
    """If this fails on another machine, the bits of one token depend on the others there: raise ROW_BLOCK."""
    generator = torch.Generator().manual_seed(0)
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        for inner, outer in ((1024, 704), (64, 96), (32, 56), (24, 40)):
            x = torch.randn(256, inner, generator=generator).to(dtype)
            matrix = torch.randn(outer, inner, generator=generator).to(dtype)
            whole = x @ matrix.T
            for rows in (ROW_BLOCK, 3 * ROW_BLOCK, 17 * ROW_BLOCK):
                assert torch.equal(x[:rows] @ matrix.T, whole[:rows])
                assert torch.equal(x[5 : 5 + rows] @ matrix.T, whole[5 : 5 + rows])
