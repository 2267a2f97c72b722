"""Qwen2-VL, Qwen2.5-VL and Qwen3-VL (with and without experts) against transformers: checkpoints both ways, logits, generation.

Sizes are small and odd. Batches mix rows of text, several unequal images and videos, padded on either side.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor

import vlkit
from tests.models.qwen_files import SIZES, published_config
from vlkit.errors import KeyMismatchError
from vlkit.models import VisionLanguageModel
from vlkit.models.pretrained import layouts_of
from vlkit.registry import families

transformers = pytest.importorskip("transformers")

FAMILIES = ("qwen2-vl", "qwen2.5-vl", "qwen3-vl", "qwen3-vl-moe")
OLD = FAMILIES[:2]
IMAGE, VIDEO, START, END = 192, 193, 190, 191
IDS = {"image_token_id": IMAGE, "video_token_id": VIDEO, "vision_start_token_id": START, "vision_end_token_id": END}
TEXT = {
    "vocab_size": 200, "hidden_size": 36, "intermediate_size": 45, "num_hidden_layers": 3, "max_position_embeddings": 512,
    "rms_norm_eps": 1e-6,
}  # fmt: skip
TEXT2 = {
    **TEXT, "num_attention_heads": 3, "num_key_value_heads": 1, "rope_theta": 1e6,
    "rope_scaling": {"type": "mrope", "mrope_section": [1, 3, 2]},
}  # fmt: skip
TEXT3 = {
    **TEXT, "num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 14, "rope_theta": 5e6,
    "rope_scaling": {"rope_type": "default", "mrope_section": [3, 2, 2], "mrope_interleaved": True},
}  # fmt: skip
EXPERTS = {"moe_intermediate_size": 10, "num_experts": 7, "num_experts_per_tok": 3}
PATCHES = {"patch_size": 3, "temporal_patch_size": 2, "spatial_merge_size": 2}
TOWER3 = {
    **PATCHES, "depth": 3, "hidden_size": 40, "num_heads": 2, "intermediate_size": 50, "num_position_embeddings": 25,
    "deepstack_visual_indexes": [0, 2], "out_hidden_size": 36,
}  # fmt: skip
CONFIGS: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "qwen2-vl": (
        "Qwen2VL",
        TEXT2,
        {**PATCHES, "depth": 2, "embed_dim": 40, "num_heads": 2, "mlp_ratio": 3, "hidden_size": 36},
    ),
    "qwen2.5-vl": (
        "Qwen2_5_VL",
        TEXT2,
        {**PATCHES, "depth": 3, "hidden_size": 40, "num_heads": 2, "intermediate_size": 50, "window_size": 12,
         "fullatt_block_indexes": [1], "tokens_per_second": 3, "out_hidden_size": 36},
    ),
    "qwen3-vl": ("Qwen3VL", TEXT3, TOWER3),
    "qwen3-vl-moe": ("Qwen3VLMoe", {**TEXT3, **EXPERTS}, TOWER3),
}  # fmt: skip
Tensors = dict[str, Tensor]


def reference(family: str, *, tied: bool = False, dtype: torch.dtype = torch.float32) -> Any:
    """transformers' model with random weights."""
    name, text, vision = CONFIGS[family]
    config = getattr(transformers, f"{name}Config")(
        text_config=text, vision_config=vision, tie_word_embeddings=tied, **IDS
    )
    for part in (config, config.text_config, config.vision_config):
        part._attn_implementation = part._experts_implementation = "eager"
    model = getattr(transformers, f"{name}ForConditionalGeneration")(config).eval()
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            scale = (3 / parameter.shape[-1]) ** 0.5 if parameter.ndim < 4 else 0.1
            norm = parameter.ndim == 1 and key.endswith("weight")
            parameter.copy_(1 + 0.3 * noise if norm else scale * noise)
    model.generation_config.eos_token_id = None
    return model.to(dtype)


def again(family: str, folder: Path) -> Any:
    """transformers' model from a folder."""
    cls = getattr(transformers, f"{CONFIGS[family][0]}ForConditionalGeneration")
    model, report = cls.from_pretrained(
        folder, attn_implementation="eager", experts_implementation="eager", dtype="auto", output_loading_info=True
    )
    assert not any(report.values()), report
    return model.eval()


# Inputs as the Hub processors emit them.

ROWS: list[list[Any]] = [
    # numbers: that many tokens of text; ("image", rows, columns) and ("video", steps, rows, columns) in patches
    [3, ("image", 4, 6), 2, ("image", 2, 10), 4],
    [5],
    [2, ("image", 6, 2), 1, ("video", 3, 4, 6), 3, ("image", 2, 2), 2],
    [1, ("video", 5, 2, 4), 6],
]


def inputs(family: str, rows: list[list[Any]] = ROWS, *, left: bool = False, seed: int = 0) -> dict[str, Any]:
    """Padded tensors of a batch."""
    generator = torch.Generator().manual_seed(seed)
    channels = 3 * 2 * CONFIGS[family][2]["patch_size"] ** 2
    sequences: list[list[int]] = []
    grids: dict[str, list[tuple[int, ...]]] = {"image": [], "video": []}
    for row in rows:
        ids: list[int] = []
        for part in row:
            if isinstance(part, int):
                ids += torch.randint(1, 180, (part,), generator=generator).tolist()
            elif part[0] == "image" or family in OLD:
                grid = (1, *part[1:]) if part[0] == "image" else part[1:]
                grids[part[0]].append(grid)
                count = grid[0] * grid[1] * grid[2] // 4
                ids += [START, *[IMAGE if part[0] == "image" else VIDEO] * count, END]
            else:  # every time step on its own, behind its time as text
                grids["video"].append(part[1:])
                for step in range(part[1]):
                    ids += [20 + step, 21, START, *[VIDEO] * (part[2] * part[3] // 4), END]
        sequences.append(ids)
    length = max(map(len, sequences))
    padded = torch.zeros(len(rows), length, dtype=torch.long)
    mask = torch.zeros_like(padded)
    for number, ids in enumerate(sequences):
        place = slice(length - len(ids), length) if left else slice(0, len(ids))
        padded[number, place], mask[number, place] = torch.tensor(ids), 1
    made: dict[str, Any] = {
        "input_ids": padded,
        "attention_mask": mask,
        "mm_token_type_ids": (padded == IMAGE).int() + 2 * (padded == VIDEO).int(),
    }
    for kind, pixels, key in (
        ("image", "pixel_values", "image_grid_thw"),
        ("video", "pixel_values_videos", "video_grid_thw"),
    ):
        if grids[kind]:
            made[key] = torch.tensor(grids[kind])
            made[pixels] = torch.randn(int(made[key].prod(1).sum()), channels, generator=generator)
    if family == "qwen2.5-vl" and grids["video"]:
        made["second_per_grid_ts"] = torch.tensor([0.75, 1.5][: len(grids["video"])])
    return made


def compare(ours: VisionLanguageModel, theirs: Any, tensors: dict[str, Any], *, rule: str = "transformers-5") -> float:
    """Largest relative error of the logits, after asserting that it is small and so is the divergence."""
    batch = ours.pack(**tensors)
    positions = ours.positions(batch, rule=rule)  # type: ignore[arg-type]
    more: dict[str, Any] = {}
    if rule == "original" and positions is not None:
        more["position_ids"] = grid_axes(positions, tensors)
    with torch.no_grad():
        got = ours(replace(batch, positions=positions)).logits.tokens
        want = theirs(**tensors, **more).logits[tensors["attention_mask"].bool()]
    error = float((got - want).abs().max() / want.abs().max())
    assert error <= 2e-5  # largest seen 1.4e-5; in fp32 either is 1.2e-5 away from itself in fp64
    divergence = F.kl_div(got.log_softmax(-1), want.log_softmax(-1), log_target=True, reduction="none").sum(-1)
    assert float(divergence.abs().max()) <= 1e-6
    return error


def grid_axes(positions: Tensor | None, tensors: dict[str, Any], *, text: bool = False) -> Tensor:
    """Positions as transformers takes them, padded: time, row and column; if asked, behind those of the text's tokens."""
    assert positions is not None
    mask = tensors["attention_mask"]
    axes = torch.zeros(3, *mask.shape, dtype=torch.long)
    axes[:, mask.bool()] = positions.T
    return torch.cat([(mask.cumsum(1) - 1).clamp(min=0)[None], axes]) if text else axes


def files(folder: Path) -> Tensors:
    """All tensors of a checkpoint."""
    return {name: tensor for path in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(path).items()}


def assert_same_files(first: Path, second: Path) -> None:
    """The same names, shapes, types and bits."""
    one, two = files(first), files(second)
    assert set(one) == set(two)
    for name, tensor in one.items():
        assert two[name].dtype == tensor.dtype, name
        assert two[name].shape == tensor.shape, name
        assert torch.equal(two[name], tensor), name


def rewrite(folder: Path, change: Any) -> None:
    """Change the tensors of a saved folder."""
    (path,) = folder.glob("*.safetensors")
    save_file({name: tensor.contiguous() for name, tensor in change(files(folder)).items()}, path, {"format": "pt"})


def new_layout(tensors: Tensors) -> Tensors:
    """Old names as the newer ones."""
    renamed = {}
    for name, tensor in tensors.items():
        if name.startswith("visual."):
            name = f"model.{name}"
        elif name.startswith("model."):
            name = f"model.language_model.{name.removeprefix('model.')}"
        renamed[name] = tensor
    return renamed


def turned_experts(tensors: Tensors) -> Tensors:
    """Experts in the other orientation."""
    return {name: t.transpose(1, 2) if ".experts." in name else t for name, t in tensors.items()}


# Checkpoints and logits.


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("family", FAMILIES)
def test_checkpoints_and_logits_go_both_ways(family: str, tied: bool, tmp_path: Path) -> None:
    theirs = reference(family, tied=tied)
    theirs.save_pretrained(tmp_path / "theirs")
    ours = vlkit.from_pretrained(tmp_path / "theirs")
    assert ours.config.family == family
    assert ours.config.llm.tied is tied  # type: ignore[attr-defined]
    right = inputs(family)
    for tensors in (right, inputs(family, left=True), inputs(family, ROWS[:1]), inputs(family, ROWS[1:2])):
        compare(ours, theirs, tensors)
    compare(ours, theirs, right, rule="original")

    ours.save_pretrained(tmp_path / "ours")
    assert_same_files(tmp_path / "theirs", tmp_path / "ours")
    assert ("lm_head.weight" in files(tmp_path / "ours")) is not tied
    with torch.no_grad():
        assert torch.equal(again(family, tmp_path / "ours")(**right).logits, theirs(**right).logits)


@pytest.mark.parametrize(
    ("family", "change"), [*((family, new_layout) for family in OLD), (FAMILIES[3], turned_experts)]
)
@pytest.mark.parametrize("tied", [True, False])
def test_other_published_layouts_are_read_and_written_back(
    family: str, change: Any, tied: bool, tmp_path: Path
) -> None:
    theirs = reference(family, tied=tied)
    theirs.save_pretrained(tmp_path / "theirs")
    ours = vlkit.from_pretrained(tmp_path / "theirs")
    rewrite(tmp_path / "theirs", change)
    other = vlkit.from_pretrained(tmp_path / "theirs")
    assert other.published_layout != ours.published_layout
    for (name, tensor), mine in zip(ours.state_dict().items(), other.state_dict().values(), strict=True):
        assert torch.equal(tensor, mine), name

    other.save_pretrained(tmp_path / "ours")
    assert_same_files(tmp_path / "theirs", tmp_path / "ours")
    tensors = inputs(family)
    with torch.no_grad():
        assert torch.equal(again(family, tmp_path / "ours")(**tensors).logits, theirs(**tensors).logits)


@pytest.mark.parametrize("expert_dim", [18, 36])
def test_experts_of_sizes_that_transformers_cannot_tell_apart(
    expert_dim: int, tmp_path: Path, monkeypatch: Any
) -> None:
    """Half the width of the decoder, and the width: what a new model is saved as is read as it was meant."""
    name, text, vision = CONFIGS["qwen3-vl-moe"]
    monkeypatch.setitem(CONFIGS, "qwen3-vl-moe", (name, {**text, "moe_intermediate_size": expert_dim}, vision))
    reference("qwen3-vl-moe").save_pretrained(tmp_path / "theirs")
    ours = vlkit.from_pretrained(tmp_path / "theirs")
    compare(ours, again("qwen3-vl-moe", tmp_path / "theirs"), inputs("qwen3-vl-moe"))
    new = vlkit.create_model(ours.config)
    new.load_state_dict(ours.state_dict())
    new.save_pretrained(tmp_path / "new")
    compare(new.eval(), again("qwen3-vl-moe", tmp_path / "new"), inputs("qwen3-vl-moe"))


@pytest.mark.parametrize("family", FAMILIES)
def test_bits_of_other_types_survive(family: str, tmp_path: Path) -> None:
    reference(family, dtype=torch.bfloat16).save_pretrained(tmp_path / "theirs")
    rewrite(tmp_path / "theirs", lambda tensors: {n: t.float() if "norm1" in n else t for n, t in tensors.items()})
    with pytest.warns(UserWarning, match="rounded to bfloat16"):
        ours = vlkit.from_pretrained(tmp_path / "theirs")
    assert {p.dtype for p in ours.parameters()} == {torch.bfloat16}
    ours.save_pretrained(tmp_path / "ours")
    assert_same_files(tmp_path / "theirs", tmp_path / "ours")


@pytest.mark.parametrize("family", FAMILIES)
def test_a_head_that_stands_beside_its_embedding_must_equal_it(family: str, tmp_path: Path) -> None:
    reference(family, tied=True).save_pretrained(tmp_path)
    (embedding,) = (name for name in files(tmp_path) if name.endswith("embed_tokens.weight"))
    rewrite(tmp_path, lambda tensors: {**tensors, "lm_head.weight": tensors[embedding].clone()})
    assert vlkit.from_pretrained(tmp_path).llm.lm_head is None
    rewrite(tmp_path, lambda tensors: {**tensors, "lm_head.weight": tensors[embedding] + 1})
    with pytest.raises(KeyMismatchError, match="differs from the embedding"):
        vlkit.from_pretrained(tmp_path)


@pytest.mark.parametrize("family", FAMILIES)
def test_bf16_is_no_further_from_fp32_than_that_of_transformers(family: str, tmp_path: Path) -> None:
    """Root mean square of the error, of the same bf16 weights and pixels; it was 2% to 8% of the spread of the logits."""
    reference(family, dtype=torch.bfloat16).save_pretrained(tmp_path)
    theirs = again(family, tmp_path)
    ours = vlkit.from_pretrained(tmp_path)
    exact = vlkit.from_pretrained(tmp_path, dtype=torch.float32)
    tensors = inputs(family)
    half = {name: t.bfloat16() if name.startswith("pixel_values") else t for name, t in tensors.items()}
    batch = ours.pack(**half)
    batch = replace(batch, positions=ours.positions(batch, rule="transformers-5"))
    with torch.no_grad():
        want = exact(batch).logits.tokens
        got = ours(batch).logits.tokens.float()
        other = theirs(**half).logits[tensors["attention_mask"].bool()].float()
    assert (got - want).square().mean() <= 1.1 * (other - want).square().mean()


def test_videos_without_seconds_count_one_per_step(tmp_path: Path) -> None:
    theirs = reference("qwen2.5-vl")
    theirs.save_pretrained(tmp_path)
    tensors = inputs("qwen2.5-vl")
    del tensors["second_per_grid_ts"]
    compare(vlkit.from_pretrained(tmp_path), theirs, tensors)


@pytest.mark.parametrize("family", FAMILIES)
def test_gradients(family: str, tmp_path: Path) -> None:
    """Of the mean of the labelled tokens' losses, by every parameter."""
    theirs = reference(family)
    theirs.save_pretrained(tmp_path)
    ours = vlkit.from_pretrained(tmp_path).train()
    tensors = inputs(family)
    labels = tensors["input_ids"].masked_fill(tensors["attention_mask"] == 0, -100)
    batch = ours.pack(**tensors, labels=labels)
    loss = ours(replace(batch, positions=ours.positions(batch, rule="transformers-5"))).loss
    want = theirs(**tensors, labels=labels).loss
    assert loss is not None
    assert abs(float(loss.detach() - want.detach())) <= 1e-5 * float(want.detach())

    loss.backward()
    want.backward()
    keys = layouts_of(ours.config)[-1]  # the names of transformers' modules
    grads = keys.to_ours({name: p.grad for name, p in theirs.named_parameters()})
    for name, parameter in ours.named_parameters():
        assert (parameter.grad - grads[name]).abs().max() <= 1e-4 * grads[name].abs().max(), name


@pytest.mark.parametrize("name", SIZES)
def test_written_configs_mean_the_published_ones_to_transformers(name: str) -> None:
    family = families()[SIZES[name].family]
    published = published_config(name)
    written = family.write_config(family.read_config(published))
    cls = getattr(transformers, f"{CONFIGS[family.name][0]}Config")
    theirs, ours = (cls.from_dict(values).to_dict() for values in (published, written))
    # What a model never asks for: types of the file, padding, training, and windows where they are switched off.
    without_effect = {"torch_dtype", "dtype", "transformers_version", "bos_token_id", "eos_token_id", "max_window_layers",
                      "vision_token_id", "sliding_window", "spatial_patch_size", "in_chans", "tie_word_embeddings",
                      "norm_topk_prob", "use_sliding_window", "model_type"}  # fmt: skip
    assert ours["tie_word_embeddings"] == theirs["tie_word_embeddings"] == SIZES[name].tied
    for part in ("text_config", "vision_config"):
        for field in {*theirs[part], *ours[part]} - without_effect:
            assert ours[part].get(field) == theirs[part].get(field), f"{part}.{field}"
    for field in IDS:
        assert ours[field] == theirs[field]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_saved_new_model_sees_the_same_pictures_in_transformers(family: str, tmp_path: Path) -> None:
    """Pictures through vlkit's processor and model, and through transformers' image processor and model from the saved folder."""
    torch.manual_seed(0)
    ours, processor = vlkit.create_model(f"{family}-tiny").eval(), vlkit.create_processor(f"{family}-tiny")
    with torch.no_grad():
        for parameter in ours.parameters():
            if parameter.ndim > 1:
                parameter.mul_(0.5 / parameter.std() / parameter.shape[-1] ** 0.5)
    ours.save_pretrained(tmp_path)
    random, rule = np.random.default_rng(0), processor.config.image
    pictures = [Image.fromarray(random.integers(0, 256, (*size, 3), dtype=np.uint8)) for size in ((37, 61), (50, 21))]
    content = [{"type": "image", "image": picture} for picture in pictures]
    batch = processor([{"role": "user", "content": [content[0], {"type": "text", "text": "and"}, content[1]]}])
    theirs = transformers.Qwen2VLImageProcessor(
        patch_size=rule.patch_size,
        merge_size=rule.merge_size,
        temporal_patch_size=rule.frames_per_patch,
        image_mean=list(rule.mean),
        image_std=list(rule.std),
        size={"shortest_edge": rule.min_pixels, "longest_edge": rule.max_pixels},
    )(pictures, return_tensors="pt")
    ids = batch.ids.tokens[None]
    types = (ids == ours.config.image_token_id).int()
    with torch.no_grad():
        got = ours(batch).logits.tokens
        want = again(family, tmp_path)(input_ids=ids, mm_token_type_ids=types, **theirs).logits[0]
    assert (got - want).abs().max() <= 5e-6 * want.abs().max()  # largest seen 6e-7


# Generation.


@pytest.mark.parametrize("what", ["images", "videos"])
@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_generation(family: str, what: str, tmp_path: Path) -> None:
    """Rows of unequal length; transformers needs them padded on the left.

    transformers 5.23 goes on at one more than the position of the last token, which is the right place if its prompt has
    positions by the original rule; by its own rule it would use those of a long video a second time.
    """
    theirs = reference(family)
    theirs.save_pretrained(tmp_path)
    ours = vlkit.from_pretrained(tmp_path)
    tensors = inputs(family, ROWS[:2] if what == "images" else ROWS, left=True)
    batch = ours.pack(**tensors)
    got = ours.generate(batch, max_new_tokens=12, stop=())
    more = {"position_ids": grid_axes(ours.positions(batch), tensors, text=True)} if what == "videos" else {}
    want = theirs.generate(**tensors, **more, max_new_tokens=12, do_sample=False, pad_token_id=0)
    assert got == want[:, tensors["input_ids"].shape[1] :].tolist()


# Fine-tunes for screens.


def test_ui_tars_1_0_and_aguvis_folders(tmp_path: Path) -> None:
    """Qwen2-VL as saved by transformers 4.45: flat, names in the old layout, copies of defaults, two more tokens in Aguvis."""
    theirs = reference("qwen2-vl")
    theirs.save_pretrained(tmp_path)
    vision = CONFIGS["qwen2-vl"][2]
    config = {
        **TEXT2, **IDS, "_name_or_path": "Qwen/Qwen2-VL-7B-Instruct", "architectures": ["Qwen2VLForConditionalGeneration"],
        "model_type": "qwen2_vl", "attention_dropout": 0.0, "bos_token_id": 151643, "eos_token_id": 199, "hidden_act": "silu",
        "initializer_range": 0.02, "max_window_layers": 28, "sliding_window": 32768, "use_sliding_window": False,
        "tie_word_embeddings": False, "torch_dtype": "bfloat16", "transformers_version": "4.45.0.dev0", "use_cache": False,
        "rope_scaling": {"mrope_section": [1, 3, 2], "rope_type": "default", "type": "default"}, "vision_token_id": 189,
        "vision_config": {**vision, "in_chans": 3, "spatial_patch_size": 3, "model_type": "qwen2_vl"},
    }  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "generation_config.json").unlink()
    ours = vlkit.from_pretrained(tmp_path)
    assert ours.config.stop_ids == (199,)
    compare(ours, theirs, inputs("qwen2-vl"))


def test_ui_tars_1_5_folder(tmp_path: Path) -> None:
    """Qwen2.5-VL as saved by transformers 4.52: text_config and copies at the top, tied only inside, names in either layout."""
    theirs = reference("qwen2.5-vl", tied=True)
    theirs.save_pretrained(tmp_path)
    rope = {"mrope_section": [1, 3, 2], "rope_type": "default", "type": "default"}
    text = {**TEXT2, "rope_scaling": rope, "model_type": "qwen2_5_vl_text", "image_token_id": None, "video_token_id": None,
            "layer_types": ["full_attention"] * 3, "tie_word_embeddings": True, "eos_token_id": 198,
            "sliding_window": None}  # fmt: skip
    vision = {
        **CONFIGS["qwen2.5-vl"][2],
        "model_type": "qwen2_5_vl",
        "in_channels": 3,
        "in_chans": 3,
        "hidden_act": "silu",
    }
    config = {
        **TEXT2, "rope_scaling": rope, **IDS, "architectures": ["Qwen2_5_VLForConditionalGeneration"],
        "model_type": "qwen2_5_vl", "text_config": text, "vision_config": vision, "transformers_version": "4.54.0",
        "eos_token_id": 198,
    }  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "generation_config.json").unlink()
    for change in (lambda tensors: tensors, new_layout):
        rewrite(tmp_path, change)
        ours = vlkit.from_pretrained(tmp_path)
        assert ours.llm.lm_head is None
        compare(ours, theirs, inputs("qwen2.5-vl"))
