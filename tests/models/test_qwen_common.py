"""Qwen2-VL, Qwen2.5-VL and Qwen3-VL: published names, shapes and counts of every size, and config.json in all its forms."""

from __future__ import annotations

import json
import math
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

import vlkit
from tests.models.qwen_files import FLAT, SIZES, published_config, published_shapes
from vlkit.errors import ConfigError, KeyMismatchError, UnknownFieldWarning
from vlkit.hub.keymap import choose_keymap
from vlkit.models import VLMConfig
from vlkit.models.pretrained import layouts_of
from vlkit.processing.hub_files import processor_config
from vlkit.registry import families, model_spec

FAMILIES = {"qwen2-vl": "qwen2-vl-2b", "qwen2.5-vl": "qwen2.5-vl-7b", "qwen3-vl": "qwen3-vl-4b",
            "qwen3-vl-moe": "qwen3-vl-30b-a3b"}  # fmt: skip


def read(hub: dict[str, Any]) -> VLMConfig:
    (family,) = (f for f in families().values() if hub["model_type"] in f.model_types)
    return family.read_config(hub)


# Names, shapes and counts.


@pytest.mark.parametrize("name", SIZES)
def test_the_tables_have_the_published_totals(name: str) -> None:
    shapes = published_shapes(name)
    assert len(shapes) + SIZES[name].tied == SIZES[name].keys
    assert sum(map(math.prod, shapes.values())) == SIZES[name].parameters


@pytest.mark.parametrize("name", SIZES)
def test_published_names_shapes_and_counts(name: str) -> None:
    """Every tensor has a place in either layout, and saving gives exactly those names and shapes; on meta."""
    spec, size = model_spec(name), SIZES[name]
    model = vlkit.create_model(name, device="meta")
    num, top, wide = size.experts or (0, 0, 0)
    unused = (num - top) * 3 * wide * size.dim * size.layers
    assert model.num_parameters() == spec.num_parameters == size.parameters
    assert model.num_parameters(active=True) == spec.num_active_parameters == size.parameters - unused
    ours = {key: tuple(tensor.shape) for key, tensor in model.state_dict().items()}
    layouts = layouts_of(model.config)
    for number, layout in enumerate(("published", "transformers")[: len(layouts)]):
        want = published_shapes(name, layout=layout)
        chosen = choose_keymap(layouts, want, ours)
        assert chosen.index == number
        assert {step.target for step in chosen.steps} == set(ours)
        assert {step.target: step.shape for step in layouts[number].plan_save(ours)} == want


# Forms of config.json.


@pytest.mark.parametrize("name", SIZES)
def test_published_config_both_ways(name: str) -> None:
    hub = published_config(name)
    config = read(hub)
    assert config == model_spec(name).config
    written = families()[SIZES[name].family].write_config(config)
    assert read(written) == config
    for part in ("text_config", "vision_config"):
        for field, value in written.get(part, {}).items():
            if field in hub[part]:
                assert hub[part][field] == value, f"{part}.{field}"


def transformers_5(hub: dict[str, Any]) -> dict[str, Any]:
    """The form that transformers 5 writes."""
    model_type, flat = hub["model_type"], "text_config" not in hub
    text = dict(hub if flat else hub["text_config"])
    scaling = text.pop("rope_scaling")
    scaling = {"rope_type": "default", **scaling, "rope_theta": text.pop("rope_theta")}
    for field in ("vision_config", "architectures", "tie_word_embeddings", "transformers_version", "torch_dtype"):
        text.pop(field, None)
    text |= {"model_type": f"{model_type}_text", "rope_parameters": scaling, "layer_types": ["full_attention"]}
    if "num_experts" in text:
        text |= {
            "num_local_experts": text.pop("num_experts"),
            "tie_word_embeddings": True,
            "router_aux_loss_coef": 0.001,
        }
    axial = {"rope_theta": 10000.0, "rope_type": "axial"}
    vision = {**hub["vision_config"], "model_type": f"{model_type}_vision", "rope_parameters": axial, "in_channels": 3}
    kept = ("model_type", "architectures", "tie_word_embeddings", "image_token_id", "video_token_id",
            "vision_start_token_id", "vision_end_token_id")  # fmt: skip
    top = {field: hub[field] for field in kept}
    return {**top, "dtype": "bfloat16", "text_config": text, "vision_config": vision}


def late_transformers_4(hub: dict[str, Any]) -> dict[str, Any]:
    """What releases from 4.52 wrote of a flat file: text_config, and copies of its fields at the top."""
    text = {k: v for k, v in hub.items() if k not in ("vision_config", "architectures", "transformers_version")}
    rope = {"type": "default", "rope_type": "default", "mrope_section": [16, 24, 24]}
    text |= {"model_type": f"{hub['model_type']}_text", "rope_scaling": rope, "image_token_id": None}
    top = {k: v for k, v in hub.items() if k != "tie_word_embeddings"}
    return {**top, "rope_scaling": rope, "text_config": text}


@pytest.mark.parametrize("name", SIZES)
def test_the_forms_of_transformers_5_mean_the_same(name: str) -> None:
    hub = transformers_5(published_config(name))
    assert "rope_theta" not in hub["text_config"]
    assert read(hub) == model_spec(name).config


@pytest.mark.parametrize("name", [name for name, size in SIZES.items() if size.family in FLAT])
def test_copies_at_the_top_do_not_count_beside_text_config(name: str) -> None:
    """With it went the tie of the head, which is then found inside."""
    hub = late_transformers_4(published_config(name))
    assert read({**hub, "hidden_size": 7, "num_hidden_layers": 7}) == model_spec(name).config


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("inside", [True, False, None])
@pytest.mark.parametrize("top", [True, False, None])
def test_which_flag_ties_the_head(family: str, top: bool | None, inside: bool | None) -> None:
    """Of Qwen2-VL and Qwen2.5-VL either place counts; of Qwen3-VL only the top."""
    hub = transformers_5(published_config(FAMILIES[family]))
    for values, flag in ((hub, top), (hub["text_config"], inside)):
        values.pop("tie_word_embeddings", None)
        if flag is not None:
            values["tie_word_embeddings"] = flag
    want = bool(top) or (family in FLAT and bool(inside))
    assert read(hub).llm.tied is want  # type: ignore[attr-defined]


@pytest.mark.parametrize("name", [name for name, size in SIZES.items() if size.family in FLAT])
def test_towers_that_are_written_as_differences_from_a_class(name: str) -> None:
    """What transformers 4.45 to 4.51 wrote of the tower when a fine-tune was saved, such as UI-TARS."""
    hub = published_config(name)
    kept = {"in_chans": 3, "spatial_patch_size": 14, "model_type": hub["model_type"]}
    defaults = {
        "qwen2-vl": {"hidden_size": 3584},
        "qwen2.5-vl": {"intermediate_size": 3420, "out_hidden_size": 3584, "hidden_size": 3584, "tokens_per_second": 4},
    }[SIZES[name].family]
    for field, default in defaults.items():
        if hub["vision_config"][field] != default:
            kept[field] = hub["vision_config"][field]
    rope = {"type": "default", "rope_type": "default", "mrope_section": [16, 24, 24]}
    assert read({**hub, "vision_config": kept, "rope_scaling": rope}) == model_spec(name).config


def test_clock_of_videos() -> None:
    hub = published_config("qwen2.5-vl-7b")
    assert read(hub).ticks_per_second == 2
    del hub["vision_config"]["tokens_per_second"]
    assert read(hub).ticks_per_second == 4  # what transformers counts where the file is silent


def test_stop_ids() -> None:
    hub = published_config("qwen2-vl-2b")
    assert read(hub).stop_ids == (151645, 151643)
    assert read({**hub, "eos_token_id": 151658}).stop_ids == (151658,)
    assert read({**hub, "eos_token_id": [3, 151643]}).stop_ids == (3, 151643)
    del hub["eos_token_id"]
    assert read(hub).stop_ids == (151645, 151643)


@pytest.mark.parametrize("family", FAMILIES)
def test_ids_of_another_vocabulary_are_none(family: str) -> None:
    """The defaults of transformers' classes beside a small vocabulary: ids that never come."""
    hub = transformers_5(published_config(FAMILIES[family]))
    hub["text_config"]["vocab_size"] = 400
    with pytest.raises(ConfigError, match="image_token_id: 151655 lies outside the vocabulary of 400"):
        read(hub)
    config = read({**hub, "image_token_id": 399})
    assert (config.video_token_id, config.vision_marks, config.stop_ids) == (None, None, ())
    assert read(families()[family].write_config(config)) == config


@pytest.mark.parametrize(
    ("name", "part", "field", "value", "words"),
    [
        ("qwen2-vl-2b", None, "rope_scaling", {"type": "yarn", "factor": 4.0, "mrope_section": [16, 24, 24]}, "'yarn' is not"),
        ("qwen2-vl-2b", None, "rope_scaling", {"type": "mrope"}, "missing 'mrope_section'"),
        ("qwen2-vl-2b", None, "rope_scaling", None, "rope_scaling: expected a JSON object"),
        ("qwen2-vl-2b", None, "rope_scaling", {"type": "mrope", "mrope_section": [16, 24]}, "expected 3 values"),
        ("qwen2-vl-2b", None, "rope_scaling", {"type": "mrope", "mrope_section": [16, 24, 20]}, "sum to 60"),
        ("qwen2-vl-2b", None, "rope_scaling", {"mrope_section": [16, 24, 24], "mrope_interleaved": True}, "interleaved"),
        ("qwen2-vl-2b", None, "use_sliding_window", True, "use_sliding_window: True is not supported"),
        ("qwen2-vl-2b", None, "layer_types", ["full_attention", "sliding_attention"], "sliding_attention"),
        ("qwen2-vl-2b", None, "hidden_size", 1536.0, "expected int"),
        ("qwen2-vl-2b", "vision_config", "hidden_size", 1280, "1280 is not supported, only 1536"),
        ("qwen2-vl-2b", "vision_config", "hidden_act", "gelu", "only 'quick_gelu'"),
        ("qwen2-vl-2b", "vision_config", "in_chans", 1, "in_chans: 1 is not supported"),
        ("qwen2.5-vl-3b", "vision_config", "fullatt_block_indexes", [7, 32], "32"),
        ("qwen3-vl-4b", "vision_config", "num_position_embeddings", 2305, "2305 cells make no square table"),
        ("qwen3-vl-4b", "vision_config", "deepstack_visual_indexes", [5, 11, 24], "24"),
        ("qwen3-vl-4b", "text_config", "attention_bias", True, "attention_bias"),
        ("qwen3-vl-4b", "text_config", "rope_scaling",
         {"rope_type": "default", "mrope_section": [24, 20, 20], "mrope_interleaved": False}, "False is not supported"),
        ("qwen3-vl-30b-a3b", "text_config", "decoder_sparse_step", 2, "decoder_sparse_step: 2"),
        ("qwen3-vl-30b-a3b", "text_config", "mlp_only_layers", [0], "mlp_only_layers"),
        ("qwen3-vl-30b-a3b", "text_config", "norm_topk_prob", False, "norm_topk_prob"),
    ],
)  # fmt: skip
def test_unsupported_values_are_refused(name: str, part: str | None, field: str, value: Any, words: str) -> None:
    hub = published_config(name)
    (hub if part is None else hub[part])[field] = value
    with pytest.raises(ConfigError, match=words):
        read(hub)


@pytest.mark.parametrize("field", ["rms_norm_eps", "rope_theta", "num_key_value_heads", "max_position_embeddings"])
@pytest.mark.parametrize("name", FAMILIES.values())
def test_missing_fields_are_never_filled_from_class_defaults(name: str, field: str) -> None:
    hub = published_config(name)
    del hub.get("text_config", hub)[field]
    with pytest.raises(ConfigError, match=f"missing '{field}'"):
        read(hub)


@pytest.mark.parametrize("value", [None, "x", -1, 0, 10**30, 1e300, True, [], [[1]], {}, {"a": 1}], ids=str)
@pytest.mark.parametrize("name", FAMILIES.values())
def test_whatever_a_field_holds_is_read_or_refused(name: str, value: Any) -> None:
    """Never another error, and never a config that cannot be written again."""
    for form in (published_config, lambda name: transformers_5(published_config(name))):
        parts = [
            (path, field) for path in ((), ("text_config",), ("vision_config",)) for field in part_of(form(name), path)
        ]
        for path, field in parts:
            hub = form(name)
            part_of(hub, path)[field] = value
            if path == () and field == "model_type":
                continue  # chooses the family
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", UnknownFieldWarning)
                try:
                    config = read(hub)
                except ConfigError:
                    continue
                assert read(families()[SIZES[name].family].write_config(config)) == config, f"{path} {field}"


def part_of(hub: dict[str, Any], path: tuple[str, ...]) -> dict[str, Any]:
    for name in path:
        hub = hub.get(name, {})
    return hub


def test_unknown_fields_are_named() -> None:
    hub = published_config("qwen2-vl-2b")
    with pytest.warns(UnknownFieldWarning, match="without an effect in vlkit: skip_layer_mlp"):
        read({**hub, "skip_layer_mlp": [27, 5]})


def test_fine_tunes_for_screens_have_the_layout_of_their_base() -> None:
    """Aguvis: Qwen2-VL with two more tokens, its padded table cut to the vocabulary, answers that end with one of them."""
    hub = published_config("qwen2-vl-7b")
    aguvis = read({**hub, "vocab_size": 151659, "eos_token_id": 151658, "_name_or_path": "Qwen/Qwen2-VL-7B-Instruct"})
    base = model_spec("qwen2-vl-7b").config
    assert aguvis == base.replace(llm=base.llm.replace(vocab_size=151659), stop_ids=(151658,))
    assert families()["qwen2-vl"].write_config(aguvis)["eos_token_id"] == [151658]


@pytest.mark.parametrize("name", FAMILIES.values())
def test_registered_processors_are_those_of_the_published_files(name: str, tmp_path: Path) -> None:
    third = name.startswith("qwen3")
    images = {
        "image_processor_type": "Qwen2VLImageProcessorFast" if third else "Qwen2VLImageProcessor",
        "patch_size": 16 if third else 14, "merge_size": 2, "temporal_patch_size": 2,
        "image_mean": [0.5] * 3 if third else [0.48145466, 0.4578275, 0.40821073],
        "image_std": [0.5] * 3 if third else [0.26862954, 0.26130258, 0.27577711],
        **({"size": {"shortest_edge": 65536, "longest_edge": 16777216}} if third
           else {"min_pixels": 3136, "max_pixels": 12845056}),
    }  # fmt: skip
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(images))
    (tmp_path / "config.json").write_text(json.dumps(published_config(name)))
    found, want = processor_config(tmp_path), model_spec(name).processor
    assert (found.chat, found.image, found.video) == (want.chat, want.image, want.video)


# Saving what the layouts cannot hold.


@pytest.mark.parametrize("family", FAMILIES)
def test_what_a_layout_cannot_express_is_refused(family: str) -> None:
    config = model_spec(f"{family}-tiny").config
    write = families()[family].write_config
    assert read(write(config)) == config

    with pytest.raises(ConfigError, match="cannot express vision"):
        write(config.replace(vision=config.vision.replace(norm_eps=1e-5)))
    with pytest.raises(ConfigError, match="cannot express projector"):
        write(config.replace(projector=config.projector.replace(norm_eps=1e-5)))
    other = model_spec("qwen2-vl-tiny" if "3" in family else "qwen3-vl-tiny").config.llm
    with pytest.raises(ConfigError, match=f"holds a Qwen.Config, found a {type(other).__name__}"):
        write(config.replace(llm=other, projector=config.projector.replace(out_dim=other.dim)))


def test_a_decoder_with_experts_belongs_to_another_family_than_one_without() -> None:
    dense, sparse = (model_spec(f"{name}-tiny").config for name in ("qwen3-vl", "qwen3-vl-moe"))
    for config, other in ((dense, "qwen3-vl-moe"), (sparse, "qwen3-vl")):
        with pytest.raises(ConfigError, match=f"set family='{config.family}'"):
            families()[other].write_config(config.replace(family=other))


# Names of the weights.


@pytest.mark.parametrize("name", FAMILIES.values())
def test_stale_buffers_are_ignored_and_strange_tensors_are_not(name: str) -> None:
    model = vlkit.create_model(name, device="meta")
    ours = {key: tuple(tensor.shape) for key, tensor in model.state_dict().items()}
    keys, theirs = layouts_of(model.config)[0], published_shapes(name)
    visual, text = ("visual.", "model.") if SIZES[name].family in FLAT else ("model.visual.", "model.language_model.")
    stale = {
        f"{visual}rotary_pos_emb.inv_freq": (20,),
        f"{text}rotary_emb.inv_freq": (64,),
        f"{text}layers.3.self_attn.rotary_emb.inv_freq": (64,),
    }
    assert {step.target for step in keys.plan_load({**theirs, **stale}, ours)} == set(ours)
    for strange in (f"{visual}merger.extra.weight", f"{text}layers.0.self_attn.q_proj.lora_A.weight"):
        with pytest.raises(KeyMismatchError, match="extra" if "extra" in strange else "lora_A"):
            keys.plan_load({**theirs, strange: (4, 4)}, ours)


@pytest.mark.parametrize(("dim", "expert_dim"), [(48, 24), (24, 24), (48, 20)])
def test_one_of_the_two_tensors_tells_how_experts_are_turned(dim: int, expert_dim: int) -> None:
    """Where gate and up together look the same both ways, down does not, and the other way round.

    transformers looks at each alone, so where one does not tell, what is written is what it needs not turn.
    """
    config = model_spec("qwen3-vl-moe-tiny").config
    llm = config.llm.replace(dim=dim, expert_dim=expert_dim)
    config = config.replace(llm=llm, projector=config.projector.replace(out_dim=dim))
    model = vlkit.create_model(config, device="meta")
    ours = {key: tuple(tensor.shape) for key, tensor in model.state_dict().items()}
    layouts = layouts_of(config)
    shapes = [{step.target: step.shape for step in keys.plan_save(ours)} for keys in layouts]
    assert [choose_keymap(layouts, theirs, ours).index for theirs in shapes] == [0, 1]
    downs = [theirs["model.language_model.layers.0.mlp.experts.down_proj"] for theirs in shapes]
    turned, straight = (5, expert_dim, dim), (5, dim, expert_dim)
    assert downs == ([turned, straight] if expert_dim == 20 else [straight, turned])


def test_gate_lies_above_up_in_both_orientations() -> None:
    config = model_spec("qwen3-vl-moe-tiny").config
    ours = vlkit.create_model(config).state_dict()
    gate, up, down = (ours[f"llm.blocks.1.mlp.experts.{part}"] for part in ("gate", "up", "down"))
    turned, straight = (keys.to_theirs(ours) for keys in layouts_of(config))
    experts = "model.language_model.layers.1.mlp.experts."
    assert torch.equal(straight[experts + "gate_up_proj"], torch.cat([gate, up], dim=1))
    assert torch.equal(straight[experts + "down_proj"], down)
    assert torch.equal(turned[experts + "gate_up_proj"], torch.cat([gate, up], dim=1).transpose(1, 2))
    assert torch.equal(turned[experts + "down_proj"], down.transpose(1, 2))
