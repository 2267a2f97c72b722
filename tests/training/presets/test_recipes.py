"""The published recipes, stage after stage, in seconds: lengths, steps and batches are scaled down, all else is theirs."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

import vlkit
from tests.training.samples import write_samples
from vlkit.cli import app
from vlkit.training.presets import Fact, list_presets, preset
from vlkit.training.presets.fact import put, says

pytestmark = pytest.mark.slow

SAID = {
    "train": ["vision", "projector", "llm"], "steps|epochs": 2, "batch|packs": 2, "batch": 2, "data.pack_tokens": 400,
    "data.labels": {"on": "answers"}, "resolution.points": [[0.0, 1600], [0.5, 3200]], "optimizer.kind": "muon",
    "optimizer.lr": 1e-3, "optimizer.weight_decay": 0.1, "schedule.warmup": 0, "schedule.shape": "linear",
    "schedule.final": 0.5, "balance_rate": 1e-3, "objective.tau": 0.5, "objective.verifier": "exact", "objective.group": 3,
    "objective.max_new_tokens": 3, "objective.length_weight": 0.5, "objective.length_from": 0.0, "data.draws": "curriculum",
    "objective.beta": 0.1, "objective.weights": [0.8, 0.2, 1.0], "objective.clip": [0.2, 0.2], "objective.kl_weight": 0.1,
}  # fmt: skip
FIRST = {"steps|epochs": "steps", "batch|packs": "packs"}
SCALED = {"data.pack_tokens": 400, "data.max_tokens": 450, "resolution.points": [[0.0, 3200]], "batch": 2}
CONTRAST = {"dim": 16, "text_dim": 16, "text_layers": 1, "text_heads": 2, "text_mlp_dim": 32, "pool_heads": 2}


def write(folder: Path) -> dict[str, str]:
    """Conversations, pairs, questions with answers, and captions."""
    write_samples(folder, 9)
    rng = np.random.default_rng(1)
    lines: dict[str, list[dict[str, Any]]] = {"pairs": [], "questions": [], "captions": []}
    for index in range(5):
        name = f"of-{index}.png"
        Image.fromarray(rng.integers(0, 255, (30, 40, 3), dtype=np.uint8)).save(folder / name)
        content = [{"type": "image", "image": name}, {"type": "text", "text": "q" * (1 + index)}]
        prompt = [{"role": "user", "content": content if index % 2 else content[1:]}]
        sides = {side: [{"role": "assistant", "content": f"{side} {index}"}] for side in ("chosen", "rejected")}
        lines["pairs"].append({"messages": prompt, **sides})
        lines["questions"].append({"messages": prompt, "answer": str(index), "difficulty": index / 5})
        lines["captions"].append({"image": name, "text": f"picture {index}"})
    for name, samples in lines.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(sample) + "\n" for sample in samples))
    return {name: f"{name}.jsonl" for name in (*lines, "train")}


def scaled(name: str, files: Mapping[str, str]) -> dict[str, Any]:
    """The stage as a person would write it: what is unknown is said, and lengths and batches are small."""
    stage = preset(name)
    table: dict[str, Any] = {"name": name.split("/")[1], "preset": name}
    for path in stage.unknown():
        if path != "data.streams":
            put(table, FIRST.get(path, path), SAID[path])
    for path, value in SCALED.items():
        if isinstance(stage.sets.get(path), Fact):
            put(table, path, value)
    if says(stage.known(), "epochs"):
        put(table, "steps", 2)
    kind = stage.known()["objective"]["kind"]
    if kind == "contrast":
        table["objective"] = CONTRAST
    if kind != "next-token":
        if "packs" in table:
            table["batch"] = table.pop("packs")
        data = {"contrast": "captions", "dpo": "pairs", "mpo": "pairs"}.get(kind, "questions")
        table.setdefault("data", {})["files"] = [files[data]]
    if "data.streams" in stage.sets:
        names = ("long", "replay") if says(stage.known(), "data.streams") else ("text", "images")
        table.setdefault("data", {})["streams"] = [{"name": each, "files": [files["train"]]} for each in names]
        if "text" in names:
            table["data"]["streams"][1]["share"] = [[0.0, 0.0], [1.0, 0.4]]
    return table


def run(folder: Path, model: str, names: Sequence[str]) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """`vlkit train` of these stages; what they were, and the lines of metrics."""
    files = write(folder)
    stages = [scaled(name, files) for name in names]
    config = {
        "run": "run", "model": {"name": model}, "data": {"files": [files["train"]], "workers": 0}, "log_every": 1,
        "checkpoints": {"keep": 1}, "picture": False, "stages": stages,
    }  # fmt: skip
    path = folder / "config.json"
    path.write_text(json.dumps(config))
    result = CliRunner().invoke(app, ["train", str(path)])
    assert result.exit_code == 0, result.exception
    lines = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
    assert list(dict.fromkeys(line["stage"] for line in lines)) == [stage["name"] for stage in stages]
    return stages, lines


def changed(folder: Path, model: str, stages: Sequence[Mapping[str, Any]]) -> dict[str, set[str]]:
    """The parts of the model in which each stage changed something."""
    torch.manual_seed(0)
    before = vlkit.create_model(model).state_dict()
    found = {}
    for number, stage in enumerate(stages, start=1):
        after = vlkit.from_pretrained(folder / "run" / "stages" / f"{number}-{stage['name']}").state_dict()
        found[stage["name"]] = {name.split(".")[0] for name in after if not torch.equal(after[name], before[name])}
        before = after
    return found


def test_kimi_vl_from_its_tower_to_reinforcement_learning(tmp_path: Path) -> None:
    names = list_presets("kimi-vl/*")
    stages, lines = run(tmp_path, "kimi-vl-tiny", names)
    parts = changed(tmp_path, "kimi-vl-tiny", stages)
    assert parts["vit-coca"] == {"vision"}
    assert parts["alignment"] == {"vision", "projector"}
    for name in ("joint", "cooldown", "long-32k", "long-128k", "sft-32k", "sft-128k", "long-cot"):
        assert parts[name] == {"vision", "projector", "llm"}, name
    thetas = [
        vlkit.from_pretrained(tmp_path / "run" / "stages" / f"{number}-{stage['name']}").config.llm.theta  # type: ignore[attr-defined]
        for number, stage in enumerate(stages, start=1)
    ]
    before = vlkit.create_model("kimi-vl-tiny").config.llm.theta  # type: ignore[attr-defined]
    assert thetas == [before] * 4 + [800_000.0] * 6
    peaks = {line["stage"]: max(line["rates"].values()) for line in reversed(lines)}  # of each stage's first step
    assert (peaks["sft-32k"], peaks["sft-128k"]) == (2e-5, 1e-5)


@pytest.mark.parametrize(
    ("family", "model", "frozen"),
    [
        ("andesvl", "andesvl-tiny", {"alignment": {"llm"}}),
        ("ui-tars", "qwen2-vl-tiny", {}),
        ("aguvis", "qwen2-vl-tiny", {"grounding-7b": {"vision"}, "planning-7b": {"vision"}}),
        ("mobilevlm", "qwen-vl-tiny", {"sft": {"vision"}}),
    ],
)
def test_the_other_recipes(family: str, model: str, frozen: dict[str, set[str]], tmp_path: Path) -> None:
    names = [name for name in list_presets(f"{family}/*") if not name.endswith("-72b")]
    stages, lines = run(tmp_path, model, names)
    for name, parts in changed(tmp_path, model, stages).items():
        judged = any(word in name for word in ("grpo",))  # random answers are all wrong: nothing to learn from rewards
        assert parts == {"vision", "projector", "llm"} - frozen.get(name, set()) or judged, name
    rates = {line["stage"]: max(line["rates"].values()) for line in reversed(lines)}
    if family in ("aguvis", "mobilevlm"):
        assert set(rates.values()) == {1e-5}
