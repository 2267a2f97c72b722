"""A real language model: SmolLM2-135M-Instruct's weights give its known answers and perplexity."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch

from tests.assets import asset
from tests.gguf import read_gguf
from tests.text_model import TextModel, batch_of
from vlkit.generation import generate
from vlkit.llm.decoder import Decoder
from vlkit.llm.llama import LlamaConfig, build_llama, keys
from vlkit.packing import Layout, Packed

tokenizers = pytest.importorskip("tokenizers")
pytestmark = pytest.mark.slow  # 135 million real weights


def half_split(rows: np.ndarray, heads: int) -> np.ndarray:
    """Rows of q or k, which the file has in the order of an interleaved rotation, in the order of the published names."""
    return rows.reshape(heads, rows.shape[0] // heads // 2, 2, -1).swapaxes(1, 2).reshape(rows.shape)


def published(tensors: dict[str, np.ndarray], config: LlamaConfig) -> dict[str, torch.Tensor]:
    """The weights under the names of the checkpoint that the file was made from."""
    names = {
        "attn_norm": "input_layernorm",
        "attn_q": "self_attn.q_proj",
        "attn_k": "self_attn.k_proj",
        "attn_v": "self_attn.v_proj",
        "attn_output": "self_attn.o_proj",
        "ffn_norm": "post_attention_layernorm",
        "ffn_gate": "mlp.gate_proj",
        "ffn_up": "mlp.up_proj",
        "ffn_down": "mlp.down_proj",
        "token_embd": "embed_tokens",
        "output_norm": "norm",
    }
    made = {}
    for name, tensor in tensors.items():
        *layer, part, kind = name.split(".")
        if part in ("attn_q", "attn_k"):
            tensor = half_split(tensor, config.num_heads if part == "attn_q" else config.num_kv_heads)
        prefix = f"layers.{layer[1]}." if layer else ""
        made[f"model.{prefix}{names[part]}.{kind}"] = torch.from_numpy(np.ascontiguousarray(tensor))
    return made


@pytest.fixture(scope="module")
def smollm2() -> tuple[Decoder, Any]:
    """The decoder, built from the sizes that the file states, and its tokenizer."""
    facts, tensors = read_gguf(asset("smollm2-135m-instruct.gguf"))
    config = LlamaConfig(
        vocab_size=tensors["token_embd.weight"].shape[0],
        dim=facts["llama.embedding_length"],
        num_layers=facts["llama.block_count"],
        num_heads=facts["llama.attention.head_count"],
        num_kv_heads=facts["llama.attention.head_count_kv"],
        head_dim=facts["llama.rope.dimension_count"],
        mlp_dim=facts["llama.feed_forward_length"],
        theta=facts["llama.rope.freq_base"],
        max_positions=facts["llama.context_length"],
        norm_eps=float(f"{facts['llama.attention.layer_norm_rms_epsilon']:.6g}"),  # stored in fp32
        tied="output.weight" not in tensors,
    )
    assert config == LlamaConfig()
    with torch.device("meta"):
        model = build_llama(config)
    model.load_state_dict(keys(config).to_ours(published(tensors, config)), assign=True)
    vocabulary = {token: row for row, token in enumerate(facts["tokenizer.ggml.tokens"])}
    merges = [tuple(merge.split(" ")) for merge in facts["tokenizer.ggml.merges"]]
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(vocabulary, merges))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Sequence(
        [
            tokenizers.pre_tokenizers.Digits(individual_digits=True),
            tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    return model.eval(), tokenizer


def test_size(smollm2: tuple[Decoder, Any]) -> None:
    model, tokenizer = smollm2
    assert sum(p.numel() for p in model.parameters()) == 134_515_008
    assert tokenizer.encode("Hello, world! 12345").ids == [19556, 28, 905, 17, 216, 33, 34, 35, 36, 37]


def test_it_knows_the_capital_of_france(smollm2: tuple[Decoder, Any]) -> None:
    """Two prompts of unequal length in one batch; the answer to one does not depend on the other."""
    model, tokenizer = smollm2
    prompts = [tokenizer.encode(text).ids for text in ("The capital of France is", "One, two, three, four,")]
    batch = batch_of([torch.tensor(prompt) for prompt in prompts])
    answers = generate(TextModel(model), batch, max_new_tokens=2)
    assert [tokenizer.decode(answer) for answer in answers] == [" Paris.", " five,"]


def test_perplexity_of_plain_english(smollm2: tuple[Decoder, Any]) -> None:
    """Measured elsewhere with the same weights: 7.36. With q and k left in the order of the file it is 407."""
    model, tokenizer = smollm2
    text = asset("gentelella-README.md").read_text(encoding="utf-8")
    ids = torch.tensor(tokenizer.encode(text).ids[:512])
    with torch.no_grad():
        logits = model.head(model(Packed(model.embed(ids), Layout((512,)))).hidden.tokens)
    perplexity = math.exp(torch.nn.functional.cross_entropy(logits[:-1], ids[1:]))
    assert perplexity == pytest.approx(7.36, abs=0.005)
