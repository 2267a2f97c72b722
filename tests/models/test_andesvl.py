"""AndesVL as data: published names, shapes and counts, the config both ways, other spellings, pickled weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

import vlkit
from vlkit.errors import CheckpointError, ConfigError, KeyMismatchError
from vlkit.models import andesvl
from vlkit.models.pretrained import layouts_of
from vlkit.registry import model_spec
from vlkit.testing.batches import random_batch

AIMV2: dict[str, Any] = {
    "model_type": "aimv2", "hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 24, "num_attention_heads": 8,
    "num_channels": 3, "image_size": 448, "patch_size": 14, "rms_norm_eps": 1e-5, "attention_dropout": 0.0,
    "projection_dropout": 0.0, "qkv_bias": False, "use_bias": False, "hidden_stride": 2, "window_size": 112,
    "fullatt_block_indexes": None, "temporal_patch_size": 1, "preserve_original_pe": True, "interpolate_pe_method": "two_dim",
    "disable_rope": False, "min_pixels": 3136, "max_pixels": 1960000, "torch_dtype": "bfloat16",
}  # fmt: skip
SIGLIP2: dict[str, Any] = {
    "hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12, "num_channels": 3,
    "num_patches": 1024, "patch_size": 16, "hidden_act": "gelu_pytorch_tanh", "layer_norm_eps": 1e-6,
    "attention_dropout": 0.0, "preserve_original_pe": True, "rope_theta": 10000.0,
}  # fmt: skip
QWEN3: dict[str, Any] = {
    "model_type": "qwen3", "vocab_size": 151936, "head_dim": 128, "num_key_value_heads": 8, "hidden_act": "silu",
    "max_position_embeddings": 40960, "initializer_range": 0.02, "rms_norm_eps": 1e-6, "use_cache": True, "rope_theta": 1000000,
    "rope_scaling": None, "attention_bias": False, "use_sliding_window": False, "sliding_window": None,
    "max_window_layers": 28, "attention_dropout": 0.0, "tie_word_embeddings": True, "bos_token_id": 151643,
    "eos_token_id": 151645, "torch_dtype": "bfloat16",
}  # fmt: skip
SIZES = {  # tower, decoder, tensors without a head, parameters of projector and of everything
    "0.6b": ("siglip2", (1024, 3072, 28, 16), 511, 12_587_008, 695_069_952),
    "1b": ("aimv2", (1024, 3072, 28, 16), 487, 20_976_640, 927_010_816),
    "2b": ("aimv2", (2048, 6144, 28, 16), 487, 25_171_968, 2_055_731_200),
    "4b": ("aimv2", (2560, 9728, 36, 32), 575, 27_269_632, 4_359_721_984),
}


def published(size: str) -> dict[str, Any]:
    """The config.json of a size."""
    tower, (width, mlp, layers, heads), *_ = SIZES[size]
    text = {"hidden_size": width, "intermediate_size": mlp, "num_hidden_layers": layers, "num_attention_heads": heads}
    return {
        "model_type": f"andesvl-{tower}-qwen3",
        "architectures": ["AndesVLForConditionalGeneration"],
        "auto_map": {"AutoModel": "modeling_andesvl.AndesVLForConditionalGeneration"},
        "torch_dtype": "bfloat16",
        "transformers_version": "4.52.4",
        "vision_config": dict(AIMV2 if tower == "aimv2" else SIGLIP2),
        "text_config": {**QWEN3, **text},
    }


def published_shapes(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """The key table of the published checkpoint, written out from the sizes alone."""
    v, t = config["vision_config"], config["text_config"]
    dim, mlp, patch = v["hidden_size"], v["intermediate_size"], v["patch_size"]
    shapes: dict[str, tuple[int, ...]] = {}

    def both(name: str, *shape: int) -> None:
        shapes[f"{name}.weight"], shapes[f"{name}.bias"] = shape, shape[:1]

    if config["model_type"] == "andesvl-aimv2-qwen3":
        head = "vision_encoder.preprocessor"
        both(f"{head}.patchifier.proj", dim, 3, patch, patch)
        shapes[f"{head}.patchifier.norm.weight"] = (dim,)
        shapes[f"{head}.pos_embed"] = (1, (v["image_size"] // patch) ** 2, dim)
        for n in range(v["num_hidden_layers"]):
            block = f"vision_encoder.trunk.blocks.{n}"
            shapes[f"{block}.norm_1.weight"] = shapes[f"{block}.norm_2.weight"] = (dim,)
            shapes[f"{block}.attn.qkv.weight"] = (3 * dim, dim)
            shapes[f"{block}.attn.proj.weight"] = (dim, dim)
            shapes[f"{block}.mlp.fc1.weight"] = shapes[f"{block}.mlp.fc3.weight"] = (mlp, dim)
            shapes[f"{block}.mlp.fc2.weight"] = (dim, mlp)
        shapes["vision_encoder.trunk.post_trunk_norm.weight"] = (dim,)
    else:
        head = "vision_encoder.vision_model"
        both(f"{head}.embeddings.proj", dim, 3 * patch**2)
        shapes[f"{head}.embeddings.pos_embed.weight"] = (v["num_patches"], dim)
        for n in range(v["num_hidden_layers"]):
            layer = f"{head}.encoder.layers.{n}"
            both(f"{layer}.layer_norm1", dim)
            both(f"{layer}.layer_norm2", dim)
            for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
                both(f"{layer}.self_attn.{name}", dim, dim)
            both(f"{layer}.mlp.fc1", mlp, dim)
            both(f"{layer}.mlp.fc2", dim, mlp)
        both(f"{head}.post_layernorm", dim)
    width, inner = t["hidden_size"], t["head_dim"] * t["num_attention_heads"]
    keys = t["head_dim"] * t["num_key_value_heads"]
    both("mlp.0", 4 * dim, 4 * dim)
    both("mlp.2", width, 4 * dim)
    model = "language_model.model"
    shapes[f"{model}.embed_tokens.weight"] = (t["vocab_size"], width)
    shapes[f"{model}.norm.weight"] = (width,)
    for n in range(t["num_hidden_layers"]):
        layer = f"{model}.layers.{n}"
        shapes[f"{layer}.input_layernorm.weight"] = shapes[f"{layer}.post_attention_layernorm.weight"] = (width,)
        shapes[f"{layer}.self_attn.q_proj.weight"] = (inner, width)
        shapes[f"{layer}.self_attn.k_proj.weight"] = shapes[f"{layer}.self_attn.v_proj.weight"] = (keys, width)
        shapes[f"{layer}.self_attn.o_proj.weight"] = (width, inner)
        shapes[f"{layer}.self_attn.q_norm.weight"] = shapes[f"{layer}.self_attn.k_norm.weight"] = (t["head_dim"],)
        shapes[f"{layer}.mlp.gate_proj.weight"] = shapes[f"{layer}.mlp.up_proj.weight"] = (
            t["intermediate_size"],
            width,
        )
        shapes[f"{layer}.mlp.down_proj.weight"] = (width, t["intermediate_size"])
    return shapes


@pytest.mark.parametrize("size", SIZES)
def test_published_names_and_shapes_both_ways(size: str) -> None:
    """Every tensor has a place and every parameter a tensor, and saving gives exactly those names and shapes; on meta."""
    want = published_shapes(published(size))
    assert len(want) == SIZES[size][2]
    config = andesvl.read_config(published(size))
    ours = {name: tuple(t.shape) for name, t in vlkit.create_model(config, device="meta").state_dict().items()}
    keys = andesvl.keys(config)
    assert {step.target for step in keys.plan_load(want, ours)} == set(ours)
    assert {step.target: tuple(step.shape) for step in keys.plan_save(ours)} == want


@pytest.mark.parametrize("size", SIZES)
def test_published_parameter_counts(size: str) -> None:
    """0.695, 0.927, 2.055 and 4.360 B, tied embeddings once."""
    tower, _, _, projector, total = SIZES[size]
    model = vlkit.create_model(f"andesvl-{size}", device="meta")
    encoder = {"aimv2": 309_984_256, "siglip2": 86_433_024}[tower]
    assert sum(p.numel() for p in model.vision.parameters()) == encoder
    assert sum(p.numel() for p in model.projector.parameters()) == projector
    assert model.num_parameters() == model.num_parameters(active=True) == total


@pytest.mark.parametrize("size", SIZES)
def test_config_both_ways(size: str) -> None:
    config = andesvl.read_config(published(size))
    assert config == model_spec(f"andesvl-{size}-thinking").config == model_spec(f"andesvl-{size}").config
    written = andesvl.write_config(config)
    for part in ("vision_config", "text_config"):
        for name, value in written[part].items():
            assert published(size)[part].get(name, value) == value, f"{part}.{name}"
    assert written["model_type"] == published(size)["model_type"]
    assert "image_token_id" not in written
    assert andesvl.read_config(written) == config


def test_every_size_is_registered_as_instruct_and_thinking() -> None:
    repos = {name: model_spec(name).checkpoint for name in vlkit.list_models("andesvl-[0-9]*")}
    assert len(repos) == 12
    for size in SIZES:
        for variant in ("Instruct", "Thinking"):
            repo = repos[f"andesvl-{size}-{variant.lower()}"]
            assert repo is not None
            assert repo.repo_id == f"OPPOer/AndesVL-{size.replace('.', '_').upper()}-{variant}"
        assert repos[f"andesvl-{size}"] == repos[f"andesvl-{size}-instruct"]


def changed(size: str, part: str, **fields: Any) -> dict[str, Any]:
    """The config.json with fields changed; None takes a field away."""
    hub = published(size)
    hub[part] = {name: value for name, value in {**hub[part], **fields}.items() if value is not ...}
    return hub


@pytest.mark.parametrize(
    ("size", "part", "fields", "words"),
    [
        ("1b", "vision_config", {"interpolate_pe_method": "one_dim"}, "'one_dim' is not supported, only 'two_dim'"),
        ("1b", "vision_config", {"fullatt_block_indexes": [7, 15]}, "fullatt_block_indexes"),
        ("1b", "vision_config", {"image_size": 450}, "450 makes no square table of patches of 14 pixels"),
        ("1b", "vision_config", {"qkv_bias": True}, "qkv_bias"),
        ("1b", "vision_config", {"temporal_patch_size": 2}, "temporal_patch_size"),
        ("0.6b", "vision_config", {"num_patches": 1000}, "num_patches: 1000 makes no square table"),
        ("0.6b", "vision_config", {"hidden_act": "quick_gelu"}, "hidden_act"),
        ("4b", "text_config", {"rope_scaling": {"type": "yarn", "factor": 4.0}}, "rope_scaling"),
        ("4b", "text_config", {"attention_bias": True}, "attention_bias"),
        ("4b", "text_config", {"use_sliding_window": True}, "use_sliding_window"),
        ("4b", "text_config", {"layer_types": ["full_attention", "sliding_attention"]}, "sliding_attention"),
    ],
)
def test_unsupported_values_are_refused(size: str, part: str, fields: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        andesvl.read_config(changed(size, part, **fields))


@pytest.mark.parametrize(
    ("part", "field"),
    [
        ("vision_config", name)
        for name in ("preserve_original_pe", "interpolate_pe_method", "image_size", "rms_norm_eps")
    ]
    + [("text_config", name) for name in ("rope_theta", "head_dim", "tie_word_embeddings")],
)
def test_missing_fields_are_never_filled_from_class_defaults(part: str, field: str) -> None:
    """The published class would take no table, one_dim and 224 pixels; a bare Qwen3Config another base and no tie."""
    with pytest.raises(ConfigError, match=f"missing '{field}'"):
        andesvl.read_config(changed("1b", part, **{field: ...}))


def test_what_the_small_model_leaves_to_its_code_has_the_value_of_that_code() -> None:
    fields = ("num_patches", "hidden_act", "preserve_original_pe", "rope_theta", "layer_norm_eps")
    assert andesvl.read_config(changed("0.6b", "vision_config", **dict.fromkeys(fields, ...))) == andesvl.read_config(
        published("0.6b")
    )


def test_the_base_of_the_decoder_is_read_from_both_places() -> None:
    """transformers 5 writes rope_parameters."""
    both = {"rope_type": "default", "rope_theta": 5e5}
    new = changed("1b", "text_config", rope_theta=..., rope_scaling=..., rope_parameters=both)
    assert andesvl.read_config(new).llm.theta == 5e5  # type: ignore[attr-defined]


def test_a_swapped_part_leaves_the_family() -> None:
    model = vlkit.create_model("andesvl-tiny", vision="moonvit-tiny")
    assert model.config.family is None
    with pytest.raises(ConfigError, match="AIMv2Config, found a MoonViTConfig"):
        andesvl.write_config(model.config.replace(family="andesvl"))
    with pytest.raises(ConfigError, match="cannot express"):
        andesvl.write_config(
            vlkit.create_model("andesvl-tiny", projector={"norm": "pre"}).config.replace(family="andesvl")
        )


# ---- files


def tensors(name: str) -> tuple[vlkit.VisionLanguageModel, dict[str, torch.Tensor]]:
    """A tiny model and its published tensors."""
    model = vlkit.create_model(name, dtype=torch.bfloat16)
    return model, {n: t.contiguous() for n, t in andesvl.keys(model.config).to_theirs(model.state_dict()).items()}


def folder_of(path: Path, config: vlkit.VLMConfig, state: dict[str, torch.Tensor], *, pickled: bool = False) -> Path:
    path.mkdir(exist_ok=True)
    (path / "config.json").write_text(json.dumps(andesvl.write_config(config)))
    if pickled:
        torch.save(state, path / "pytorch_model.bin")
    else:
        save_file(state, path / "model.safetensors")
    return path


def same(ours: vlkit.VisionLanguageModel, theirs: vlkit.VisionLanguageModel) -> bool:
    return all(torch.equal(tensor, theirs.state_dict()[name]) for name, tensor in ours.state_dict().items())


@pytest.mark.parametrize("name", ["andesvl-tiny", "andesvl-siglip2-tiny"])
def test_pickled_weights_are_read_only_on_request(name: str, tmp_path: Path) -> None:
    """The published repositories hold pytorch_model.bin."""
    model, state = tensors(name)
    folder = folder_of(tmp_path, model.config, state, pickled=True)
    with pytest.raises(CheckpointError, match="allow_pickle"):
        vlkit.from_pretrained(folder)
    assert same(vlkit.from_pretrained(folder, allow_pickle=True), model)


def test_the_copy_of_a_tied_head_is_dropped_and_another_head_is_not(tmp_path: Path) -> None:
    model, state = tensors("andesvl-tiny")
    head = state["language_model.model.embed_tokens.weight"].clone()
    folder = folder_of(tmp_path, model.config, {**state, "language_model.lm_head.weight": head})
    assert same(vlkit.from_pretrained(folder), model)
    folder_of(tmp_path, model.config, {**state, "language_model.lm_head.weight": head + 1})
    with pytest.raises(KeyMismatchError, match=r"language_model\.lm_head\.weight differs from the embedding"):
        vlkit.from_pretrained(folder)


SPELLINGS = {  # replacements in names
    "without vision_model.": {"vision_model.": ""},
    "patch_embedding": {"embeddings.proj": "embeddings.patch_embedding"},
    "position_embedding": {"pos_embed": "position_embedding"},
    "as a convolution": {"vision_model.": "", "embeddings.proj": "embeddings.patch_embedding"},
}


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_other_spellings_of_siglip2_are_read_and_written_again(spelling: str, tmp_path: Path) -> None:
    model, state = tensors("andesvl-siglip2-tiny")
    other = {}
    for name, tensor in state.items():
        if spelling == "as a convolution" and name.endswith("embeddings.proj.weight"):
            tensor = tensor.view(-1, 3, 4, 4)
        for before, after in SPELLINGS[spelling].items():
            name = name.replace(before, after)
        other[name] = tensor
    assert set(other) != set(state)
    loaded = vlkit.from_pretrained(folder_of(tmp_path, model.config, other))
    assert same(loaded, model)
    loaded.save_pretrained(tmp_path / "again")
    from safetensors.torch import load_file

    again = load_file(tmp_path / "again" / "model.safetensors")
    assert {name: tensor.shape for name, tensor in again.items()} == {name: t.shape for name, t in other.items()}
    assert all(torch.equal(again[name], tensor) for name, tensor in other.items())


def test_spellings_do_not_overlap() -> None:
    """Every layout reads its own names alone, whatever the patch size makes square."""
    config = model_spec("andesvl-siglip2-tiny").config
    config = config.replace(  # as wide as a patch has values
        vision=config.vision.replace(dim=48), projector=config.projector.replace(in_dim=48)
    )
    ours = {name: tuple(t.shape) for name, t in vlkit.create_model(config, device="meta").state_dict().items()}
    layouts = layouts_of(config)
    assert len(layouts) == 12
    for index, keys in enumerate(layouts):
        theirs = {step.target: step.shape for step in keys.plan_save(ours)}
        fits = [i for i, other in enumerate(layouts) if not other.compare(theirs, ours)[1].num_problems]
        assert fits == [index]


# ---- processing


def test_patches_of_the_familys_own_processor_come_in_blocks() -> None:
    """model.pack puts them into raster order: the same logits as a batch that was in raster order from the start."""
    model = vlkit.create_model("andesvl-tiny").eval()
    batch = random_batch(model, [(5, [(1, 2), (3, 2)])], labels=False)
    assert batch.patches is not None
    blocks = [
        image.view(h // 2, 2, w // 2, 2, -1).transpose(1, 2).flatten(0, 3)
        for image, (_, h, w) in zip(batch.patches.unpack(), batch.patches.layout.grids or (), strict=True)
    ]
    grids = torch.tensor([grid[1:] for grid in batch.patches.layout.grids or ()])
    ids = batch.ids.tokens[None]
    # The authors' training code marks images by flags, and writes the end of text where their tokens will stand.
    flags = ids == model.config.image_token_id
    flagged = {"input_ids": ids.masked_fill(flags, model.config.stop_ids[0]), "image_flags": flags.long()}
    for given in ({"input_ids": ids}, flagged):
        packed = model.pack(**given, pixel_values=torch.cat(blocks), image_grid_hw=grids)
        with torch.no_grad():
            assert torch.equal(model(packed).logits.tokens, model(batch).logits.tokens)


def test_a_prompt_is_written_as_the_published_chat_writes_it() -> None:
    """One marker before and after the image, no default system turn, one assistant header, and "<think>" if asked for."""
    spec = model_spec("andesvl-tiny")
    processor = vlkit.Processor(spec.processor)
    from PIL import Image

    picture = Image.new("RGB", (8, 8), (255, 0, 0))
    batch = processor(
        [{"role": "user", "content": [{"type": "image", "image": picture}, {"type": "text", "text": "What?"}]}],
        add_generation_prompt=True,
    )
    special = processor.tokenizer.special
    text = processor.decode(batch.ids.tokens.tolist(), skip_special=False)
    tokens = 4  # raised to the least of 2 x 2
    assert text == (
        "<|im_start|>user\n<img>" + "<|vision_pad|>" * tokens + "</img>What?<|im_end|>\n<|im_start|>assistant\n"
    )
    assert special["<|vision_pad|>"] == spec.config.image_token_id
    asked = [{"role": "user", "content": "Why?"}]
    thinking = processor.decode(processor(asked, thinking=True).ids.tokens.tolist(), skip_special=False)
    plain = processor.decode(processor(asked, thinking=False).ids.tokens.tolist(), skip_special=False)
    assert (thinking, plain) == (plain + "<think>", "<|im_start|>user\nWhy?<|im_end|>\n<|im_start|>assistant\n")


@pytest.mark.parametrize("size", ["0.6b", "4b"])
def test_the_files_of_a_repository_give_the_processor_of_the_registered_model(size: str, tmp_path: Path) -> None:
    """Of preprocessor_config.json only mean and std count; its limits are read by nothing in the published code either."""
    from vlkit.processing.hub_files import processor_config

    spec = model_spec(f"andesvl-{size}").processor
    preprocessor = {
        "image_processor_type": "CLIPImageProcessor", "image_mean": spec.image.mean, "image_std": spec.image.std,
        "do_resize": False, "do_center_crop": False, "min_pixels": 200704, "max_pixels": 2408448, "hidden_stride": 2,
        "patch_size": 14,
    }  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(published(size)))
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(preprocessor))
    found = processor_config(tmp_path)
    assert (found.image, found.chat, found.tokenizer) == (spec.image, spec.chat, spec.tokenizer)


@pytest.mark.parametrize(
    ("size", "sides", "tokens"),
    [
        ("1b", (560, 560), 400), ("1b", (640, 480), 414), ("1b", (1920, 1080), 2691), ("1b", (28, 28), 4),
        ("1b", (5000, 20), 149), ("0.6b", (512, 512), 256), ("0.6b", (20, 20), 4), ("0.6b", (640, 480), 300),
    ],
)  # fmt: skip
def test_image_tokens(size: str, sides: tuple[int, int], tokens: int) -> None:
    """Width and height in pixels; the AIMv2 rows were made by the authors' evaluation code."""
    rule = model_spec(f"andesvl-{size}").processor.image
    width, height = sides
    assert rule.num_tokens(rule.target_size(height, width).grid) == tokens
