"""Folders: a family's layout or vlkit's own, chosen by the checkpoint; nothing lost, nothing cast unasked."""

from __future__ import annotations

import json
import re
import resource
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import vlkit
from tests.hub.loopback import Repository, serve
from vlkit.errors import (
    CheckpointError,
    ConfigError,
    CorruptCheckpointError,
    KeyMismatchError,
    NonFiniteWeightsError,
    UnknownFieldWarning,
    UnknownModelError,
)
from vlkit.hub import pretrained as hub
from vlkit.hub.checkpoint import verify_manifest
from vlkit.hub.keymap import KeyMap, Rule, choose_keymap
from vlkit.models import kimi_vl, pretrained
from vlkit.models.vlm import VLMConfig
from vlkit.registry import families
from vlkit.testing import random_batch


def test_published_names_shapes_and_dtypes_survive(tmp_path: Path) -> None:
    """A checkpoint with bf16 weights and bf16 gate biases is loaded with fp32 biases, and written as it was."""
    model = vlkit.create_model("kimi-vl-tiny", dtype=torch.bfloat16)
    model.save_pretrained(tmp_path / "a")
    state = load_file(tmp_path / "a" / "model.safetensors")
    bias = "language_model.model.layers.1.mlp.gate.e_score_correction_bias"
    assert state[bias].dtype == torch.float32
    state[bias] = torch.linspace(-1, 1, 5).bfloat16()
    save_file(state, tmp_path / "a" / "model.safetensors", metadata={"format": "pt"})
    loaded = vlkit.from_pretrained(tmp_path / "a")
    assert loaded.llm.blocks[1].mlp.router.bias.dtype == torch.float32
    loaded.save_pretrained(tmp_path / "b")
    again = load_file(tmp_path / "b" / "model.safetensors")
    assert {k: (v.shape, v.dtype) for k, v in again.items()} == {k: (v.shape, v.dtype) for k, v in state.items()}
    assert all(torch.equal(again[k], state[k]) for k in state)


def test_swapped_parts_are_saved_in_vlkits_own_layout(tmp_path: Path) -> None:
    model = vlkit.create_model("kimi-vl-tiny", llm="qwen3-moe-tiny")
    model.save_pretrained(tmp_path / "own", max_shard_size="100KB")
    assert json.loads((tmp_path / "own" / "config.json").read_text())["model_type"] == "vlkit"
    assert (tmp_path / "own" / "model.safetensors.index.json").exists()
    loaded = vlkit.from_pretrained(tmp_path / "own")
    batch = random_batch(model)
    with torch.no_grad():
        assert torch.equal(loaded(batch).logits.tokens, model(batch).logits.tokens)


def test_saving_again_keeps_what_is_not_ours_and_drops_old_shards(tmp_path: Path) -> None:
    model = vlkit.create_model("kimi-vl-tiny")
    folder = tmp_path / "run"
    model.save_pretrained(folder, max_shard_size="100KB")
    vlkit.create_processor("kimi-vl-tiny").save_pretrained(folder)
    (folder / "notes.txt").write_text("mine")
    model.save_pretrained(folder)
    names = {p.name for p in folder.iterdir()}
    assert names == {"config.json", "generation_config.json", "model.safetensors", "notes.txt", "processor.json"}
    assert vlkit.Processor.from_pretrained(folder).image_token_id == model.config.image_token_id


def test_dtype_is_chosen_at_load(tmp_path: Path) -> None:
    vlkit.create_model("kimi-vl-tiny").save_pretrained(tmp_path / "m")
    loaded = vlkit.from_pretrained(tmp_path / "m", dtype=torch.bfloat16)
    assert {p.dtype for p in loaded.parameters()} == {torch.bfloat16}
    assert not loaded.training


@pytest.mark.parametrize("device", ["gpu", "cuda:77", "meta", 3.5, [0]])
def test_a_device_that_there_is_not_is_refused_before_anything_is_read(device: Any, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="device"):
        vlkit.from_pretrained(tmp_path / "not" / "looked" / "for", device=device)


def test_missing_weights_are_an_error_unless_asked(tmp_path: Path) -> None:
    vlkit.create_model("kimi-vl-tiny").save_pretrained(tmp_path / "m")
    file = tmp_path / "m" / "model.safetensors"
    state = load_file(file)
    del state["multi_modal_projector.linear_2.weight"]
    state["language_model.model.norm.bias"] = torch.zeros(32)
    save_file(state, file, metadata={"format": "pt"})
    with pytest.raises(KeyMismatchError, match=r"(?s)linear_2.weight.*norm.bias|norm.bias.*linear_2.weight"):
        vlkit.from_pretrained(tmp_path / "m")
    with pytest.warns(UserWarning, match="linear_2"):
        model = vlkit.from_pretrained(tmp_path / "m", strict=False)
    assert all(bool(p.isfinite().all()) for p in model.projector.parameters())


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({}, "model_type must name a family, found None"),
        ({"model_type": ["kimi_vl"]}, "model_type must name a family"),
        (
            {"model_type": "kimi_vl", "vision_config": {}, "text_config": {}},
            "m/config.json: config.json.vision_config: missing",
        ),
        ({"model_type": "vlkit"}, "missing 'model'"),
        ({"model_type": "vlkit", "model": {"vision": {"dim": 3}}}, "'type' must name a registered vision"),
        ({"model_type": "vlkit", "model": {"vision": {"type": "moonvit", "dmi": 3}}}, "did you mean 'dim'"),
    ],
)
def test_a_config_that_is_not_understood_is_refused(tmp_path: Path, config: dict, words: str) -> None:
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / "config.json").write_text(json.dumps(config))
    with pytest.raises(ConfigError, match=words):
        vlkit.from_pretrained(tmp_path / "m")


def test_an_unknown_family_gets_the_nearest_names_and_how_to_add_it(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "kimi_v1"}')
    with pytest.raises(
        UnknownModelError, match=r"'kimi_v1'; the nearest are kimi_vl(, \w+){0,2}\. A new one .*register_family"
    ):
        vlkit.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('{"model_type": "kimi_vl", "model_type": "vlkit"}', "line 1, column 27: key 'model_type' appears twice"),
        ('{"model_type": "kimi_vl", "rope_theta": NaN}', "line 1, column 41: NaN is not a JSON number"),
        ('{"model_type": "kimi_vl",}', "line 1, column 2[56]: not JSON"),
        ('["kimi_vl"]', "line 1, column 1: expected a JSON object, found a list"),
        ('\ufeff{"model_type": "kimi_vl"}', "line 1, column 1: .*byte order mark"),
        ("version https://git-lfs.github.com/spec/v1", ".*git lfs pull"),
    ],
)
def test_a_config_that_is_no_json_says_where(tmp_path: Path, text: str, words: str) -> None:
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ConfigError, match=f"config.json: {words}"):
        vlkit.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("part", "field"),
    [
        ("text_config", "hidden_size"),
        ("text_config", "vocab_size"),
        ("text_config", "n_routed_experts"),
        ("text_config", "num_hidden_layers"),
        ("vision_config", "init_pos_emb_height"),
    ],
)
@pytest.mark.parametrize("value", [2**31, 2**40, 10**19, -1, 0, True, 4.0, "32", None])
def test_absurd_sizes_are_refused_before_memory_is_taken(tmp_path: Path, part: str, field: str, value: Any) -> None:
    """A size that could be one is refused by the shapes of the weights: on meta nothing of it has memory."""
    vlkit.create_model("kimi-vl-tiny").save_pretrained(tmp_path)
    values = json.loads((tmp_path / "config.json").read_text())
    values[part][field] = value
    (tmp_path / "config.json").write_text(json.dumps(values))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

    with pytest.raises((ConfigError, KeyMismatchError), match=re.escape(str(value))):
        vlkit.from_pretrained(tmp_path)

    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 50_000  # kB


def test_code_beside_the_weights_is_never_imported(tmp_path: Path) -> None:
    """Neither by the config's auto_map nor by its name."""
    vlkit.create_model("kimi-vl-tiny").save_pretrained(tmp_path / "m")
    values = json.loads((tmp_path / "m" / "config.json").read_text())
    values["auto_map"] = {"AutoModel": "modeling_kimi.Kimi", "AutoConfig": "configuration_kimi.KimiConfig"}
    (tmp_path / "m" / "config.json").write_text(json.dumps(values))
    for name in ("modeling_kimi", "configuration_kimi", "sitecustomize", "__init__"):
        (tmp_path / "m" / f"{name}.py").write_text(f"open({str(tmp_path / 'canary')!r}, 'w')")

    vlkit.from_pretrained(tmp_path / "m", strict_config=True)

    assert not (tmp_path / "canary").exists()
    assert not [name for name in sys.modules if name.endswith("_kimi")]


def test_a_name_that_is_neither_folder_nor_repository(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="no such folder"):
        vlkit.from_pretrained(tmp_path / "nothing" / "here")


def test_a_manifest_finds_a_flipped_byte(tmp_path: Path) -> None:
    vlkit.create_model("kimi-vl-tiny").save_pretrained(tmp_path / "m", manifest=True)
    verify_manifest(tmp_path / "m")
    file = tmp_path / "m" / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[-5] ^= 1
    file.write_bytes(content)
    with pytest.raises(CorruptCheckpointError, match=r"model\.safetensors"):
        verify_manifest(tmp_path / "m")


def test_push_uploads_what_save_writes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One commit with config and weights; the repository is made first, with the token that was given."""
    calls: list[tuple[str, dict]] = []

    class Api:
        def __init__(self, token: str | None = None) -> None:
            calls.append(("token", {"token": token}))

        def create_repo(self, repo_id: str, **options: object) -> None:
            calls.append(("create", {"repo_id": repo_id, **options}))

        def upload_folder(self, *, repo_id: str, folder_path: Path, commit_message: str) -> str:
            loaded = vlkit.from_pretrained(folder_path)
            calls.append(("upload", {"repo_id": repo_id, "names": sorted(p.name for p in folder_path.iterdir())}))
            assert torch.equal(loaded.llm.embedding.weight, model.llm.embedding.weight)
            return "https://hub/commit/1"

    monkeypatch.setattr("huggingface_hub.HfApi", Api)
    model = vlkit.create_model("kimi-vl-tiny")
    assert model.push_to_hub("me/tiny", token="secret", private=True) == "https://hub/commit/1"
    assert calls == [
        ("token", {"token": "secret"}),
        ("create", {"repo_id": "me/tiny", "private": True, "exist_ok": True}),
        ("upload", {"repo_id": "me/tiny", "names": ["config.json", "generation_config.json", "model.safetensors"]}),
    ]


# Layouts of one family.


def turned(rule: str) -> Callable[[VLMConfig], KeyMap]:
    """Kimi-VL's names with one linear layer of the projector stored transposed."""

    def keys(config: VLMConfig) -> KeyMap:
        rules = kimi_vl.keys(config).rules
        turns = [rule in other.theirs.text for other in rules]  # torch.t leaves biases as they are
        return KeyMap(
            *(replace(r, to_ours=torch.t, to_theirs=torch.t) if t else r for r, t in zip(rules, turns, strict=True))
        )

    return keys


@pytest.fixture
def layouts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Kimi-VL as if it had been published under older names, and with either layer of the projector transposed.

    The first layer's matrix is square in the tiny model, the second's is not.
    """
    monkeypatch.setattr(
        pretrained,
        "families",
        lambda: {
            "kimi-vl": replace(
                families()["kimi-vl"],
                other_keys=lambda config: (
                    kimi_vl.keys(config).mounted(theirs="old."),
                    turned("linear_2")(config),
                    turned("linear_1")(config),
                ),
            )
        },
    )


def saved_in(layout: int, folder: Path) -> dict[str, torch.Tensor]:
    """A tiny model written in one of the layouts; what its file holds."""
    torch.manual_seed(0)
    model = vlkit.create_model("kimi-vl-tiny")
    model.published_layout = layout
    model.save_pretrained(folder)
    return load_file(folder / "model.safetensors")


@pytest.mark.usefixtures("layouts")
@pytest.mark.parametrize("layout", [1, 2, 3])
def test_a_checkpoint_is_written_in_the_layout_that_it_was_read_in(tmp_path: Path, layout: int) -> None:
    state = saved_in(layout, tmp_path / "a")
    plain = saved_in(0, tmp_path / "plain")
    assert any(name not in plain or not torch.equal(state[name], plain[name]) for name in state)

    loaded = vlkit.from_pretrained(tmp_path / "a")
    loaded.save_pretrained(tmp_path / "b")

    assert loaded.published_layout == layout
    assert (tmp_path / "b" / "model.safetensors").read_bytes() == (tmp_path / "a" / "model.safetensors").read_bytes()
    torch.manual_seed(0)
    made = vlkit.create_model("kimi-vl-tiny").state_dict()
    assert all(torch.equal(tensor, made[name]) for name, tensor in loaded.state_dict().items())


@pytest.mark.usefixtures("layouts")
def test_a_file_that_fits_two_layouts_needs_to_be_told_which(tmp_path: Path) -> None:
    """What vlkit writes says so itself; a file from elsewhere is refused until somebody does."""
    state = saved_in(3, tmp_path)
    save_file(state, tmp_path / "model.safetensors", metadata={"format": "pt"})

    with pytest.raises(KeyMismatchError, match=r"read projector.fc1.weight differently.*pass layout=0 or layout=3"):
        vlkit.from_pretrained(tmp_path)

    name = "multi_modal_projector.linear_1.weight"
    assert torch.equal(vlkit.from_pretrained(tmp_path, layout=3).projector.fc1.weight, state[name].T)
    assert torch.equal(vlkit.from_pretrained(tmp_path, layout=0).projector.fc1.weight, state[name])
    with pytest.raises(ConfigError, match="layout: expected a number from 0 to 3, found 4"):
        vlkit.from_pretrained(tmp_path, layout=4)


@pytest.mark.usefixtures("layouts")
def test_the_nearest_layout_is_reported(tmp_path: Path) -> None:
    state = saved_in(1, tmp_path)
    del state["old.vision_tower.patch_embed.proj.bias"]
    save_file(state, tmp_path / "model.safetensors")

    with pytest.raises(KeyMismatchError, match=r"layout 1 of 4 is the nearest: names do not fit: 1 missing"):
        vlkit.from_pretrained(tmp_path)
    with pytest.warns(UserWarning, match=r"old\.vision_tower\.patch_embed\.proj\.bias"):
        assert vlkit.from_pretrained(tmp_path, strict=False).published_layout == 1


def test_quantised_weights_are_refused_unless_asked_for(tmp_path: Path) -> None:
    state = saved_in(0, tmp_path)
    name = "multi_modal_projector.linear_2.weight"
    state[name] = (state[name] * 100).to(torch.int8)
    save_file(state, tmp_path / "model.safetensors", metadata={"format": "pt"})

    with pytest.raises(CheckpointError, match=rf"int8 into float32: {name}\n.*pass allow_quantized=True"):
        vlkit.from_pretrained(tmp_path)
    assert torch.equal(vlkit.from_pretrained(tmp_path, allow_quantized=True).projector.fc2.weight, state[name].float())


def test_a_config_that_says_quantised_is_refused_by_method(tmp_path: Path) -> None:
    """Its weights have other names and need scales; the first of a thousand unexpected names would not say so."""
    vlkit.create_model("kimi-vl-tiny").save_pretrained(tmp_path)
    values = json.loads((tmp_path / "config.json").read_text())
    values["quantization_config"] = {"quant_method": "awq", "bits": 4}
    (tmp_path / "config.json").write_text(json.dumps(values))

    with pytest.raises(ConfigError, match=r"config\.json: the weights are quantised \(awq\)"):
        vlkit.from_pretrained(tmp_path)


# Pickled weights.


@pytest.mark.parametrize("shards", [1, 2])
def test_pickled_weights_are_loaded_when_asked_for_and_saved_as_safetensors(tmp_path: Path, shards: int) -> None:
    """As several families published them: `pytorch_model.bin`, or shards of it with an index."""
    state = saved_in(0, tmp_path / "plain")
    vlkit.from_pretrained(tmp_path / "plain").save_pretrained(tmp_path / "a")
    (tmp_path / "a" / "model.safetensors").unlink()
    files = ["pytorch_model.bin"] if shards == 1 else [f"pytorch_model-0000{i}-of-00002.bin" for i in (1, 2)]
    weight_map = {name: files[place % shards] for place, name in enumerate(state)}
    for file in files:
        torch.save({name: state[name] for name in state if weight_map[name] == file}, tmp_path / "a" / file)
    if shards > 1:
        (tmp_path / "a" / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weight_map}))

    with pytest.raises(CheckpointError, match="allow_pickle=True"):
        vlkit.from_pretrained(tmp_path / "a")
    vlkit.from_pretrained(tmp_path / "a", allow_pickle=True).save_pretrained(tmp_path / "b")

    again = load_file(tmp_path / "b" / "model.safetensors")
    assert again.keys() == state.keys()
    assert all(torch.equal(again[name], state[name]) for name in state)


@pytest.mark.parametrize("name", vlkit.list_models("*-tiny"))
def test_every_layout_of_every_family_is_written_and_read_back(name: str, tmp_path: Path) -> None:
    model = vlkit.create_model(name)
    for layout in range(len(pretrained.layouts_of(model.config))):
        model.published_layout = layout
        model.save_pretrained(tmp_path / str(layout))

        loaded = vlkit.from_pretrained(tmp_path / str(layout))

        assert (loaded.published_layout, loaded.config) == (layout, model.config)
        state = loaded.state_dict()
        assert all(torch.equal(tensor, state[key]) for key, tensor in model.state_dict().items())


def test_picking_a_layout_asks_each_name_of_few_rules(monkeypatch: pytest.MonkeyPatch) -> None:
    """The 5,652 names of Kimi-VL, put to three layouts of 25 rules: one question for a name and a layout, not 25."""
    config = vlkit.registry.model_spec("kimi-vl-a3b").config
    with torch.device("meta"):
        ours = {name: tensor.shape for name, tensor in vlkit.VisionLanguageModel(config).state_dict().items()}
    keys = kimi_vl.keys(config)
    theirs = {step.target: step.shape for step in keys.plan_save(ours)}
    assert len(theirs) == 5652
    questions = []
    match = Rule.match_theirs
    monkeypatch.setattr(Rule, "match_theirs", lambda rule, name: questions.append(name) or match(rule, name))

    assert choose_keymap([keys.mounted(theirs="new."), turned("linear_2")(config), keys], theirs, ours).index == 2

    assert len(questions) < 2.5 * len(theirs)  # the names of the first layout are told apart without a question


# Files beside the weights.


def test_ids_that_end_an_answer_are_read_from_both_files_and_written_for_other_tools(tmp_path: Path) -> None:
    model = vlkit.create_model("kimi-vl-tiny")
    stops = list(model.config.stop_ids)
    model.save_pretrained(tmp_path / "a")
    written = tmp_path / "a" / "generation_config.json"
    assert json.loads(written.read_text()) == {"eos_token_id": stops}

    for ends, expected in ((3, [*stops, 3]), ([stops[0], 5], [*stops, 5]), (None, stops), (10**9, stops)):
        written.write_text(json.dumps({"eos_token_id": ends, "temperature": 0.2, "repetition_penalty": 1.05}))
        loaded = vlkit.from_pretrained(tmp_path / "a")
        assert list(loaded.config.stop_ids) == expected
        loaded.save_pretrained(tmp_path / "b")
        again = json.loads((tmp_path / "b" / "generation_config.json").read_text())
        assert again == {"eos_token_id": expected, "temperature": 0.2, "repetition_penalty": 1.05}
        assert vlkit.from_pretrained(tmp_path / "b").config == loaded.config


def test_a_generation_config_that_says_the_same_is_written_as_it_was(tmp_path: Path) -> None:
    model = vlkit.create_model("kimi-vl-tiny")
    model.save_pretrained(tmp_path / "a")
    published = {"do_sample": True, "eos_token_id": list(reversed(model.config.stop_ids)), "top_k": 1}
    (tmp_path / "a" / "generation_config.json").write_text(json.dumps(published))

    vlkit.from_pretrained(tmp_path / "a").save_pretrained(tmp_path / "b")

    assert list(json.loads((tmp_path / "b" / "generation_config.json").read_text()).items()) == list(published.items())


@pytest.mark.parametrize("ends", [-1, True, "</s>", [[3]], {"id": 3}, 2.0])
def test_ids_that_are_none_are_refused_with_their_file(tmp_path: Path, ends: Any) -> None:
    vlkit.create_model("kimi-vl-tiny").save_pretrained(tmp_path)
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": ends}))

    with pytest.raises(ConfigError, match=r"generation_config\.json: eos_token_id"):
        vlkit.from_pretrained(tmp_path)


def test_unknown_fields_warn_once_and_are_refused_when_asked(tmp_path: Path) -> None:
    vlkit.create_model("kimi-vl-tiny").save_pretrained(tmp_path)
    values = json.loads((tmp_path / "config.json").read_text())
    values["text_config"]["sliding_windw"] = 4096
    (tmp_path / "config.json").write_text(json.dumps(values))

    with pytest.warns(UnknownFieldWarning) as caught:
        vlkit.from_pretrained(tmp_path)
    assert [str(w.message) for w in caught] == [
        "config.json.text_config: fields without an effect in vlkit: sliding_windw"
    ]
    with pytest.raises(ConfigError, match="sliding_windw; strict_config=False ignores them"):
        vlkit.from_pretrained(tmp_path, strict_config=True)


def test_a_model_comes_from_one_commit_of_the_hub_though_its_branch_moves(tmp_path: Path) -> None:
    """Config and shards through a real client; the branch moves as soon as the config is there."""
    commits = {}
    for commit, seed in (("a" * 40, 0), ("b" * 40, 1)):
        torch.manual_seed(seed)
        folder = tmp_path / commit
        vlkit.create_model("kimi-vl-tiny").save_pretrained(folder, max_shard_size="100KB")
        commits[commit] = {path.name: path.read_bytes() for path in folder.iterdir()}
    load_and_save = """
        import vlkit
        from pathlib import Path
        def resolve(out, **arguments):
            vlkit.from_pretrained(**arguments).save_pretrained(out, max_shard_size="100KB")
            return Path(out)
    """
    outs = [str(tmp_path / name) for name in ("branch", "commit")]
    with serve(model=Repository(commits, {"main": "a" * 40})) as hub:

        def move(path: str) -> None:
            if path.endswith("/config.json"):
                hub.repositories["lab/model"].branches["main"] = "b" * 40

        hub.after = move
        model = {"repo_or_folder": "lab/model"}
        hub.fetch(
            tmp_path / "home",
            {**model, "out": outs[0]},
            {**model, "out": outs[1], "revision": "b" * 40},
            before=load_and_save,
        )

    for out, commit in zip(outs, commits, strict=True):
        assert {path.name: path.read_bytes() for path in Path(out).iterdir()} == commits[commit]


@torch.no_grad()
def test_a_model_that_is_not_its_config_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    """A resized embedding, pruned blocks, another module: saved, nobody could load them. The config says what they are."""
    resized = vlkit.create_model("qwen3-vl-tiny")
    rows, dim = resized.llm.embedding.weight.shape
    resized.llm.embedding.weight.data = torch.cat([resized.llm.embedding.weight.data, torch.zeros(8, dim)])
    words = rf"llm\.embedding\.weight: the model has \({rows + 8}, {dim}\), its config means \({rows}, {dim}\)"
    with pytest.raises(KeyMismatchError, match=rf"(?s){words}.*set model\.config"):
        resized.save_pretrained(tmp_path / "saved")
    llm: Any = resized.config.llm
    resized.config = resized.config.replace(llm=llm.replace(vocab_size=rows + 8))
    resized.save_pretrained(tmp_path / "saved")
    assert vlkit.from_pretrained(tmp_path / "saved").llm.embedding.weight.shape == (rows + 8, dim)

    pruned = vlkit.create_model("kimi-vl-tiny", llm="qwen3-tiny")
    pruned.llm.blocks = pruned.llm.blocks[:1]
    with pytest.raises(
        KeyMismatchError, match=r"llm\.blocks\.1\.norm1\.weight: the model has none.*(?s:.*)and \d+ more"
    ):
        pruned.save_pretrained(tmp_path / "pruned")
    swapped = vlkit.create_model("kimi-vl-tiny", llm="qwen3-tiny")
    swapped.projector = torch.nn.Linear(2, 2)
    with pytest.raises(KeyMismatchError, match=r"projector\.weight: the model has \(2, 2\), its config means none"):
        swapped.save_pretrained(tmp_path / "swapped")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["saved"]


@torch.no_grad()
def test_numbers_that_loading_would_refuse_are_not_saved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = vlkit.create_model("qwen3-vl-tiny")
    model.llm.blocks[1].mlp.up.weight[3, 4] = float("nan")
    with pytest.raises(NonFiniteWeightsError, match=r"llm\.blocks\.1\.mlp\.up\.weight holds NaN or infinity"):
        model.save_pretrained(tmp_path / "saved")
    assert not (tmp_path / "saved").exists()
    model.save_pretrained(tmp_path / "saved", check_finite=False)
    vlkit.from_pretrained(tmp_path / "saved", check_finite=False)
    monkeypatch.setattr(hub, "CHECKED_BY_DEFAULT", 10)
    model.save_pretrained(tmp_path / "saved")
    with pytest.raises(NonFiniteWeightsError):
        model.save_pretrained(tmp_path / "saved", check_finite=True)


def test_older_weights_go_in_whatever_form_they_are(tmp_path: Path) -> None:
    """Another reader could take them for this model's."""
    old = [
        "pytorch_model.bin", "pytorch_model.bin.index.json", "pytorch_model-00001-of-00002.bin",
        "model-1-of-2.safetensors", "model-00001-of-00002.safetensors", "model.safetensors.index.json", "SHA256SUMS",
    ]  # fmt: skip
    kept = ["training_args.bin", "pytorch_model.md", "adapter_model.safetensors", "tokenizer.model"]
    for name in (*old, *kept):
        (tmp_path / name).write_text("old")
    vlkit.create_model("qwen3-vl-tiny").save_pretrained(tmp_path)
    written = {"config.json", "generation_config.json", "model.safetensors"}
    assert {path.name for path in tmp_path.iterdir()} == {*kept, *written}


def test_how_a_loss_is_computed_keeps_no_model_from_being_saved() -> None:
    for name in vlkit.list_models("*-tiny"):
        config = vlkit.create_model(name, device="meta", loss_chunk=77).config
        assert "loss_chunk" not in pretrained.write_config(config)
