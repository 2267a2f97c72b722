"""Qwen-VL as a whole: published names, shapes and counts, the config both ways, what is refused, and models tuned from it."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

import vlkit
from tests.models.qwen_vl_files import ODD, VISUAL, conversations, folder_of, published_shapes, random_weights
from vlkit.errors import ConfigError, KeyMismatchError, PlaceholderMismatchError, UnknownFieldWarning
from vlkit.llm.qwen import QwenConfig
from vlkit.models import VLMConfig, qwen_vl
from vlkit.projectors.resampler import ResamplerConfig
from vlkit.registry import model_spec
from vlkit.vision.openclip_vit import OpenCLIPViTConfig

PUBLISHED: dict[str, Any] = {
    "architectures": ["QWenLMHeadModel"], "attn_dropout_prob": 0.0,
    "auto_map": {
        "AutoConfig": "configuration_qwen.QWenConfig", "AutoModelForCausalLM": "modeling_qwen.QWenLMHeadModel",
    },
    "bf16": False, "emb_dropout_prob": 0.0, "fp16": False, "fp32": False, "hidden_size": 4096, "initializer_range": 0.02,
    "intermediate_size": 22016, "kv_channels": 128, "layer_norm_epsilon": 1e-06, "max_position_embeddings": 8192,
    "model_type": "qwen", "no_bias": True, "num_attention_heads": 32, "num_hidden_layers": 32, "onnx_safe": None,
    "rotary_emb_base": 10000, "rotary_pct": 1.0, "scale_attn_weights": True, "seq_length": 2048,
    "tie_word_embeddings": False, "tokenizer_type": "QWenTokenizer", "torch_dtype": "bfloat16",
    "transformers_version": "4.31.0", "use_cache": True, "use_dynamic_ntk": True, "use_flash_attn": False,
    "use_logn_attn": True,
    "visual": {
        "heads": 16, "image_size": 448, "image_start_id": 151857, "layers": 48, "mlp_ratio": 4.9231, "output_dim": 4096,
        "patch_size": 14, "width": 1664,
    },
    "vocab_size": 151936,
}  # fmt: skip


def changed(part: str | None = None, **fields: Any) -> dict[str, Any]:
    config = json.loads(json.dumps(PUBLISHED))
    (config if part is None else config[part]).update(fields)
    return config


def test_published_names_and_shapes_both_ways() -> None:
    """All 853 tensors of the checkpoint have a place, and saving gives exactly those names and shapes; on meta."""
    config = qwen_vl.read_config(PUBLISHED)
    want = published_shapes(PUBLISHED)
    assert len(want) == 853
    assert sum(math.prod(shape) for shape in want.values()) == 9_656_935_168
    assert 2 * 9_656_935_168 == 19_313_870_336  # bytes, as the published index says
    model = vlkit.create_model(config, device="meta")
    ours = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    keys = qwen_vl.keys(config)
    assert {step.target for step in keys.plan_load(want, ours)} == set(ours)
    assert {step.target: tuple(step.shape) for step in keys.plan_save(ours)} == want


def test_published_parameter_counts() -> None:
    """The figures of the visual part, the resampler and the decoder; the fixed positions count, as in the checkpoint."""
    model = vlkit.create_model("qwen-vl-chat", device="meta")
    assert model.num_parameters() == 9_656_935_168
    assert sum(p.numel() for p in model.vision.parameters()) == 1_842_770_688
    assert sum(p.numel() for p in model.projector.parameters()) == 76_054_528 + 16_785_408
    assert sum(p.numel() for p in model.llm.parameters()) == 7_721_324_544
    frozen = [name for name, p in model.named_parameters() if not p.requires_grad]
    assert frozen == ["projector.positions.table"]
    assert model_spec("qwen-vl").config == model.config


def test_config_both_ways() -> None:
    config = qwen_vl.read_config(PUBLISHED)
    assert config == model_spec("qwen-vl-chat").config
    assert config.llm.mlp_dim == 11008  # type: ignore[attr-defined]
    assert config.image_token_id == 151859
    assert config.stop_ids == (151645, 151644, 151643)
    written = qwen_vl.write_config(config)
    for name, value in written.items():
        assert PUBLISHED[name] == value, name
    tiny = model_spec("qwen-vl-tiny").config
    assert qwen_vl.read_config(qwen_vl.write_config(tiny)) == tiny


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({k: v for k, v in PUBLISHED.items() if k != "visual"}, "has no 'visual': a Qwen that reads text only"),
        (changed(quantization_config={"bits": 4, "quant_method": "gptq"}), "quantised .gptq.*unquantised repository"),
        (changed(no_bias=False), "no_bias"),
        (changed(rotary_pct=0.25), "rotary_pct"),
        (changed(scale_attn_weights=False), "scale_attn_weights"),
        (changed(intermediate_size=22017), "intermediate_size: expected an even number, found 22017"),
        (changed(kv_channels=64), "kv_channels=64 are not hidden_size=4096"),
        (changed("visual", output_dim=4000), "output_dim: 4000 is not a multiple of 128"),
        (changed("visual", output_dim=2048), "the projector gives 2048 channels but the decoder is 4096 wide"),
        ({k: v for k, v in PUBLISHED.items() if k != "seq_length"}, "missing 'seq_length'"),
        (changed(seq_length="2048"), "trained_length: .*'2048'"),
        (changed(visual="bigG"), "config.json.visual: expected a JSON object"),
        (changed("visual", width="1664"), "visual.width: expected a whole number of at least 1, found '1664'"),
        (changed("visual", width=True), "visual.width: .*found True"),
        (changed("visual", mlp_ratio=float("nan")), "visual.mlp_ratio: expected a number above 0, found nan"),
        (changed("visual", output_dim=None), "visual.output_dim: .*found None"),
        (changed("visual", image_start_id=-1), "visual.image_start_id: .*found -1"),
        (changed("visual", n_queries=250), "num_queries=250 is not a square number"),
        (changed(eos_token_id="151643"), "stop_ids"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_config_that_would_be_misread_is_refused(config: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        qwen_vl.read_config(config)


def test_unknown_fields_are_named() -> None:
    with pytest.warns(UnknownFieldWarning, match="config.json.visual: .*pool"):
        qwen_vl.read_config(changed("visual", pool="max"))
    with pytest.warns(UnknownFieldWarning, match="config.json: .*sliding"):
        qwen_vl.read_config(changed(sliding=3))


@pytest.mark.parametrize(
    "config",
    [
        VLMConfig(
            vision=OpenCLIPViTConfig(position_grid=(4, 4)), projector=ResamplerConfig(), llm=QwenConfig(),
            image_token_id=151859, family="qwen-vl",
        ),
        VLMConfig(
            vision=OpenCLIPViTConfig(), projector=ResamplerConfig(num_heads=16), llm=QwenConfig(), image_token_id=151859,
            family="qwen-vl",
        ),
        VLMConfig(
            vision=OpenCLIPViTConfig(), projector=ResamplerConfig(), llm=QwenConfig(head_dim=64), image_token_id=151859,
            family="qwen-vl",
        ),
        VLMConfig(
            vision=OpenCLIPViTConfig(), projector=ResamplerConfig(), llm=QwenConfig(norm_eps=1e-5), image_token_id=1,
            family="qwen-vl",
        ),
    ],
    ids=["table", "resampler heads", "decoder heads", "image token"],
)  # fmt: skip
def test_a_model_that_the_layout_cannot_express_is_refused(config: VLMConfig) -> None:
    with pytest.raises(ConfigError, match="Qwen-VL's layout cannot express"):
        qwen_vl.write_config(config)


def test_another_composition_is_refused() -> None:
    config = model_spec("moonvit-qwen3-tiny").config.replace(family="qwen-vl")
    with pytest.raises(ConfigError, match="holds an OpenCLIP tower, a resampler and a Qwen decoder"):
        qwen_vl.write_config(config)


def test_a_model_tuned_from_it_loads(tmp_path: Path) -> None:
    """A folder as its fine-tuning script leaves it, and so MobileVLM's: caching off, where it came from, one id that ends text,
    and a rotary buffer that old versions of the code stored."""
    weights = random_weights(ODD) | {"transformer.rotary_emb.inv_freq": torch.ones(16)}
    config = {**ODD, "_name_or_path": "checkpoints/Qwen-VL-Chat", "use_cache": False, "eos_token_id": 143}
    config |= {"use_cache_quantization": False, "use_cache_kernel": False, "softmax_in_fp32": False}
    model = vlkit.from_pretrained(folder_of(tmp_path / "tuned", config, weights))
    assert model.config.family == "qwen-vl"
    assert model.config.stop_ids == (143,)
    assert torch.equal(model.projector.out.weight, weights[f"{VISUAL}proj"].T)
    assert torch.equal(model.llm.blocks[2].mlp.gate.weight, weights["transformer.h.2.mlp.w2.weight"])


def test_quantised_weights_are_refused(tmp_path: Path) -> None:
    """By the config; and by their names, where a config does not say so."""
    weights = random_weights(ODD)
    int4 = {**ODD, "quantization_config": {"quant_method": "gptq", "bits": 4}}
    with pytest.raises(ConfigError, match=r"the weights are quantised .gptq"):
        vlkit.from_pretrained(folder_of(tmp_path / "said", int4, weights))
    weights["transformer.h.0.mlp.w1.qweight"] = weights.pop("transformer.h.0.mlp.w1.weight").to(torch.int32)
    with pytest.raises(KeyMismatchError, match=r"w1\.qweight"):
        vlkit.from_pretrained(folder_of(tmp_path / "unsaid", ODD, weights))


def test_slots_hold_the_image_whatever_they_say() -> None:
    """Paths of images in the slots change nothing, and become the placeholder."""
    config = qwen_vl.read_config(ODD)
    model = vlkit.create_model(config, device="meta")
    ids = conversations()[0][0]
    start = ODD["visual"]["image_start_id"]
    batch = model.pack(input_ids=torch.tensor([ids]), pixel_values=torch.zeros(2, 3, 12, 18))
    assert batch.patches is not None
    assert batch.patches.layout.grids == ((1, 2, 3), (1, 2, 3))
    tokens = batch.ids.tokens
    assert int((tokens == start + 2).sum()) == 512
    assert [int((tokens == mark).sum()) for mark in (start, start + 1)] == [2, 2]
    outside = [i for i, token in enumerate(tokens.tolist()) if token != start + 2]
    assert [ids[i] for i in outside] == tokens[outside].tolist()
    with pytest.raises(PlaceholderMismatchError, match="do not come in pairs"):
        model.pack(input_ids=torch.tensor([ids[:100]]), pixel_values=torch.zeros(1, 3, 12, 12))


def test_one_slot_less_is_named() -> None:
    """255 slots, as a tokenizer without one of them would write, are an error and not a shifted image."""
    model = vlkit.create_model("qwen-vl-tiny")
    start = model.config.image_token_id - 2
    ids = torch.tensor([[7, start, start + 2, 65, start + 2, start + 1, 8]])
    batch = model.pack(input_ids=ids, pixel_values=torch.zeros(1, 3, 8, 8))
    with pytest.raises(
        PlaceholderMismatchError, match="image 0: the text has 3 placeholders but the image gives 4 tokens"
    ):
        model(batch)


def test_visual_names_lie_inside_the_decoders() -> None:
    shapes = published_shapes(PUBLISHED)
    assert sum(name.startswith(VISUAL) for name in shapes) == 853 - (32 * 8 + 3)
    assert f"{VISUAL}transformer.resblocks.47.mlp.c_proj.bias" in shapes
