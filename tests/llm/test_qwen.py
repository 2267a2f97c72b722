"""The first Qwen decoder: published logits, and what happens beyond the trained length."""

from __future__ import annotations

import pytest
import torch

from tests import golden
from tests.text_model import TextModel, batch_of
from vlkit.errors import ConfigError
from vlkit.generation import generate
from vlkit.llm.decoder import Decoder
from vlkit.llm.qwen import QwenConfig, build_qwen, keys
from vlkit.llm.rope import DynamicRope
from vlkit.packing import Layout, Packed

TOY = QwenConfig(vocab_size=200, dim=64, num_layers=2, num_heads=4, head_dim=16, mlp_dim=96, trained_length=16)


def made(config: QwenConfig = TOY) -> Decoder:
    """With the weights that the numbers below were made with."""
    model = build_qwen(config)
    shapes = {name: tensor.shape for name, tensor in keys(config).to_theirs(model.state_dict()).items()}
    model.load_state_dict(keys(config).to_ours(golden.fill(shapes)))
    return model.eval()


def ids_of(length: int) -> torch.Tensor:
    return 7 * torch.arange(length) % 200


@torch.no_grad()
def logits_of(model: Decoder, ids: list[torch.Tensor], **more: object) -> tuple[torch.Tensor, ...]:
    lengths = tuple(map(len, ids))
    hidden = model(Packed(model.embed(torch.cat(ids)), Layout(lengths)), **more).hidden.tokens
    return model.head(hidden).split(lengths)


def test_published_logits_within_and_beyond_the_trained_length_in_one_pack() -> None:
    """The published code ran them one by one."""
    short, long = logits_of(made(), [ids_of(8), ids_of(40)])
    first = (0.265515, 0.048602, 0.026628, 0.403897)
    golden.check(short, -0.00320580, 0.56359445, 28.0581096, first, (0.042032, -0.554335))
    golden.check(long, -0.00063261, 0.55597270, 61.4374552, first, (0.346063, 1.109471))


@pytest.mark.parametrize("change", [{"grow_wavelengths": False}, {"grow_queries": False}])
def test_each_rule_matters_beyond_the_trained_length_only(change: dict[str, bool]) -> None:
    short, long = logits_of(made(), [ids_of(16), ids_of(40)])
    other_short, other_long = logits_of(made(TOY.replace(**change)), [ids_of(16), ids_of(40)])
    assert torch.equal(short, other_short)
    assert (long - other_long).abs().max() > 0.01


def test_wavelengths_follow_the_prompts_length() -> None:
    rope = DynamicRope(128, 10000.0, 2048)
    assert [rope.alpha(length) for length in (1, 2048, 2049, 4096, 4097, 8192)] == [1, 1, 3, 3, 7, 7]
    rope = DynamicRope(16, 10000.0, 16)
    assert [rope.alpha(length) for length in (16, 17, 32, 33, 70)] == [1, 3, 3, 7, 15]


def test_both_rules_rest_while_training() -> None:
    plain = made(TOY.replace(grow_wavelengths=False, grow_queries=False))
    model = made().train()
    for ours, want in zip(logits_of(model, [ids_of(40)]), logits_of(plain, [ids_of(40)]), strict=True):
        assert torch.equal(ours, want)


def test_pack_of_unequal_wavelengths_equals_alone_with_gradients() -> None:
    model = made().double()
    texts = [ids_of(n) for n in (40, 3, 20, 17)]
    together = torch.cat(logits_of(model, texts))
    alone = torch.cat([logits_of(model, [text])[0] for text in texts])
    assert (together - alone).abs().max() <= 1e-12 * alone.abs().max()
    grads = []
    for packs in ([texts], [[text] for text in texts]):
        model.zero_grad()
        for pack in packs:
            layout = Layout(tuple(map(len, pack)))
            model(Packed(model.embed(torch.cat(pack)), layout)).hidden.tokens.square().sum().backward()
        grads.append([p.grad for p in model.blocks.parameters()])
    for ours, want in zip(*grads, strict=True):
        assert (ours - want).abs().max() <= 1e-11 * want.abs().max()


@pytest.mark.parametrize("prompts", [(14, 30), (20, 3)])
def test_wavelengths_stay_those_of_the_prompt_while_decoding(prompts: tuple[int, ...]) -> None:
    """Prompts of 14 and 30 tokens grow beyond 16 and 32: as one forward with the prompt's wavelengths, and not another."""
    model = made().double()
    texts = [ids_of(n + 8) for n in prompts]
    cache = model.new_cache(2, 4, dtype=torch.float64)
    logits_of(model, [text[:n] for text, n in zip(texts, prompts, strict=True)], cache=cache)
    steps = [
        logits_of(model, [text[n + i][None] for text, n in zip(texts, prompts, strict=True)], cache=cache)
        for i in range(4)
    ]
    cache.select([1])
    steps += [
        (torch.zeros(1, 200), *logits_of(model, [texts[1][prompts[1] + i][None]], cache=cache)) for i in range(4, 8)
    ]
    for item, (text, length) in enumerate(zip(texts, prompts, strict=True)):
        frozen = made().double()
        frozen.rope = DynamicRope(16, 10000.0 * model.rope.alpha(length) ** (16 / 14), 16, grow_wavelengths=False)
        want = logits_of(frozen, [text])[0][length:]
        got = torch.cat([step[item] for step in steps[: 8 if item else 4]])
        assert torch.allclose(got, want[: len(got)], rtol=0, atol=1e-11)
        if model.rope.alpha(length + 8) != model.rope.alpha(length):
            assert not torch.allclose(got, logits_of(model, [text])[0][length:][: len(got)], rtol=0, atol=1e-3)


@pytest.mark.parametrize("temperature", [0.0, 1.5])
def test_answers_of_a_batch_are_those_of_its_sequences(temperature: float) -> None:
    """Prompts on either side of the trained length, stopping at different steps."""
    model = TextModel(made().double())
    texts = [ids_of(n) for n in (14, 40, 3)]

    def answers(pack: list[torch.Tensor], seed: list[int], stop: tuple[int, ...] = ()) -> list[list[int]]:
        return generate(model, batch_of(pack), max_new_tokens=8, temperature=temperature, seed=seed, stop=stop)

    together = answers(texts, [3, 4, 5])
    assert together == [answers([text], [3 + i])[0] for i, text in enumerate(texts)]
    stop = (together[0][3],)
    cut = answers(texts, [3, 4, 5], stop)
    assert cut[0] == together[0][: together[0].index(stop[0]) + 1]
    assert all(short == long[: len(short)] for short, long in zip(cut, together, strict=True))


def test_published_sizes() -> None:
    with torch.device("meta"):
        model = build_qwen(QwenConfig())
    assert sum(p.numel() for p in model.parameters()) == 7_721_324_544
    theirs = keys(QwenConfig()).to_theirs(model.state_dict())
    assert len(theirs) == 3 + 32 * 8
    assert theirs["transformer.h.31.attn.c_attn.weight"].shape == (12288, 4096)
    assert theirs["transformer.h.0.mlp.w1.weight"].shape == (11008, 4096)


def test_the_gate_is_w2() -> None:
    """With an input that makes w2's product very negative, the MLP is closed, whatever w1 says."""
    ours = keys(TOY).to_ours(
        {"transformer.h.0.mlp.w2.weight": torch.zeros(2, 3), "transformer.h.0.mlp.w1.weight": torch.ones(2, 3)}
    )
    assert not ours["blocks.0.mlp.gate.weight"].any()
    assert ours["blocks.0.mlp.up.weight"].all()


def test_a_trained_length_without_a_logarithm_is_refused() -> None:
    with pytest.raises(ConfigError, match="trained_length=1"):
        TOY.replace(trained_length=1)
    with pytest.raises(ConfigError, match="head_dim=2"):
        TOY.replace(head_dim=2)
