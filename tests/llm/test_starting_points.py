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
from vlkit.llm import (
    Decoder,
    QwenConfig,
    build_llama,
    build_moonlight,
    build_qwen,
    build_qwen2,
    build_qwen3,
    decoder_config,
    llama,
    load_decoder,
    moonlight,
    qwen,
    qwen2,
    qwen3,
)
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
    }  # fmt: skip
    if getattr(config, "num_experts", 0):
        names |= {"expert_dim": "moe_intermediate_size", "top_k": "num_experts_per_tok", "normalize": "norm_topk_prob"}
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
    elif getattr(config, "num_experts", 0):
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


def saved(kind: str, folder: Path, **changes: Any) -> tuple[Any, dict[str, Any]]:
    """Our config, and the config.json that transformers writes for it, with some fields changed, beside such weights."""
    name, build, keys, config_class, _ = TINY[kind]
    config: Any = component("llm", name).configs[name]
    config_class(**hub_fields(config)).save_pretrained(folder)
    values = {**json.loads((folder / "config.json").read_text()), "model_type": config_class.model_type, **changes}
    (folder / "config.json").write_text(json.dumps(values))
    save_weights(build(config), folder, keys(config))
    return config, values


@pytest.mark.parametrize("kind", TINY)
def test_the_config_of_a_decoder_is_read_from_the_folder(kind: str, tmp_path: Path) -> None:
    config, _ = saved(kind, tmp_path)
    theirs = decoder_config(tmp_path)
    unread = {"mlp_dim": config.mlp_dim} if kind == "qwen3-moe" else {}
    assert theirs.replace(**unread) == config


def test_the_first_qwen_is_read_too(tmp_path: Path) -> None:
    values = {
        "model_type": "qwen", "vocab_size": 320, "hidden_size": 30, "num_hidden_layers": 2, "num_attention_heads": 3,
        "kv_channels": 10, "intermediate_size": 112, "rotary_emb_base": 10000.0, "seq_length": 2048, "use_dynamic_ntk": True,
        "use_logn_attn": False, "max_position_embeddings": 8192, "layer_norm_epsilon": 1e-6, "tie_word_embeddings": False,
        "rotary_pct": 1.0, "no_bias": True, "scale_attn_weights": True, "use_flash_attn": "auto", "bf16": False,
    }  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(values))
    config = QwenConfig(
        vocab_size=320,
        dim=30,
        num_layers=2,
        num_heads=3,
        head_dim=10,
        mlp_dim=56,
        trained_length=2048,
        grow_queries=False,
    )
    assert decoder_config(tmp_path) == config
    save_weights(build_qwen(config), tmp_path, qwen.keys(config))
    load_decoder(build_qwen(config), tmp_path)
    with pytest.raises(ConfigError, match="grow_queries=False, the decoder has True"):
        load_decoder(build_qwen(config.replace(grow_queries=True)), tmp_path)


PLAIN = {"rope_type": "default", "rope_theta": 10000.0}


@pytest.mark.parametrize(
    ("kind", "changes", "words"),
    [
        ("llama", {"rope_parameters": {**PLAIN, "rope_theta": 777.0}}, r"theta=777\.0, the decoder has 100000\.0"),
        ("llama", {"rms_norm_eps": 0.5}, r"norm_eps=0\.5, the decoder has 1e-05"),
        ("llama", {"num_attention_heads": 2, "head_dim": 20}, "num_heads=2, the decoder has 4; it means head_dim=20"),
        ("llama", {"num_key_value_heads": 1, "num_attention_heads": 8}, "num_kv_heads=1, the decoder has 2"),
        ("llama", {"tie_word_embeddings": False}, "tied=False, the decoder has True"),
        ("llama", {"hidden_act": "gelu"}, "hidden_act: 'gelu' is not supported"),
        ("llama", {"attention_bias": True}, "attention_bias: True is not supported"),
        ("llama", {"mlp_bias": True}, "mlp_bias: True is not supported"),
        ("llama", {"rope_parameters": {**PLAIN, "rope_type": "llama3", "factor": 8.0}}, "'llama3' is not supported"),
        (
            "llama",
            {"rope_scaling": {"type": "linear", "factor": 2.0}},
            r"rope_scaling\.type: 'linear' is not supported",
        ),
        ("llama", {"rope_parameters": {**PLAIN, "partial_rotary_factor": 0.5}}, "partial_rotary_factor: 0.5 is not"),
        ("llama", {"model_type": "mistral", "sliding_window": 8}, "sliding_window: 8 is not supported"),
        ("llama", {"model_type": "mistral"}, "missing 'sliding_window'"),
        ("llama", {"model_type": "gemma"}, "no decoder is known for model_type 'gemma', only for deepseek_v3, llama"),
        ("qwen2", {"model_type": "llama"}, "means a LlamaConfig, the decoder has a Qwen2Config"),
        ("llama", {"quantization_config": {"quant_method": "gptq"}}, "quantised"),
        ("qwen2", {"num_attention_heads": 6, "head_dim": None}, "num_heads=6, the decoder has 3"),
        ("qwen2", {"use_sliding_window": True, "sliding_window": 4}, "use_sliding_window: True is not supported"),
        ("qwen3", {"layer_types": ["full_attention", "sliding_attention"]}, "layer_types"),
        ("qwen3", {"rope_parameters": {**PLAIN, "rope_type": "yarn", "factor": 4.0}}, "'yarn' is not supported"),
        ("qwen3-moe", {"norm_topk_prob": False}, "normalize=False, the decoder has True"),
        ("qwen3-moe", {"num_experts_per_tok": 1}, "top_k=1, the decoder has 2"),
        ("qwen3-moe", {"mlp_only_layers": [0]}, "mlp_only_layers"),
        ("moonlight", {"num_experts_per_tok": 1}, "top_k=1, the decoder has 2"),
        ("moonlight", {"routed_scaling_factor": 1.0}, r"routed_scale=1\.0, the decoder has 2\.446"),
        ("moonlight", {"n_group": 5, "topk_group": 5}, "num_groups=5, the decoder has 1; it means top_groups=5"),
        ("moonlight", {"scoring_func": "softmax"}, "scoring_func: 'softmax' is not supported"),
        ("moonlight", {"norm_topk_prob": False}, "normalize=False, the decoder has True"),
        ("moonlight", {"rope_interleave": False}, "rope_interleave: False is not supported"),
    ],
)
def test_what_no_shape_shows_is_compared(kind: str, changes: dict[str, Any], words: str, tmp_path: Path) -> None:
    """All these weights fit by names and shapes."""
    config, _ = saved(kind, tmp_path, **changes)
    decoder = TINY[kind][1](config)
    before = {name: tensor.clone() for name, tensor in decoder.state_dict().items()}
    with pytest.raises(ConfigError, match=words):
        load_decoder(decoder, tmp_path)
    assert all(torch.equal(tensor, before[name]) for name, tensor in decoder.state_dict().items())
    (tmp_path / "config.json").unlink()
    load_decoder(decoder, tmp_path)


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        ("llama", {"max_position_embeddings": 99}),
        ("llama", {"model_type": "mistral", "sliding_window": None}),
        ("llama", {"rope_parameters": None, "rope_scaling": None, "rope_theta": 100000.0}),
        ("qwen3", {"rope_parameters": {**PLAIN, "rope_theta": 1000000.0}}),
    ],
)
def test_what_changes_no_number_is_let_pass(kind: str, changes: dict[str, Any], tmp_path: Path) -> None:
    config, _ = saved(kind, tmp_path, **changes)
    load_decoder(TINY[kind][1](config), tmp_path)


def test_text_fills_a_decoder_with_positions_in_rows_and_columns(tmp_path: Path) -> None:
    """The sections take an equal coordinate each."""
    config, _ = saved("qwen3", tmp_path)
    load_decoder(build_qwen3(config.replace(rope_sections=(3, 1, 1), rope_interleaved=True)), tmp_path)


@pytest.mark.parametrize("described", [True, False])
def test_an_untied_head_is_never_dropped(described: bool, tmp_path: Path) -> None:
    config, _ = saved("qwen3", tmp_path)
    untied = build_qwen3(config.replace(tied=False))
    (tmp_path / "model.safetensors").unlink()
    save_weights(untied, tmp_path, qwen3.keys(untied.config))  # type: ignore[arg-type]
    if not described:
        (tmp_path / "config.json").unlink()
    with pytest.raises(KeyMismatchError, match=r"lm_head\.weight differs from the embedding"):
        load_decoder(build_qwen3(config), tmp_path)
    with torch.no_grad():
        assert untied.lm_head is not None
        untied.lm_head.weight.copy_(untied.embedding.weight)
    (tmp_path / "model.safetensors").unlink()
    save_weights(untied, tmp_path, qwen3.keys(untied.config))  # type: ignore[arg-type]
    assert load_decoder(build_qwen3(config), tmp_path).ignored == ("lm_head.weight",)


def test_another_size_is_refused(tmp_path: Path) -> None:
    config: Any = component("llm", "llama-tiny").configs["llama-tiny"]
    save_weights(build_llama(config), tmp_path, llama.keys(config))
    with pytest.raises(KeyMismatchError, match="shape"):
        load_decoder(build_llama(config.replace(mlp_dim=config.mlp_dim + 2)), tmp_path)
