"""Qwen3 with experts against transformers' qwen3_moe."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from vlkit.llm.qwen3 import Qwen3Config, build_qwen3, keys
from vlkit.packing import Layout, Packed

transformers = pytest.importorskip("transformers")

LENGTHS = (6, 1, 11, 2)


def reference(config: Qwen3Config) -> torch.nn.Module:
    theirs = transformers.Qwen3MoeForCausalLM(
        transformers.Qwen3MoeConfig(
            vocab_size=config.vocab_size,
            hidden_size=config.dim,
            intermediate_size=config.mlp_dim,
            moe_intermediate_size=config.expert_dim,
            num_hidden_layers=config.num_layers,
            num_attention_heads=config.num_heads,
            num_key_value_heads=config.num_kv_heads,
            head_dim=config.head_dim,
            num_experts=config.num_experts,
            num_experts_per_tok=config.top_k,
            norm_topk_prob=config.normalize,
            max_position_embeddings=config.max_positions,
            rms_norm_eps=config.norm_eps,
            tie_word_embeddings=False,
            rope_theta=config.theta,
            rope_scaling=None,
            attn_implementation="eager",
            experts_implementation="eager",
        )
    ).eval()
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(1 + 0.3 * noise if "norm" in name else 0.2 * noise)
    return theirs


def published(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The names of the checkpoint: transformers fuses the experts on loading."""
    made = {}
    for name, tensor in state.items():
        stem = name.rsplit(".", 1)[0]
        if name.endswith("gate_up_proj"):
            for expert, (gate, up) in enumerate(zip(*tensor.chunk(2, dim=1), strict=True)):
                made |= {f"{stem}.{expert}.gate_proj.weight": gate, f"{stem}.{expert}.up_proj.weight": up}
        elif name.endswith("experts.down_proj"):
            made |= {f"{stem}.{expert}.down_proj.weight": down for expert, down in enumerate(tensor)}
        else:
            made[name] = tensor
    return made


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

    logits.square().sum().backward()
    want.square().sum().backward()
    grads = keys(config).to_ours(published({name: p.grad for name, p in theirs.named_parameters()}))
    for name, parameter in ours.named_parameters():
        assert (parameter.grad - grads[name]).abs().max() <= 2e-5 * grads[name].abs().max(), name
