"""Logits as attention makes them, and weights after which they stay within the limit."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

import vlkit
from tests.ranks import run_ranks
from vlkit.errors import ConfigError, LayoutError, NonFiniteError
from vlkit.layers.gqa import GroupedQueryAttention
from vlkit.layers.mla import LatentAttention
from vlkit.layers.rope import Rotary, make_rotary, rotary_angles, rotary_frequencies
from vlkit.layers.self_attention import SelfAttention
from vlkit.optim import qk_clip, qk_clip_, record_max_logits, reduce_max_logits_
from vlkit.optim.qk_clip import max_logits_per_head
from vlkit.packing import Layout, Packed
from vlkit.testing import random_batch

LENGTHS = (5, 1, 9)
KINDS = ["latent", "grouped", "grouped with biases", "one key head", "tower"]


def attention_of(kind: str, dim: int = 24) -> Any:
    """With weights large enough for logits far apart between heads."""
    torch.manual_seed(0)
    module: nn.Module
    if kind == "latent":
        module = LatentAttention(dim, 3, kv_rank=10, nope_dim=6, rope_dim=4, value_dim=5)
    elif kind == "tower":
        module = SelfAttention(dim, 3)
    else:
        module = GroupedQueryAttention(dim, 6, 1 if kind == "one key head" else 3, 8, qkv_bias="biases" in kind)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            parameter.normal_(std=0.1 if name.startswith("out") else 0.6)
        query = module.q.weight.view(3, -1, dim)
        query.mul_(torch.tensor([0.1, 1.0, 3.0]).view(3, 1, 1))
    return module


def inputs(kind: str, lengths: tuple[int, ...] = LENGTHS, dim: int = 24) -> tuple[Tensor, Rotary, Layout]:
    layout = Layout(lengths)
    x = torch.randn(sum(lengths), dim, generator=torch.Generator().manual_seed(1))
    frequencies = rotary_frequencies(4 if kind == "latent" else 8, 100.0)
    positions = layout.positions("cpu").float()[:, None]
    return x, make_rotary(rotary_angles(positions, frequencies, (0,) * len(frequencies))), layout


def dense_logits(module: Any, x: Tensor, rotary: Rotary, layout: Layout) -> list[Tensor]:
    """[heads, queries, keys] of every item, with what a query does not see at -inf; in fp64."""
    q, k = (y.double() for y in module.queries_and_keys(x, rotary))
    k = k.repeat_interleave(q.shape[1] // k.shape[1], dim=1)
    found = []
    for q_item, k_item in zip(q.split(layout.lengths), k.split(layout.lengths), strict=True):
        scores = torch.einsum("qhd,khd->hqk", q_item, k_item) * q.shape[-1] ** -0.5
        if module.causal:
            scores = scores.masked_fill(torch.ones(scores.shape[1:]).triu(1).bool(), -torch.inf)
        found.append(scores)
    return found


def largest(module: Any, *given: Any) -> Tensor:
    with torch.no_grad():
        return torch.stack([scores.amax((1, 2)) for scores in dense_logits(module, *given)]).amax(0)


def recorded(module: nn.Module, *given: Any) -> Tensor:
    with record_max_logits(module) as found:
        module(*given)
    return found[""]


# Recording


@pytest.mark.parametrize("chunk", [1, 200, 1 << 24])
@pytest.mark.parametrize("kind", KINDS)
def test_the_largest_logit_is_that_of_the_dense_scores(kind: str, chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """In pieces of one row, of a few, and at once; masked pairs and pairs of different items do not count."""
    monkeypatch.setattr(qk_clip, "CHUNK_BYTES", chunk)
    module, given = attention_of(kind), inputs(kind)
    assert_close(recorded(module, *given).double(), largest(module, *given), rtol=1e-6, atol=1e-6)


def test_items_of_a_pack_do_not_meet() -> None:
    """The product across items would be by far the largest."""
    q = torch.zeros(4, 1, 2)
    q[:, 0, 0] = torch.tensor([1.0, 1.0, 100.0, 1.0])
    k = q.clone()
    k[2:, 0, 0] = torch.tensor([-1.0, 0.5])
    apart = max_logits_per_head(q, k, Layout((2, 2)), causal=False, scale=1.0)
    assert apart.item() == 50.0  # 100 * 0.5 within the second item; together it would be 100 * 1
    assert max_logits_per_head(q, k, Layout((2, 2)), causal=True, scale=1.0).item() == 1.0
    assert max_logits_per_head(q, k, Layout((4,)), causal=True, scale=1.0).item() == 100.0
    segments = Layout((2, 2)).segments("cpu")
    assert max_logits_per_head(q, k, segments, causal=False, scale=1.0).item() == 50.0


def test_a_pack_has_the_largest_logit_of_its_items() -> None:
    module, (x, rotary, _) = attention_of("latent"), inputs("latent", (7, 7))
    both = recorded(module, x, rotary, Layout((7, 7)))
    halves = [
        recorded(module, x[part], Rotary(rotary.cos[part], rotary.sin[part]), Layout((7,)))
        for part in (slice(0, 7), slice(7, 14))
    ]
    assert_close(both, torch.maximum(*halves), rtol=1e-6, atol=0)


def test_micro_batches_add_up_to_their_maximum() -> None:
    module = attention_of("grouped")
    x, rotary, layout = inputs("grouped")
    with record_max_logits(module) as found:
        module(x, rotary, layout)
        first = found[""].clone()
        module(3 * x, rotary, layout)
        module(x, rotary, layout)
    assert_close(found[""], torch.maximum(first, recorded(module, 3 * x, rotary, layout)), rtol=0, atol=0)


def test_nothing_stays_behind_and_nothing_changes() -> None:
    """The output and its gradients are bit for bit those without recording, and afterwards no hook is left."""
    module, (x, rotary, layout) = attention_of("latent"), inputs("latent")
    results = []
    for recording in (False, True):
        module.zero_grad()
        if recording:
            with record_max_logits(module):
                out = module(x, rotary, layout)
        else:
            out = module(x, rotary, layout)
        out.square().sum().backward()
        results.append([out.detach(), *(parameter.grad.clone() for parameter in module.parameters())])
    assert_close(results[0], results[1], rtol=0, atol=0)
    assert not any(part._forward_pre_hooks for part in module.modules())


@pytest.mark.parametrize("name", vlkit.list_models("*-tiny"))
def test_every_attention_of_a_model_is_recorded(name: str) -> None:
    """All of tower and decoder, also where blocks are computed again in the backward."""
    model = vlkit.create_model(name)
    model.llm.gradient_checkpointing = True
    batch = random_batch(model)
    with record_max_logits(model) as found:
        model(batch)
    blocks = [
        name
        for name, module in model.named_modules()
        if isinstance(module, (SelfAttention, GroupedQueryAttention, LatentAttention))
    ]
    assert list(found) == blocks
    assert all(values.isfinite().all() for values in found.values())


def test_logits_are_of_what_autocast_multiplies() -> None:
    module, given = attention_of("grouped"), inputs("grouped")
    with record_max_logits(module) as found, torch.autocast("cpu", torch.bfloat16):
        module(*given)
        q, k = module.queries_and_keys(*given[:2])
    expected = max_logits_per_head(q.bfloat16(), k.bfloat16(), given[2], causal=True, scale=module.scale)
    assert_close(found[""], expected, rtol=0, atol=0)


def test_a_forward_with_a_cache_is_refused() -> None:
    model = (
        vlkit.create_model("qwen3-tiny") if "qwen3-tiny" in vlkit.list_models() else vlkit.create_model("andesvl-tiny")
    )
    ids = torch.tensor([1, 2, 3])
    cache = model.llm.new_cache(1, 8, dtype=torch.float32)
    with record_max_logits(model), pytest.raises(LayoutError, match="without a cache"):
        model.llm(Packed(model.llm.embed(ids), Layout((3,))), cache=cache)


def test_a_model_without_attention_is_refused() -> None:
    with (
        pytest.raises(ConfigError, match="no attention whose logits can be recorded"),
        record_max_logits(nn.Linear(2, 2)),
    ):
        pass


# Clipping


@pytest.mark.parametrize("alpha", [0.0, 0.25, 0.5, 1.0])
@pytest.mark.parametrize("kind", KINDS)
def test_logits_are_within_the_limit_afterwards(kind: str, alpha: float) -> None:
    """Heads beyond it get exactly tau, or less where they share a key with one that was further beyond; others keep theirs.

    The rotation comes after the scaling, and commutes with it.
    """
    module, given = attention_of(kind), inputs(kind)
    before = largest(module, *given)
    tau = before.sort().values[len(before) // 2].item() * 0.9
    gamma = qk_clip_(module, {"": recorded(module, *given)}, tau=tau, alpha=alpha)[""].double()
    after = largest(module, *given)
    assert_close(after, before * gamma, rtol=3e-6, atol=1e-6)
    assert after.max() <= tau * (1 + 3e-6)
    assert (gamma < 1).any()
    group = len(gamma) // (1 if kind == "one key head" else 3)
    expected = (tau / before).clamp(max=1).view(-1, group).amin(1).repeat_interleave(group)
    assert_close(gamma, expected, rtol=3e-6, atol=0)
    if group == 1:
        assert_close(after[gamma < 1], torch.full_like(after[gamma < 1], tau), rtol=3e-6, atol=0)


def test_heads_share_the_factor_as_alpha_says() -> None:
    module, given = attention_of("tower"), inputs("tower")
    before = {name: parameter.detach().clone() for name, parameter in module.named_parameters()}
    gamma = qk_clip_(module, {"": recorded(module, *given)}, tau=1.0, alpha=0.25)[""]
    for name, power in (("q", 0.25), ("k", 0.75)):
        for kind in ("weight", "bias"):
            old, new = before[f"{name}.{kind}"], getattr(getattr(module, name), kind)
            factor = (gamma**power).repeat_interleave(8).view(-1, *[1] * (old.ndim - 1))
            assert_close(new.detach(), old * factor, rtol=1e-6, atol=0)
    for name in ("v.weight", "v.bias", "out.weight", "out.bias"):
        assert torch.equal(before[name], dict(module.named_parameters())[name])


def test_the_key_that_all_heads_share_keeps_its_size() -> None:
    """In latent attention; the rotated channels of the query take all of the factor, the others half of it."""
    module, given = attention_of("latent"), inputs("latent")
    before = {name: parameter.detach().clone() for name, parameter in module.named_parameters()}
    gamma = qk_clip_(module, {"": recorded(module, *given)}, tau=0.5)[""].view(3, 1, 1)
    assert gamma.max() < 1
    for name in ("kv_down.weight", "kv_norm.weight", "out.weight"):
        assert torch.equal(before[name], dict(module.named_parameters())[name])
    q, old_q = (w.detach().unflatten(0, (3, 10)) for w in (module.q.weight, before["q.weight"]))
    assert_close(q[:, :6], old_q[:, :6] * gamma.sqrt(), rtol=1e-6, atol=0)
    assert_close(q[:, 6:], old_q[:, 6:] * gamma, rtol=1e-6, atol=0)
    up, old_up = (w.detach().unflatten(0, (3, 11)) for w in (module.kv_up.weight, before["kv_up.weight"]))
    assert_close(up[:, :6], old_up[:, :6] * gamma.sqrt(), rtol=1e-6, atol=0)
    assert torch.equal(up[:, 6:], old_up[:, 6:])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
def test_heads_within_the_limit_keep_every_bit(kind: str, dtype: torch.dtype) -> None:
    """Some heads beyond the limit, or none: the rows of the others are the same to the last bit."""
    module, (x, rotary, layout) = attention_of(kind).to(dtype), inputs(kind)
    found = recorded(module, x.to(dtype), rotary, layout)
    before = {name: parameter.detach().clone() for name, parameter in module.named_parameters()}
    qk_clip_(module, {"": found}, tau=found.max().item())
    assert all(torch.equal(parameter, before[name]) for name, parameter in module.named_parameters())
    gamma = qk_clip_(module, {"": found}, tau=found.max().item() * 0.99)[""]
    kept = gamma == 1
    if kind != "one key head":
        assert kept.any()
    rows = module.q.weight.view(len(gamma), -1)
    assert torch.equal(rows[kept], before["q.weight"].view(len(gamma), -1)[kept])
    assert not torch.equal(module.q.weight, before["q.weight"])


def test_what_has_not_run_is_left_alone() -> None:
    module = attention_of("grouped")
    before = module.q.weight.detach().clone()
    with record_max_logits(module) as found:
        pass
    assert found[""].tolist() == [-math.inf] * 6
    qk_clip_(module, found, tau=1.0)
    assert torch.equal(module.q.weight, before)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_logits_that_are_not_finite_change_nothing(bad: float) -> None:
    model = nn.ModuleDict({"first": attention_of("grouped"), "second": attention_of("grouped")})
    before = model["first"].q.weight.detach().clone()
    found = {"first": torch.full((6,), 1e4), "second": torch.tensor([1.0, bad, 1.0, 1.0, 1.0, 1.0])}
    with pytest.raises(NonFiniteError, match="logits of second are not finite"):
        qk_clip_(model, found)
    assert torch.equal(model["first"].q.weight, before)


@pytest.mark.parametrize(
    ("found", "options", "words"),
    [
        ({"attn": torch.ones(5)}, {}, r"attn has 6 heads, max_logits has shape \(5,\)"),
        ({"attm": torch.ones(6)}, {}, "'attm' is no module"),
        ({"attn.q": torch.ones(6)}, {}, "attn.q is a Linear, which does not say"),
        ({"normed": torch.ones(6)}, {}, "normed normalises q and k of every head, so scaling .* changes no logit"),
        ({"adapted": torch.ones(6)}, {}, "adapted.q is a Adapted; .* Merge adapters first"),
        ({"attn": torch.ones(6)}, {"tau": 0.0}, "tau above 0"),
        ({"attn": torch.ones(6)}, {"alpha": 1.5}, "alpha in"),
    ],
)
def test_what_cannot_be_clipped_is_refused(found: dict[str, Tensor], options: dict[str, float], words: str) -> None:
    class Adapted(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) * 2

    adapted = attention_of("grouped")
    adapted.q = Adapted(24, 48, bias=False)
    model = nn.ModuleDict(
        {
            "attn": attention_of("grouped"),
            "normed": GroupedQueryAttention(24, 6, 3, 8, qk_norm_eps=1e-6),
            "adapted": adapted,
        }
    )
    with pytest.raises(ConfigError, match=words):
        qk_clip_(model, found, **options)


# Over ranks


def _clip_shards(rank: int, kind: str, dim: int) -> list[Tensor]:
    """What this rank's part of every parameter is afterwards, put together; logits come from different data per rank."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    module = attention_of(kind)
    x, rotary, layout = inputs(kind)
    with record_max_logits(module) as found:
        module(x * (rank + 1), rotary, layout)
    mesh = init_device_mesh("cpu", (3,))
    for part in module.modules():
        for name, parameter in list(part.named_parameters(recurse=False)):
            axis = min(dim, parameter.ndim - 1)
            setattr(part, name, nn.Parameter(distribute_tensor(parameter.detach(), mesh, [Shard(axis)])))
    reduce_max_logits_(found)
    qk_clip_(module, found, tau=1.0)
    return [parameter.full_tensor().detach() for parameter in module.parameters()]


@pytest.mark.parametrize("dim", [0, 1])
@pytest.mark.parametrize("kind", ["latent", "grouped with biases"])
def test_sharded_parameters_are_clipped_like_whole_ones(kind: str, dim: int) -> None:
    """Each rank scales what it has, by the largest logit of all ranks. 3 ranks: rows do not divide evenly."""
    module = attention_of(kind)
    x, rotary, layout = inputs(kind)
    with record_max_logits(module) as found:
        for scale in (1, 2, 3):
            module(x * scale, rotary, layout)
    qk_clip_(module, found, tau=1.0)
    expected = [parameter.detach() for parameter in module.parameters()]
    for result in run_ranks(_clip_shards, 3, kind, dim):
        assert_close(result, expected, rtol=1e-6, atol=0)


def _clip_sharded_model(rank: int, name: str) -> list[Tensor]:
    """A model under FSDP2, each block by itself; every rank has samples of its own."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    torch.manual_seed(0)
    model = vlkit.create_model(name)
    mesh = init_device_mesh("cpu", (2,))
    for block in (*model.vision.blocks, *model.llm.blocks, model):
        fully_shard(block, mesh=mesh)
    with record_max_logits(model) as found:
        model(random_batch(model, seed=rank)).loss.backward()
    reduce_max_logits_(found)
    qk_clip_(model, _clippable(model, found), tau=1e-3)
    return [parameter.full_tensor().detach() for parameter in model.parameters()]


def _clippable(model: nn.Module, found: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: logits for name, logits in found.items() if not model.get_submodule(name).normalizes_heads}


@pytest.mark.parametrize("name", ["kimi-vl-tiny", "qwen2-vl-tiny", "qwen3-vl-tiny"])
def test_a_model_under_fsdp_is_clipped_like_one_process(name: str) -> None:
    """Latent attention, grouped queries with biases, and a decoder whose normed heads are left out."""
    torch.manual_seed(0)
    model = vlkit.create_model(name)
    before = [parameter.detach().clone() for parameter in model.parameters()]
    with record_max_logits(model) as found:
        for rank in range(2):
            model(random_batch(model, seed=rank))
    qk_clip_(model, _clippable(model, found), tau=1e-3)
    expected = [parameter.detach() for parameter in model.parameters()]
    assert sum(not torch.equal(a, b) for a, b in zip(before, expected, strict=True)) >= 4
    for result in run_ranks(_clip_sharded_model, 2, name):
        assert_close(result, expected, rtol=1e-5, atol=1e-7)
