"""The whole demo, as a person runs it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from PIL import Image

import vlkit
from vlkit.demo import run as demo
from vlkit.demo.options import Options
from vlkit.demo.run import MARK, build_model, prepare_folder
from vlkit.demo.task import PROMPT, read
from vlkit.errors import CheckpointError, ConfigError, UnknownModelError
from vlkit.layers.moe import MoE
from vlkit.summary import kind_of

ROOT = Path(__file__).parents[2]
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "COLUMNS": "100"}


@pytest.fixture(scope="module")
def stopped(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A demo that was to take an hour and was stopped by Ctrl-C after some steps; its folder and what it printed."""
    out = tmp_path_factory.mktemp("demo") / "out"
    command = [sys.executable, "-u", "-m", "vlkit", "demo", "--seconds", "3600", "--batch", "8", "--out", str(out)]
    process = subprocess.Popen(
        command, env=ENVIRONMENT, cwd=out.parent, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    assert process.stdout is not None
    lines = []
    for line in process.stdout:
        lines.append(line)
        if "loss" in line:
            time.sleep(0.5)
            process.send_signal(signal.SIGINT)
            break
    lines.append(process.communicate(timeout=120)[0])
    assert process.returncode == 0, "".join(lines)
    return out, "".join(lines)


def test_ctrl_c_keeps_what_was_learnt(stopped: tuple[Path, str]) -> None:
    out, printed = stopped
    assert "what was learnt is kept" in printed
    assert str(out / "index.html") in printed
    assert "stopped by hand" in (out / "index.html").read_text(encoding="utf-8")
    figures = json.loads((out / MARK).read_text(encoding="utf-8"))
    assert figures["stopped"]
    assert figures["steps"] >= 1
    assert len(figures["answers"]) == len(figures["texts"]) == demo.JUDGED


def test_the_fresh_process_answered_as_the_saved_model_does(stopped: tuple[Path, str]) -> None:
    out, _ = stopped
    model, processor = vlkit.from_pretrained(out / "model"), vlkit.Processor.from_pretrained(out / "model")
    pictures = sorted((out / "strips").glob("*.png"))
    assert len(pictures) == demo.JUDGED
    answers = json.loads((out / MARK).read_text(encoding="utf-8"))["answers"]
    assert read(model, processor, pictures[:7]) == answers[:7]


def test_generate_reads_a_picture_with_the_saved_model(stopped: tuple[Path, str]) -> None:
    out, _ = stopped
    picture = out / "strips" / "000.png"
    command = [
        sys.executable,
        "-m",
        "vlkit",
        "generate",
        str(out / "model"),
        "--image",
        str(picture),
        "--prompt",
        PROMPT,
    ]
    done = subprocess.run(
        [*command, "--max-new-tokens", "7"], env=ENVIRONMENT, capture_output=True, text=True, check=True
    )
    assert done.stdout.rstrip("\n") == json.loads((out / MARK).read_text(encoding="utf-8"))["answers"][0]


def test_a_demo_replaces_what_a_demo_made(
    stopped: tuple[Path, str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """In this process and with other parts; twice into one folder."""
    out = stopped[0].parent / "again"
    monkeypatch.setattr(demo, "JUDGED", 12)
    for vision in ("moonvit-tiny", None):
        page = demo.run(
            Options(seconds=0.3, batch=4, vision=vision, llm="qwen3-tiny", optimizer="adamw", workers=1, out=out)
        )
        assert page == out / "index.html"
        assert len(list((out / "strips").iterdir())) == 12
        with Image.open(out / "strips" / "003.png") as picture:
            assert picture.size[1] <= 16
    assert "12 strips" in capsys.readouterr().out


def test_a_folder_of_somebody_else_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(CheckpointError, match="not made by the demo"):
        prepare_folder(tmp_path)
    with pytest.raises(CheckpointError, match="not made by the demo"):
        prepare_folder(tmp_path / "thesis.txt")
    assert (tmp_path / "thesis.txt").read_text() == "years of work"


def test_an_own_folder_keeps_what_a_person_added(tmp_path: Path) -> None:
    prepare_folder(tmp_path / "new")
    (tmp_path / "new" / "notes.txt").write_text("mine")
    (tmp_path / "new" / "model").mkdir()
    prepare_folder(tmp_path / "new")
    assert sorted(p.name for p in (tmp_path / "new").iterdir()) == ["notes.txt", MARK]


def test_the_default_model_has_every_part_of_kimi_vl() -> None:
    model = build_model(Options())
    parts = (model.vision, model.projector, model.llm)
    assert [kind_of(part) for part in parts] == ["MoonViT", "PixelShuffle", "Moonlight"]
    assert any(isinstance(module, MoE) for module in model.llm.modules())
    assert model.num_parameters(active=True) < model.num_parameters() < 1_500_000


def test_parts_that_cannot_be_had_are_refused() -> None:
    with pytest.raises(UnknownModelError, match="moonvit"):
        build_model(Options(vision="monvit"))
    with pytest.raises(ConfigError, match="vocabulary"):
        demo.check_vocabulary(build_model(Options()).config.llm.replace(vocab_size=100))
