"""Dense Qwen3 against transformers' qwen3."""

from __future__ import annotations

import pytest
import torch

from tests.parity.decoders import assert_same_gradients, hub_sizes, randomise
from vlkit.llm.qwen3 import Qwen3Config, build_qwen3, keys
from vlkit.packing import Layout, Packed

transformers = pytest.importorskip("transformers")

LENGTHS = (5, 1, 17, 3)


def reference(config: Qwen3Config) -> torch.nn.Module:
    theirs = transformers.Qwen3ForCausalLM(
        transformers.Qwen3Config(
            **hub_sizes(config),
            head_dim=config.head_dim,
            tie_word_embeddings=config.tied,
            rope_theta=config.theta,
            rope_scaling=None,
            attention_bias=config.qkv_bias,
        )
    )
    return randomise(theirs)


def odd_config(**changes: object) -> Qwen3Config:
    small = Qwen3Config(
        vocab_size=61, dim=28, num_layers=3, num_heads=6, num_kv_heads=2, head_dim=10, mlp_dim=45, max_positions=64
    )
    return small.replace(**changes)


@pytest.mark.parametrize("tied", [True, False])
def test_packed_logits_and_gradients_are_those_of_the_reference_one_by_one(tied: bool) -> None:
    config = odd_config(tied=tied)
    theirs, ours = reference(config), build_qwen3(config)
    ours.load_state_dict(keys(config).to_ours(published(theirs.state_dict(), config)))
    ids = torch.randint(config.vocab_size, (sum(LENGTHS),), generator=torch.Generator().manual_seed(0))

    logits = ours.head(ours(Packed(ours.embed(ids), Layout(LENGTHS))).hidden.tokens)
    want = torch.cat([theirs(part[None]).logits[0] for part in ids.split(LENGTHS)])
    assert (logits - want).abs().max() <= 1e-5 * want.abs().max()  # fp32, 3 layers: largest seen 1e-6

    def names(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return published(state, config)

    assert_same_gradients(ours, logits.square().sum(), theirs, want.square().sum(), keys(config), names)


def published(state: dict[str, torch.Tensor], config: Qwen3Config) -> dict[str, torch.Tensor]:
    """The names of the checkpoint, which has no head where it is tied."""
    return {name: tensor for name, tensor in state.items() if not (config.tied and name == "lm_head.weight")}


@pytest.mark.parametrize("tied", [True, False])
def test_key_map_writes_the_published_names_and_ignores_the_copy_of_a_tied_head(tied: bool) -> None:
    config = odd_config(tied=tied)
    state = reference(config).state_dict()
    ours = build_qwen3(config).state_dict()
    assert set(keys(config).to_theirs(ours)) == set(published(state, config))
    shapes = ({name: tensor.shape for name, tensor in each.items()} for each in (state, ours))
    assert {step.target for step in keys(config).plan_load(*shapes)} == set(ours)


def test_decoding_is_the_reference_over_everything() -> None:
    """Prefill of unequal sequences, then single tokens, against one run of the reference without a cache."""
    config = odd_config(tied=False)
    theirs, ours = reference(config).double(), build_qwen3(config).double()
    ours.load_state_dict(keys(config).to_ours(theirs.state_dict()))
    texts = [torch.randint(61, (n,), generator=torch.Generator().manual_seed(n)) for n in (9, 5, 12)]
    cache = ours.new_cache(3, 4, dtype=torch.float64)  # too small: it has to grow

    with torch.no_grad():
        want = [theirs(text[None]).logits[0] for text in texts]
        new = [text[:-3] for text in texts]
        packed = Packed(ours.embed(torch.cat(new)), Layout(tuple(map(len, new))))
        logits = ours.head(ours(packed, cache=cache).hidden.tokens).split([len(text) for text in new])
        for got, expected in zip(logits, want, strict=True):
            assert (got - expected[:-3]).abs().max() <= 1e-6 * expected.abs().max()
        for step in (-3, -2, -1):
            packed = Packed(ours.embed(torch.stack([text[step] for text in texts])), Layout((1, 1, 1)))
            logits = ours.head(ours(packed, cache=cache).hidden.tokens)
            for got, expected in zip(logits, want, strict=True):
                # fp64, the reference's angles are fp32: largest seen 3e-7
                assert (got - expected[step]).abs().max() <= 1e-6 * expected.abs().max()


@pytest.mark.parametrize(
    ("changes", "count"),
    [
        ({}, 596_049_920),
        ({"dim": 2048, "mlp_dim": 6144}, 1_720_574_976),
        ({"dim": 2560, "num_layers": 36, "num_heads": 32, "mlp_dim": 9728}, 4_022_468_096),
    ],
)
def test_published_sizes_have_the_published_parameter_counts(changes: dict[str, int], count: int) -> None:
    with torch.device("meta"):
        assert sum(p.numel() for p in build_qwen3(Qwen3Config(**changes)).parameters()) == count
