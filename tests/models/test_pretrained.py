"""Folders: a family's layout or vlkit's own, chosen by the checkpoint; nothing lost, nothing cast unasked."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import vlkit
from vlkit.errors import ConfigError, CorruptCheckpointError, KeyMismatchError
from vlkit.hub.checkpoint import verify_manifest
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
    assert names == {"config.json", "model.safetensors", "notes.txt", "processor.json"}
    assert vlkit.Processor.from_pretrained(folder).image_token_id == model.config.image_token_id


def test_dtype_is_chosen_at_load(tmp_path: Path) -> None:
    vlkit.create_model("kimi-vl-tiny").save_pretrained(tmp_path / "m")
    loaded = vlkit.from_pretrained(tmp_path / "m", dtype=torch.bfloat16)
    assert {p.dtype for p in loaded.parameters()} == {torch.bfloat16}
    assert not loaded.training


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
        ({"model_type": "llava"}, "'llava' belongs to no registered family; known are kimi_vl, vlkit"),
        ({}, "None belongs to no registered family"),
        ({"model_type": "vlkit"}, "missing 'model'"),
        ({"model_type": "vlkit", "model": {"vision": {"dim": 3}}}, "'type' must name a registered vision"),
        ({"model_type": "vlkit", "model": {"vision": {"type": "moonvit", "dmi": 3}}}, "did you mean 'dim'"),
    ],
)
def test_a_config_that_is_not_understood_is_refused(tmp_path: Path, config: dict, words: str) -> None:
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ConfigError, match=words):
        vlkit.from_pretrained(tmp_path)


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
        ("upload", {"repo_id": "me/tiny", "names": ["config.json", "model.safetensors"]}),
    ]
