"""What holds for every decoder: packing, cache, checkpointing, compilation, a fresh start, and mistakes that are named."""

from __future__ import annotations

import copy

import pytest
import torch

from vlkit.errors import LayoutError, SequenceTooLongError, TokenError
from vlkit.llm.decoder import Decoder
from vlkit.llm.moonlight import build_moonlight
from vlkit.llm.qwen3 import build_qwen3
from vlkit.packing import Layout, Packed
from vlkit.registry import component

NAMES = ("qwen3-tiny", "qwen3-moe-tiny", "moonlight-tiny")
LENGTHS = (7, 1, 12, 3)


def make(name: str, **changes: object) -> Decoder:
    part = component("llm", name)
    torch.manual_seed(0)
    model = part.module(part.configs[name].replace(**changes)).double()
    for parameter in model.parameters():  # larger than at the start, so that nothing hides behind small numbers
        torch.nn.init.normal_(parameter, std=0.3)
    return model


def ids_of(model: Decoder, lengths: tuple[int, ...], seed: int = 0) -> torch.Tensor:
    return torch.randint(model.config.vocab_size, (sum(lengths),), generator=torch.Generator().manual_seed(seed))


def hidden(model: Decoder, ids: torch.Tensor, lengths: tuple[int, ...]) -> torch.Tensor:
    return model(Packed(model.embed(ids), Layout(lengths))).hidden.tokens


def gradients(model: Decoder, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    names, parameters = zip(*model.named_parameters(), strict=True)
    return dict(zip(names, torch.autograd.grad(loss, parameters), strict=True))


@pytest.mark.parametrize("name", NAMES)
def test_packed_equals_alone_with_gradients(name: str) -> None:
    model = make(name)
    ids = ids_of(model, LENGTHS)
    together = model.head(hidden(model, ids, LENGTHS))
    alone = torch.cat([model.head(hidden(model, part, (len(part),))) for part in ids.split(LENGTHS)])
    assert (together - alone).abs().max() <= 1e-13 * alone.abs().max()
    ours, theirs = gradients(model, together.square().sum()), gradients(model, alone.square().sum())
    for key, grad in ours.items():
        assert grad.any(), key
        assert (grad - theirs[key]).abs().max() <= 1e-12 * theirs[key].abs().max(), key


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", NAMES)
def test_other_text_in_one_sequence_changes_no_bit_of_another(name: str, dtype: torch.dtype) -> None:
    model = make(name).to(dtype)
    first, second = ids_of(model, LENGTHS), ids_of(model, LENGTHS)
    second[8:20] = ids_of(model, LENGTHS, seed=1)[8:20]
    with torch.no_grad():
        a, b = (hidden(model, ids, LENGTHS).split(LENGTHS) for ids in (first, second))
    assert [torch.equal(x, y) for x, y in zip(a, b, strict=True)] == [True, True, False, True]


@pytest.mark.parametrize("name", NAMES)
def test_with_cache_is_without_through_select(name: str) -> None:
    """Unequal prompts, an unequal chunk, single tokens, and a sequence that ends on the way."""
    model = make(name)
    ids = ids_of(model, LENGTHS)
    texts = ids.split(LENGTHS)
    done = {0: 0, 2: 0}
    with torch.no_grad():
        want = hidden(model, ids, LENGTHS).split(LENGTHS)
        cache = model.new_cache(2, 3, dtype=torch.float64)
        for new in [(4, 8), (2, 1), (1, 1), (0, 1), (0, 1)]:
            if new[0] == 0 and 0 in done:
                cache.select([1])
                del done[0]
            step = {i: n for i, n in zip((0, 2), new, strict=True) if n}
            fresh = torch.cat([texts[i][done[i] : done[i] + n] for i, n in step.items()])
            packed = Packed(model.embed(fresh), Layout(tuple(step.values())))
            rows = model(packed, cache=cache).hidden.tokens.split(list(step.values()))
            for (i, n), part in zip(step.items(), rows, strict=True):
                assert torch.allclose(part, want[i][done[i] : done[i] + n], rtol=0, atol=1e-11)
                done[i] += n
    assert cache.lengths == [12]


@pytest.mark.parametrize("name", NAMES)
def test_checkpointing_changes_no_bit(name: str) -> None:
    model = make(name)
    ids = ids_of(model, LENGTHS)
    plain = hidden(model, ids, LENGTHS)
    want = gradients(model, model.head(plain).square().sum())
    model.gradient_checkpointing = True
    runs = []
    model.blocks[1].attn.register_forward_hook(lambda *_: runs.append(1))
    again = hidden(model, ids, LENGTHS)
    got = gradients(model, model.head(again).square().sum())
    assert len(runs) == 2, "the block was not run again in the backward"
    assert torch.equal(plain, again)
    assert all(torch.equal(got[key], want[key]) for key in want)


def test_block_stack_compiles_once_for_all_lengths() -> None:
    """With latent attention, an MLP layer and a MoE layer; the contract compiles every registered model."""
    model = make("moonlight-tiny")
    eager = copy.deepcopy(model)
    torch._dynamo.reset()
    model.forward_blocks = torch.compile(model.forward_blocks, fullgraph=True, dynamic=True, backend="aot_eager")
    with torch._dynamo.config.patch(error_on_recompile=True):
        # The first lengths make no number that a width also has: torch takes equal sizes for one and the same symbol.
        for seed, lengths in enumerate([(7, 1, 11), (3, 5), (9, 2, 2, 2, 6)]):
            ids = ids_of(model, lengths, seed)
            got, want = hidden(model, ids, lengths), hidden(eager, ids, lengths)
            assert torch.allclose(got, want, rtol=0, atol=1e-12)
            ours = gradients(model, got.square().sum() + model.head_weight.sum())
            theirs = gradients(eager, want.square().sum() + eager.head_weight.sum())
            for key, grad in ours.items():
                assert (grad - theirs[key]).abs().max() <= 1e-11 * theirs[key].abs().max(), key
    torch._dynamo.reset()


def test_positions_can_be_given() -> None:
    model = make("moonlight-tiny")
    ids = ids_of(model, (5, 3))
    with torch.no_grad():
        packed = Packed(model.embed(ids), Layout((5, 3)))
        own = model(packed, positions=torch.tensor([0, 1, 2, 3, 4, 0, 1, 2])).hidden.tokens
        shifted = model(packed, positions=torch.tensor([5, 6, 7, 8, 9, 0, 1, 2])).hidden.tokens
        stretched = model(packed, positions=torch.tensor([0, 1, 2, 3, 9, 0, 1, 2])).hidden.tokens
    assert torch.equal(own, model(packed).hidden.tokens)
    assert torch.allclose(own, shifted, rtol=0, atol=1e-12)  # only distances count
    assert not torch.allclose(own[4], stretched[4], atol=1e-3)
    assert torch.equal(own[5:], stretched[5:])


@pytest.mark.parametrize("name", NAMES)
def test_meta_then_empty_then_reset_is_a_fresh_model(name: str) -> None:
    part = component("llm", name)
    config = part.configs[name]
    with torch.device("meta"):
        model = part.module(config)
    model = model.to_empty(device="cpu")
    for tensor in model.state_dict().values():
        tensor.fill_(float("nan"))
    for module in reversed(list(model.modules())):
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()
    assert list(model.state_dict()) == list(part.module(config).state_dict())
    for key, tensor in model.state_dict().items():
        if "norm" in key:
            assert torch.equal(tensor, torch.ones_like(tensor)), key
        elif key.endswith("router.bias"):
            assert not tensor.any(), key
        else:
            assert 0.015 < float(tensor.std()) < 0.025, key


def test_what_one_token_does_not_use_is_not_active() -> None:
    model = component("llm", "moonlight-tiny").module(component("llm", "moonlight-tiny").configs["moonlight-tiny"])
    assert model.inactive_parameters() == 1 * (5 - 2) * 3 * 32 * 24
    assert make("qwen3-tiny").inactive_parameters() == 0


def test_published_moonlight_has_the_published_parameter_counts() -> None:
    with torch.device("meta"):
        model = build_moonlight(component("llm", "moonlight").configs["moonlight-kimi-vl"])
    biases = sum(buffer.numel() for buffer in model.buffers())
    total = sum(p.numel() for p in model.parameters()) + biases
    assert (total, biases) == (15_960_110_208, 1664)
    assert total - model.inactive_parameters() == 2_914_776_192


def test_published_configs_differ_where_they_should() -> None:
    configs = component("llm", "moonlight").configs
    assert configs["moonlight"] == configs["moonlight-16b-a3b"]
    assert (configs["moonlight"].theta, configs["moonlight"].max_positions) == (50000.0, 8192)
    assert configs["moonlight-kimi-vl"] == configs["moonlight"].replace(theta=800000.0, max_positions=131072)
    with torch.device("meta"):
        large = build_qwen3(component("llm", "qwen3").configs["qwen3-30b-a3b"])
    assert sum(p.numel() for p in large.parameters()) == 30_532_122_624


def test_mistakes_are_named() -> None:
    model = make("qwen3-tiny", max_positions=6)
    with pytest.raises(TokenError, match=r"320.*vocabulary of 320"):
        model.embed(torch.tensor([5, 320]))
    with pytest.raises(TokenError, match="-1"):
        model.embed(torch.tensor([5, -1]))
    with pytest.raises(SequenceTooLongError, match=r"sequence 1 has 7 tokens.*6 positions"):
        hidden(model, ids_of(model, (2, 7)), (2, 7))
    with pytest.raises(SequenceTooLongError, match=r"0 to 6.*0 to 5"):
        model(Packed(model.embed(ids_of(model, (2,))), Layout((2,))), positions=torch.tensor([0, 6]))
    with pytest.raises(LayoutError, match="one per token, 2"):
        model(Packed(model.embed(ids_of(model, (2,))), Layout((2,))), positions=torch.zeros(2, 3))
    cache = model.new_cache(1, 6, dtype=torch.float64)
    with torch.no_grad():
        model(Packed(model.embed(ids_of(model, (6,))), Layout((6,))), cache=cache)
        with pytest.raises(SequenceTooLongError, match="7 tokens"):
            model(Packed(model.embed(ids_of(model, (1,))), Layout((1,))), cache=cache)
