"""The command line: quick to answer, and plain when it refuses."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
from PIL import Image
from typer.testing import CliRunner, Result

import vlkit
from vlkit.cli import app
from vlkit.errors import UnknownModelError, VlkitError

ROOT = Path(__file__).parents[1]


def _run(*arguments: str) -> Result:
    return CliRunner().invoke(app, list(arguments), catch_exceptions=False)


def _python(code: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run(
        [sys.executable, *code.split(), *arguments], env=environment, capture_output=True, text=True, check=False
    )


def test_help_answers_at_once_and_without_torch() -> None:
    """0.15 s on an idle machine; the processor time is what others on this machine cannot change."""
    start = os.times()
    begin = time.perf_counter()
    done = _python("-X importtime -m vlkit --help")
    spent = os.times()
    used = spent.children_user + spent.children_system - start.children_user - start.children_system
    assert done.returncode == 0, done.stderr
    for command in ("demo", "generate", "train", "plan", "list", "info"):
        assert f"  {command} " in done.stdout
    imported = {line.rsplit("|")[-1].strip() for line in done.stderr.splitlines()}
    assert "typer" in imported
    assert imported.isdisjoint({"torch", "numpy", "PIL", "timm", "transformers"})
    assert used < 0.6, f"{used:.2f} s of processor time, {time.perf_counter() - begin:.2f} s in all"


@pytest.mark.parametrize("command", ["demo", "generate", "train", "plan", "list", "info"])
def test_every_command_explains_itself(command: str) -> None:
    done = _run(command, "--help")
    assert done.exit_code == 0
    assert len(done.stdout) > 200


def test_version() -> None:
    assert _run("--version").stdout == f"vlkit {vlkit.__version__}\n"


def test_list_shows_models_with_sizes_and_every_kind_of_part() -> None:
    lines = _run("list").stdout.splitlines()
    names = {line.split()[0] for line in lines if line.startswith("  ")}
    assert names >= {"kimi-vl-a3b", "moonvit", "pixel-shuffle", "moonlight"}
    (kimi,) = (line for line in lines if line.split()[:1] == ["kimi-vl-a3b"])
    assert "16.4 B, 3.36 B active" in kimi
    assert names == {
        *vlkit.list_models(),
        *(n for kind in ("vision", "projector", "llm") for n in vlkit.list_components(kind)),
    }


def test_list_narrows_by_a_wildcard() -> None:
    names = [line.split()[0] for line in _run("list", "*moonvit*").stdout.splitlines() if line.startswith("  ")]
    assert names
    assert all("moonvit" in name for name in names)


def test_a_pattern_that_fits_nothing_is_an_error_with_a_way_out() -> None:
    with pytest.raises(UnknownModelError, match=r"\*kimi\*"):
        _run("list", "kimi")


def test_info_of_a_published_model() -> None:
    text = _run("info", "kimi-vl-a3b", "--image", "1024x768").stdout
    assert "blocks × 27" in text
    assert "6 of 64 experts" in text
    assert "32.8 GB in bf16" in text
    assert "56 rows of 74 patches (4,144) → 1,036 tokens" in text


def test_info_counts_as_the_model_counts() -> None:
    model = vlkit.create_model("kimi-vl-tiny", device="meta")
    first = _run("info", "kimi-vl-tiny").stdout.splitlines()[0]
    total, active = (float(v) for v in re.findall(r"([\d.]+) k", first))
    assert total == pytest.approx(model.num_parameters() / 1000, rel=5e-3)
    assert active == pytest.approx(model.num_parameters(active=True) / 1000, rel=5e-3)


def test_info_of_a_part_and_of_a_saved_model(tmp_path: Path) -> None:
    assert _run("info", "moonvit").stdout.startswith("moonvit")
    model = vlkit.create_model("moonvit-qwen3-tiny")
    model.save_pretrained(tmp_path)
    vlkit.create_processor(model).save_pretrained(tmp_path)
    text = _run("info", str(tmp_path), "--image", "20x11").stdout
    assert "MoonViT" in text
    assert "padded to 24x16 → 4 rows of 6 patches (24) → 6 tokens" in text


def test_generate_of_the_same_question_is_the_same_answer(tmp_path: Path) -> None:
    model = vlkit.create_model("moonvit-qwen3-tiny")
    model.save_pretrained(tmp_path)
    vlkit.create_processor(model).save_pretrained(tmp_path)
    Image.new("RGB", (30, 20), "teal").save(tmp_path / "teal.png")
    arguments = (
        "generate",
        str(tmp_path),
        "--image",
        str(tmp_path / "teal.png"),
        "--prompt",
        "colour?",
        "--max-new-tokens",
        "5",
    )
    assert _run(*arguments).stdout == _run(*arguments).stdout != ""


def test_errors_are_one_line_without_a_traceback() -> None:
    done = _python("-m vlkit info kimi-vl-a3")
    assert done.returncode == 1
    assert done.stderr.startswith("vlkit: ")
    assert "kimi-vl-a3b" in done.stderr
    assert "Traceback" not in done.stderr
    assert issubclass(UnknownModelError, VlkitError)


@pytest.mark.parametrize("size", ["big", "10", "10x", "-3x4", "1.5x2"])
def test_a_size_that_is_none_is_refused(size: str) -> None:
    done = CliRunner().invoke(app, ["info", "kimi-vl-tiny", f"--image={size}"])
    assert done.exit_code == 2
    assert "is not a size" in done.output


def test_a_registered_name_is_told_from_a_folder() -> None:
    with pytest.raises(VlkitError, match="is a registered model"):
        _run("generate", "qwen3-vl-tiny", "--prompt", "hi")


def test_generate_takes_videos_and_the_thinking_switch(tmp_path: Path) -> None:
    (tmp_path / "frames").mkdir()
    for index in range(3):
        Image.new("RGB", (64, 64), (80 * index, 0, 0)).save(tmp_path / "frames" / f"{index}.png")
    for name in ("qwen2-vl-tiny", "andesvl-tiny"):
        vlkit.create_model(name).save_pretrained(tmp_path / name)
        vlkit.create_processor(name).save_pretrained(tmp_path / name)
    seen = ("--video", str(tmp_path / "frames"), "--prompt", "hi", "--max-new-tokens", "2")
    assert _run("generate", str(tmp_path / "qwen2-vl-tiny"), *seen).exit_code == 0
    with pytest.raises(VlkitError, match="no videos"):
        _run("generate", str(tmp_path / "andesvl-tiny"), *seen)
    thinks = ("--thinking", "--prompt", "hi", "--max-new-tokens", "2")
    assert _run("generate", str(tmp_path / "andesvl-tiny"), *thinks).exit_code == 0
