"""What people get wrong with whole models: each is named, none passes in silence."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import vlkit
from tests.models.test_kimi_vl import PUBLISHED
from vlkit import registry
from vlkit.config import Config, Size
from vlkit.errors import (
    CheckpointError,
    ConfigError,
    KeyMismatchError,
    LayoutError,
    NonFiniteError,
    NonFiniteWeightsError,
    VlkitError,
)
from vlkit.models import kimi_vl
from vlkit.objectives import chunked_cross_entropy
from vlkit.optim import muon_param_groups
from vlkit.packing import Batch, Layout, Packed
from vlkit.testing import contract, random_batch


@pytest.fixture(scope="module")
def model() -> vlkit.VisionLanguageModel:
    torch.manual_seed(0)
    return vlkit.create_model("kimi-vl-tiny")


class BareConfig(Config):
    dim: Size = 8
    patch_size: Size = 2
    in_channels: Size = 3

    @property
    def patch_dim(self) -> int:
        return self.in_channels * self.patch_size**2

    @property
    def out_dim(self) -> int:
        return self.dim


class BareTower(nn.Module):
    """Writes values in __init__, where they are lost."""

    def __init__(self, config: BareConfig) -> None:
        super().__init__()
        self.proj = nn.Linear(config.patch_dim, config.dim)
        self.scale = nn.Parameter(torch.ones(config.dim))
        self.register_buffer("order", torch.arange(config.dim), persistent=False)

    def forward(self, patches: Packed) -> Packed:
        return patches.with_tokens(self.proj(patches.tokens) * self.scale)


def test_values_that_no_reset_gives_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """What __init__ writes is lost on meta: such a part would start from whatever memory holds."""
    registry.load_plugins()
    for table in ("_components", "_by_config"):
        monkeypatch.setattr(registry, table, dict(getattr(registry, table)))
    registry.register_component("vision", BareConfig, BareTower, {"bare": BareConfig(), "bare-tiny": BareConfig()})
    with pytest.raises(ConfigError, match=r"vision\.scale, vision\.order.*reset_parameters"):
        vlkit.compose(vision="bare", llm="qwen3-tiny")


@pytest.mark.parametrize("name", ["kimi-vl-tiny", "moonvit-qwen3-tiny"])
def test_autocast_runs_forward_backward_and_generation(name: str) -> None:
    model = vlkit.create_model(name)
    batch = random_batch(model)
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(batch).loss
        answers = model.generate(random_batch(model, labels=False), max_new_tokens=3, stop=())
    loss.backward()
    assert all(len(answer) == 3 for answer in answers)
    assert abs(float(loss.detach()) - float(model(batch).loss.detach())) < 0.05


def test_a_frozen_tower_may_be_in_another_dtype() -> None:
    model = vlkit.create_model("kimi-vl-tiny")
    batch = random_batch(model)
    with torch.no_grad():
        want = model(batch).logits.tokens
        model.vision.bfloat16()
        got = model(batch).logits.tokens
    assert got.dtype == torch.float32
    assert float((got - want).abs().max()) < 0.05


def test_checkpointing_is_switched_for_the_whole_model(model: vlkit.VisionLanguageModel) -> None:
    model.gradient_checkpointing = True
    assert model.vision.gradient_checkpointing
    assert model.llm.gradient_checkpointing
    model.gradient_checkpointing = False
    assert not model.llm.gradient_checkpointing


def test_stop_ids_of_any_kind_stop(model: vlkit.VisionLanguageModel) -> None:
    batch = random_batch(model, [(4, [])], labels=False)
    everything = torch.arange(320)
    assert len(model.generate(batch, max_new_tokens=5, stop=everything)[0]) == 1
    assert len(model.generate(batch, max_new_tokens=5, stop=list(everything))[0]) == 1
    for wrong in ("a", 5, [1.5]):
        with pytest.raises(ConfigError, match="stop: expected a list of token ids"):
            model.generate(batch, max_new_tokens=5, stop=wrong)  # type: ignore[arg-type]


def test_a_tiny_temperature_is_greedy(model: vlkit.VisionLanguageModel) -> None:
    batch = random_batch(model, labels=False)
    greedy = model.generate(batch, max_new_tokens=4, stop=())
    assert model.generate(batch, max_new_tokens=4, stop=(), temperature=1e-300) == greedy


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_nan_logits_are_an_error(temperature: float) -> None:
    model = vlkit.create_model("kimi-vl-tiny")
    model.llm.norm.weight.data.fill_(float("nan"))
    with pytest.raises(NonFiniteError, match="sequence 0: the logits are NaN"):
        model.generate(random_batch(model, labels=False), max_new_tokens=2, temperature=temperature)


def test_a_processor_of_a_registered_model_is_that_of_its_name(model: vlkit.VisionLanguageModel) -> None:
    assert vlkit.create_processor(model).config == vlkit.create_processor("kimi-vl-tiny").config
    with pytest.raises(ConfigError, match="moonshotai/Kimi-VL-A3B-Instruct"):
        vlkit.create_processor("kimi-vl-a3b")


def test_nan_weights_are_loaded_only_when_asked(tmp_path: Path) -> None:
    vlkit.create_model("kimi-vl-tiny").save_pretrained(tmp_path / "m")
    file = tmp_path / "m" / "model.safetensors"
    state = load_file(file)
    state["language_model.model.norm.weight"][3] = float("nan")
    save_file(state, file, metadata={"format": "pt"})
    with pytest.raises(NonFiniteWeightsError, match=r"norm\.weight.*check_finite=False"):
        vlkit.from_pretrained(tmp_path / "m")
    assert vlkit.from_pretrained(tmp_path / "m", check_finite=False).llm.norm.weight[3].isnan()


def test_a_tied_head_with_other_numbers_is_not_dropped(tmp_path: Path) -> None:
    tied = vlkit.create_model("kimi-vl-tiny", llm={"tied": True})
    tied.save_pretrained(tmp_path / "m")
    file = tmp_path / "m" / "model.safetensors"
    state = load_file(file)
    embedding = state["language_model.model.embed_tokens.weight"]
    save_file({**state, "language_model.lm_head.weight": embedding.clone()}, file, metadata={"format": "pt"})
    vlkit.from_pretrained(tmp_path / "m")  # a copy is harmless
    save_file({**state, "language_model.lm_head.weight": embedding + 1}, file, metadata={"format": "pt"})
    with pytest.raises(KeyMismatchError, match="differs from the embedding"):
        vlkit.from_pretrained(tmp_path / "m")


@pytest.mark.parametrize("wrong", ["kimi-vl-tinny", None, 3, "a/b/c"])
def test_what_is_no_folder_never_reaches_the_network(wrong: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def download(*_: object, **__: object) -> None:
        raise AssertionError("asked the Hub")

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    with pytest.raises(CheckpointError, match=r"no such folder|expected a folder"):
        vlkit.from_pretrained(wrong)
    with pytest.raises(CheckpointError, match=r"registered model.*create_model"):
        vlkit.from_pretrained("kimi-vl-tiny")


@pytest.mark.parametrize(
    ("part", "field", "value"),
    [
        ("vision_config", "merge_kernel_size", 2),
        ("vision_config", "merge_kernel_size", None),
        ("vision_config", "model_type", "clip"),
        ("vision_config", "num_hidden_layers", 10**9),
        ("vision_config", "patch_size", 10**9),
        ("text_config", "rope_theta", "x"),
        ("text_config", "rope_theta", True),
        ("text_config", "model_type", "llama"),
        ("text_config", "num_key_value_heads", 8),
    ],
)
def test_a_vendor_config_is_read_strictly(part: str, field: str, value: Any) -> None:
    with pytest.raises(ConfigError):
        kimi_vl.read_config({**PUBLISHED, part: {**PUBLISHED[part], field: value}})


def _layout(*args: Any) -> Any:
    return lambda: Layout(*args)


IDS = Packed(torch.tensor([1, 2]), Layout((2,)))


@pytest.mark.parametrize(
    "wrong",
    [
        _layout((1.7, 2)),
        _layout("34"),
        _layout(3),
        _layout((4,), [(2, 2.5)]),
        lambda: Layout.from_grids((4, 6)),
        lambda: Layout.from_grids([(2.5, 2)]),
        lambda: Layout.from_grids([(2, 2)]).merged(0),
        lambda: Layout.from_grids([(2, 2)]).merged(1.5),  # type: ignore[arg-type]
        lambda: Layout((2**31,)).cu_seqlens(),
        lambda: Batch(Packed(torch.tensor([1, 2], dtype=torch.uint8), Layout((2,)))),
        lambda: Batch(IDS, labels=[1, 2]),  # type: ignore[arg-type]
        lambda: Batch(IDS, labels=torch.ones(2)),
        lambda: Batch(IDS, positions=torch.ones(2)),
        lambda: chunked_cross_entropy(torch.ones(2, 3), torch.ones(4, 3), torch.tensor([0, 1]), chunk=-1),
        lambda: chunked_cross_entropy(torch.ones(3, 3), torch.ones(4, 3), torch.tensor([0, 1])),
        lambda: vlkit.create_model("kimi-vl-tiny")(torch.ones(3)),
        lambda: vlkit.create_model(None),  # type: ignore[arg-type]
        lambda: vlkit.create_model("kimi-vl-tiny", dtype="bf16"),  # type: ignore[arg-type]
        lambda: vlkit.from_pretrained("somewhere", dtype="bf16"),  # type: ignore[arg-type]
        lambda: vlkit.from_pretrained("somewhere", device="meta"),
        lambda: muon_param_groups(vlkit.create_model("kimi-vl-tiny"), adamw="mlp"),
        lambda: muon_param_groups(vlkit.create_model("kimi-vl-tiny"), adamw=["("]),
        lambda: muon_param_groups(vlkit.create_model("kimi-vl-tiny"), router="x"),  # type: ignore[arg-type]
    ],
)
def test_wrong_values_raise_a_vlkit_error(wrong: Any) -> None:
    with pytest.raises(VlkitError):
        wrong()


def test_pack_refuses_grids_of_another_kind(model: vlkit.VisionLanguageModel) -> None:
    ids, pixels = torch.zeros(1, 4, dtype=torch.long), torch.zeros(4, 48)
    for grids in ({"image_grid_hws": torch.tensor([[1, 2, 2]])}, {"image_grid_thw": torch.tensor([[2, 2]])}):
        with pytest.raises(LayoutError, match="must be a tensor"):
            model.pack(input_ids=ids, pixel_values=pixels, **grids)
    with pytest.raises(LayoutError, match="integers"):
        model.pack(input_ids=ids.float())


def test_packs_compare_by_identity() -> None:
    assert IDS == IDS
    assert Packed(IDS.tokens, IDS.layout) != IDS


def test_a_projector_is_given_by_its_fields() -> None:
    model = vlkit.compose(vision="moonvit-tiny", projector={"merge_size": 1}, llm="qwen3-tiny", device="meta")
    assert model.config.projector.merge_size == 1  # type: ignore[attr-defined]
    assert isinstance(next(model.parameters()), Tensor)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"max_new_tokens": "2"}, "max_new_tokens"),
        ({"max_new_tokens": 2.5}, "max_new_tokens"),
        ({"temperature": "1"}, "temperature"),
        ({"top_k": 1.5}, "top_k"),
        ({"top_p": None}, "top_p"),
        ({"seed": None}, "seed"),
        ({"seed": 1.5}, "seed"),
        ({"seed": [1, 2]}, "2 seeds for 1"),
    ],
)
def test_generate_names_what_it_cannot_use(
    model: vlkit.VisionLanguageModel, arguments: dict[str, Any], words: str
) -> None:
    batch = Batch(Packed(torch.tensor([1, 2]), Layout((2,))))
    with pytest.raises(ConfigError, match=words):
        model.generate(batch, **arguments)
    with pytest.raises(LayoutError, match="list"):
        model.generate([{"role": "user", "content": "hi"}])  # type: ignore[arg-type]
    assert model.generate(batch, max_new_tokens=1, seed=2**70, temperature=1.0)


def test_containers_refuse_what_they_do_not_hold() -> None:
    ids = torch.tensor([1, 2])
    with pytest.raises(LayoutError, match="ids must be Packed, found Tensor"):
        Batch(ids)  # type: ignore[arg-type]
    with pytest.raises(LayoutError, match="patches must be Packed"):
        Batch(Packed(ids, Layout((2,))), ids)  # type: ignore[arg-type]
    with pytest.raises(LayoutError, match="list and Layout"):
        Packed([1, 2], Layout((2,)))  # type: ignore[arg-type]


def test_pack_refuses_masks_and_pixels_of_another_kind(model: vlkit.VisionLanguageModel) -> None:
    ids = torch.tensor([[1, 2, 3]])
    with pytest.raises(LayoutError, match="attention_mask must be 1"):
        model.pack(input_ids=ids, attention_mask=torch.tensor([[0.0, 0.0, -torch.inf]]))
    with pytest.raises(LayoutError, match="pixel_values must be a tensor, found list"):
        model.pack(input_ids=ids, pixel_values=[1.0])  # type: ignore[arg-type]
    with pytest.raises(LayoutError, match="one entry per video"):
        model.pack(input_ids=ids, second_per_grid_ts=1.0)  # type: ignore[arg-type]


@pytest.mark.parametrize("swap", [{"projector": "mlp"}, {"llm": "qwen2-tiny"}, {"vision": "moonvit-tiny"}])
def test_a_swapped_model_keeps_the_order_of_its_processor(swap: dict[str, str], tmp_path: Path) -> None:
    """Who swaps a part of Qwen3-VL goes on feeding it what Qwen's processor emits."""
    more = {"positions": "line"} if "llm" in swap else {}
    swapped = vlkit.create_model("qwen3-vl-tiny", **swap, **more)
    swapped.save_pretrained(tmp_path)
    wide = swapped.config.vision.patch_dim  # type: ignore[attr-defined]
    rows = torch.tensor([0.0, 1, 4, 5, 2, 3, 6, 7])[:, None].expand(-1, wide)  # two blocks of 2x2
    for each in (swapped, vlkit.from_pretrained(tmp_path)):
        batch = each.pack(input_ids=torch.tensor([[5]]), pixel_values=rows, image_grid_thw=torch.tensor([[1, 2, 4]]))
        assert batch.patches is not None
        assert batch.patches.tokens[:, 0].tolist() == list(range(8))


def test_one_id_cannot_stand_for_images_and_videos() -> None:
    with pytest.raises(ConfigError, match="both 273"):
        vlkit.create_model("qwen2-vl-tiny", video_token_id=273)


@pytest.mark.parametrize("wrong", [{"device": "gpu"}, {"dtype": torch.int8}, {"device": 1.5}])
def test_a_model_is_made_of_floats_on_a_device_that_there_is(wrong: Any) -> None:
    with pytest.raises(ConfigError, match=r"gpu|int8|1\.5"):
        vlkit.create_model("kimi-vl-tiny", **wrong)


class Adapted(nn.Module):
    """A linear layer with an adapter, whose `weight` is that of the layer alone, as adapters of the field have it."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base = base
        self.down = nn.Linear(base.in_features, 2, bias=False, dtype=base.weight.dtype)
        self.up = nn.Linear(2, base.out_features, bias=False, dtype=base.weight.dtype)

    @property
    def weight(self) -> Tensor:
        return self.base.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.up(self.down(x))


def test_decoding_sees_an_adapter_on_the_up_projection() -> None:
    """The absorbed form reads the weight of kv_up; where that is not all of kv_up, rows are expanded."""
    torch.manual_seed(0)
    model = vlkit.create_model("kimi-vl-tiny", dtype=torch.float64)
    for block in model.llm.blocks:
        block.attn.kv_up = Adapted(block.attn.kv_up)
    contract.cache_equals_full(model)


def test_a_compiled_block_stack_still_generates() -> None:
    torch.manual_seed(0)
    model = vlkit.create_model("qwen2-vl-tiny")
    batch = random_batch(model, labels=False)
    want = model.generate(batch, max_new_tokens=3, stop=())
    model.llm.forward_blocks = torch.compile(model.llm.forward_blocks, fullgraph=True, backend="eager")
    assert model.generate(batch, max_new_tokens=3, stop=()) == want
