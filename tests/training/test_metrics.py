"""What a run tells: one clean line of JSON per step, event files and a picture where they are asked for."""

from __future__ import annotations

import builtins
import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest

from tests.training.runs import metrics, until
from tests.training.samples import small_config
from vlkit.errors import MissingDependencyError
from vlkit.training import train
from vlkit.training.metrics import Metrics, read_metrics, trim_metrics
from vlkit.training.picture import beginnings, draw_picture, panels

LINES: list[dict[str, Any]] = [
    {"stage": "a", "step": 1, "loss": 2.0, "rates": {"llm": 1e-3}, "token_fill": 0.9},
    {"stage": "b", "step": 2, "loss": 1.5, "rates": {"llm": 5e-4}, "experts": {"dead": 0.25, "entropy": 0.5}},
]


def without(monkeypatch: pytest.MonkeyPatch, package: str) -> None:
    """As if a package were not installed."""
    usual = builtins.__import__

    def missing(name: str, *args: Any, **options: Any) -> Any:
        if name.split(".")[0] == package or (name.startswith("torch.utils.tensorboard") and package == "tensorboard"):
            raise ImportError(f"no module named {name!r}")
        return usual(name, *args, **options)

    monkeypatch.setattr(builtins, "__import__", missing)


def test_a_line_tells_all_of_a_step(tmp_path: Path) -> None:
    streams = [{"name": name, "files": [str(tmp_path / "train.jsonl")], "share": n} for name, n in (("a", 3), ("b", 1))]
    config = small_config(
        tmp_path,
        steps=2,
        packs=2,
        micro_batch=None,
        data={"streams": streams, "pack_tokens": 300, "pack_patches": 200, "workers": 0},
        optimizer={"lr": 1e-3, "part_lr": {"vision": 1e-4}},
    )
    train(config)
    entry = metrics(config)[0]
    assert entry["rates"] == {"vision": 1e-4, "projector": 1e-3, "llm": 1e-3}
    assert entry["packs"] == 2
    assert 0.5 < entry["token_fill"] <= 1
    assert 0 < entry["patch_fill"] <= 1
    assert entry["cross_entropy"] == pytest.approx(entry["loss"], rel=1e-6)
    last = metrics(config)[-1]
    drawn = last["stream_tokens"]
    assert sum(drawn.values()) >= last["tokens"]
    assert drawn["a"] / sum(drawn.values()) == pytest.approx(0.75, abs=0.05)
    experts = entry["experts"]
    assert {"max_violation", "entropy", "dead", "bias_min", "bias_max"} <= set(experts)
    layers = experts["max_violation_of_layers"]
    assert sum(layers) / len(layers) == pytest.approx(experts["max_violation"])
    assert entry["tokens_per_second"] > 0


def test_only_every_nth_step_is_told_and_the_last(tmp_path: Path) -> None:
    config = small_config(tmp_path, steps=5, log_every=2, train=["llm"])
    lines: list[str] = []
    train(config, say=lines.append)
    assert [entry["step"] for entry in metrics(config)] == [2, 4, 5]
    assert lines[0].startswith("vision frozen of ")


def test_numbers_that_are_not_finite_become_null(tmp_path: Path) -> None:
    Metrics(tmp_path).write({"step": 1, "loss": math.nan, "experts": {"dead": [math.inf, 0.5]}})
    assert read_metrics(tmp_path / "metrics.jsonl") == [{"step": 1, "loss": None, "experts": {"dead": [None, 0.5]}}]


def test_half_a_line_and_steps_to_come_are_dropped(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(json.dumps({"step": step}) + "\n" for step in (1, 2, 3)) + '{"step": 4, "lo')
    trim_metrics(path, 2)
    assert path.read_text() == '{"step": 1}\n{"step": 2}\n'
    trim_metrics(tmp_path / "none", 2)


def test_the_lines_of_a_run_that_was_killed_go_on_without_a_seam(tmp_path: Path) -> None:
    config = small_config(tmp_path, steps=4, checkpoints={"every": 2})
    until(config, 2)
    with (Path(config.run) / "metrics.jsonl").open("a") as file:
        file.write('{"step": 3, "loss": 9.0}\n{"step": 4, "lo')
    train(config)
    assert [entry["step"] for entry in metrics(config)] == [1, 2, 3, 4]
    assert all(entry["loss"] < 9 for entry in metrics(config))


def test_what_is_missing_is_said_with_the_way_to_get_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    without(monkeypatch, "matplotlib")
    lines: list[str] = []
    assert train(small_config(tmp_path, steps=1, picture=True), say=lines.append).steps == 1
    assert lines[-1] == "a picture of the run needs matplotlib: pip install 'vlkit[viz]'"
    without(monkeypatch, "tensorboard")
    with pytest.raises(MissingDependencyError, match=r"tensorboard = true needs .* pip install 'vlkit\[viz\]'"):
        train(small_config(tmp_path, run=str(tmp_path / "b"), tensorboard=True))


def test_a_picture_marks_where_stages_begin_breaks_lines_where_parts_rest_and_joins_equal_ones() -> None:
    rates = [
        ("a", 20, {"vision": 3e-4, "projector": 3e-4}),
        ("b", 40, {"llm": 1e-4}),
        ("b", 60, {"vision": 2e-4, "projector": 2e-4}),
    ]
    entries = [
        {"stage": stage, "step": step, "loss": None, "reward": step / 100, "rates": r} for stage, step, r in rates
    ]
    assert beginnings(entries) == [(0.5, "a"), (20.5, "b")]
    assert dict(panels(entries)) == {
        "answers": {"reward": [(20, 0.2), (40, 0.4), (60, 0.6)]},
        "learning rate": {
            "llm": [(20, None), (40, 1e-4), (60, None)],
            "projector, vision": [(20, 3e-4), (40, None), (60, 2e-4)],
        },
    }


@pytest.mark.slow
def test_a_picture_shows_loss_rates_fill_and_experts(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in LINES))
    text = draw_picture(tmp_path).read_text()
    for said in ("loss", "learning rate", "fill of the packs", "experts", "without a token", ">a<", ">b<", "tokens"):
        assert said in text
    assert draw_picture(tmp_path).read_text() == text
    (tmp_path / "metrics.jsonl").write_text(json.dumps({"step": 1, "loss": 2.0}) + "\n")
    assert "learning rate" not in draw_picture(tmp_path).read_text()


@pytest.mark.slow
def test_a_run_leaves_event_files_and_a_picture(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    config = small_config(tmp_path, steps=3, tensorboard=True, picture=True, checkpoints={"every": 1})
    until(config, 2)
    shutil.rmtree(Path(config.run) / "checkpoints/step-00000002")  # so that step 2 is told again
    train(config)
    events = EventAccumulator(str(Path(config.run) / "tensorboard"))
    events.Reload()
    assert [event.step for event in events.Scalars("loss")] == [1, 2, 3]
    assert [event.value for event in events.Scalars("loss")] == pytest.approx([m["loss"] for m in metrics(config)])
    assert {"rates/llm", "experts/max_violation", "grad_norm"} <= set(events.Tags()["scalars"])
    assert (Path(config.run) / "picture.svg").stat().st_size > 1000
