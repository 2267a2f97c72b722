"""Decoders filled from the folders of language models, as transformers saves them, and saved as such again."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from vlkit.errors import ConfigError, KeyMismatchError
from vlkit.hub.pretrained import save_weights
from vlkit.llm import Decoder, build_llama, build_moonlight, build_qwen2, build_qwen3, llama, moonlight, qwen2, qwen3
from vlkit.llm.starting_points import load_decoder
from vlkit.packing import Layout, Packed
from vlkit.registry import component

transformers = pytest.importorskip("transformers")

LENGTHS = (5, 1, 9)
TINY = {
    "qwen2": ("qwen2-tiny", build_qwen2, qwen2.keys, transformers.Qwen2Config, transformers.Qwen2ForCausalLM),
    "qwen3": ("qwen3-tiny", build_qwen3, qwen3.keys, transformers.Qwen3Config, transformers.Qwen3ForCausalLM),
    "llama": ("llama-tiny", build_llama, llama.keys, transformers.LlamaConfig, transformers.LlamaForCausalLM),
    "qwen3-moe": (
        "qwen3-moe-tiny", build_qwen3, qwen3.keys, transformers.Qwen3MoeConfig, transformers.Qwen3MoeForCausalLM,
    ),
    "moonlight": (
        "moonlight-tiny", build_moonlight, moonlight.keys, transformers.DeepseekV3Config, transformers.DeepseekV3ForCausalLM,
    ),
}  # fmt: skip


def hub_fields(config: Any) -> dict[str, Any]:
    """Our sizes under the names of config.json."""
    names = {
        "vocab_size": "vocab_size", "dim": "hidden_size", "mlp_dim": "intermediate_size", "num_layers": "num_hidden_layers",
        "num_heads": "num_attention_heads", "num_kv_heads": "num_key_value_heads", "head_dim": "head_dim",
        "max_positions": "max_position_embeddings", "norm_eps": "rms_norm_eps", "tied": "tie_word_embeddings",
        "expert_dim": "moe_intermediate_size", "top_k": "num_experts_per_tok", "normalize": "norm_topk_prob",
    }  # fmt: skip
    fields = {theirs: getattr(config, ours) for ours, theirs in names.items() if hasattr(config, ours)}
    fields |= {"rope_theta": config.theta, "experts_implementation": "eager", "attn_implementation": "eager"}
    if isinstance(config, moonlight.MoonlightConfig):
        fields |= {
            "num_key_value_heads": config.num_heads, "kv_lora_rank": config.kv_rank, "q_lora_rank": None,
            "qk_nope_head_dim": config.nope_dim, "qk_rope_head_dim": config.rope_dim, "v_head_dim": config.value_dim,
            "n_routed_experts": config.num_experts, "n_shared_experts": config.num_shared_experts,
            "first_k_dense_replace": config.num_dense_layers, "n_group": config.num_groups,
            "topk_group": config.top_groups, "routed_scaling_factor": config.routed_scale, "rope_scaling": None,
            "attention_bias": False, "head_dim": config.rope_dim,
        }  # fmt: skip
    elif hasattr(config, "num_experts"):
        fields |= {"num_experts": config.num_experts, "mlp_only_layers": [], "decoder_sparse_step": 1}
    return fields


@pytest.mark.parametrize("kind", TINY)
@torch.no_grad()
def test_a_saved_language_model_fills_a_decoder(kind: str, tmp_path: Path) -> None:
    """Folder -> logits within 2e-5; -> the same names, shapes and bits; -> the same logits in the reference again."""
    name, build, keys, config_class, model_class = TINY[kind]
    config: Any = component("llm", name).configs[name]
    torch.manual_seed(0)
    theirs = model_class(config_class(**hub_fields(config))).eval()
    for parameter in theirs.parameters():
        parameter.add_(0.1 * torch.randn_like(parameter))
    theirs.save_pretrained(tmp_path / "theirs")
    with torch.device("meta"):
        ours: Decoder = build(config)
    load_decoder(ours, tmp_path / "theirs")
    ids = torch.randint(config.vocab_size, (sum(LENGTHS),))
    logits = ours.head(ours(Packed(ours.embed(ids), Layout(LENGTHS))).hidden.tokens)
    want = torch.cat([theirs(input_ids=part[None]).logits[0] for part in ids.split(LENGTHS)])
    assert float((logits - want).abs().max() / want.abs().max()) <= 2e-5
    (tmp_path / "ours").mkdir()
    save_weights(ours, tmp_path / "ours", keys(config))
    before = load_file(tmp_path / "theirs" / "model.safetensors")
    after = load_file(tmp_path / "ours" / "model.safetensors")
    assert set(before) == set(after)
    assert all(torch.equal(before[key], after[key]) and before[key].dtype == after[key].dtype for key in before)
    (tmp_path / "ours" / "config.json").write_bytes((tmp_path / "theirs" / "config.json").read_bytes())
    again = model_class.from_pretrained(tmp_path / "ours", attn_implementation="eager", experts_implementation="eager")
    assert torch.equal(again(input_ids=ids[None, :7]).logits, theirs(input_ids=ids[None, :7]).logits)


def test_what_no_shape_shows_is_compared(tmp_path: Path) -> None:
    config: Any = component("llm", "llama-tiny").configs["llama-tiny"]
    decoder = build_llama(config)
    save_weights(decoder, tmp_path, llama.keys(config))
    for name, value in (("rope_theta", 123.0), ("rms_norm_eps", 0.5)):
        (tmp_path / "config.json").write_text(json.dumps({name: value}))
        with pytest.raises(ConfigError, match=f"{name} is {value}"):
            load_decoder(decoder, tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"rope_parameters": {"rope_theta": 123.0}}))
    with pytest.raises(ConfigError, match="rope_theta is 123"):
        load_decoder(decoder, tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"rope_parameters": {"rope_theta": config.theta}}))
    load_decoder(decoder, tmp_path)


def test_another_size_is_refused(tmp_path: Path) -> None:
    config: Any = component("llm", "llama-tiny").configs["llama-tiny"]
    save_weights(build_llama(config), tmp_path, llama.keys(config))
    with pytest.raises(KeyMismatchError, match="shape"):
        load_decoder(build_llama(config.replace(mlp_dim=config.mlp_dim + 2)), tmp_path)
