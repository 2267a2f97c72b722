"""Qwen3 with experts against transformers' qwen3_moe."""

from __future__ import annotations

import pytest
import torch

from tests.parity.decoders import assert_same_gradients, hub_sizes, published, randomise
from vlkit.llm.qwen3 import Qwen3Config, build_qwen3, keys
from vlkit.packing import Layout, Packed

transformers = pytest.importorskip("transformers")

LENGTHS = (6, 1, 11, 2)


def reference(config: Qwen3Config) -> torch.nn.Module:
    theirs = transformers.Qwen3MoeForCausalLM(
        transformers.Qwen3MoeConfig(
            **hub_sizes(config),
            moe_intermediate_size=config.expert_dim,
            head_dim=config.head_dim,
            num_experts=config.num_experts,
            num_experts_per_tok=config.top_k,
            norm_topk_prob=config.normalize,
            tie_word_embeddings=False,
            rope_theta=config.theta,
            rope_scaling=None,
            experts_implementation="eager",
        )
    )
    return randomise(theirs)


@pytest.mark.parametrize("normalize", [True, False])
def test_packed_logits_and_gradients_are_those_of_the_reference_one_by_one(normalize: bool) -> None:
    config = Qwen3Config(
        vocab_size=61, dim=28, num_layers=2, num_heads=6, num_kv_heads=2, head_dim=10, mlp_dim=45, max_positions=64,
        num_experts=7, top_k=3, expert_dim=18, normalize=normalize, tied=False,
    )  # fmt: skip
    theirs, ours = reference(config), build_qwen3(config)
    state = published(theirs.state_dict())
    ours.load_state_dict(keys(config).to_ours(state))
    again = keys(config).to_theirs(ours.state_dict())
    assert set(again) == set(state)
    assert all(torch.equal(again[name], state[name]) for name in state)
    ids = torch.randint(config.vocab_size, (sum(LENGTHS),), generator=torch.Generator().manual_seed(0))

    logits = ours.head(ours(Packed(ours.embed(ids), Layout(LENGTHS))).hidden.tokens)
    want = torch.cat([theirs(part[None]).logits[0] for part in ids.split(LENGTHS)])
    assert (logits - want).abs().max() <= 1e-5 * want.abs().max()  # fp32, 2 layers: largest seen 1e-6

    assert_same_gradients(ours, logits.square().sum(), theirs, want.square().sum(), keys(config))
