"""`vlkit plan`: numbers for people and for programs, refusals with the way out, and a page that shows what it prints."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from vlkit.cli import app
from vlkit.errors import VlkitError
from vlkit.training import read_train_config
from vlkit.training.plan import plan

PAGE = Path(__file__).parents[2] / "docs" / "plans" / "kimi-vl.md"
TINY = ("plan", "kimi-vl-tiny", "--sequence", "64", "--image", "16x16")


def run(*arguments: str) -> Result:
    return CliRunner().invoke(app, list(arguments), catch_exceptions=False)


def test_it_prints_the_plan() -> None:
    assert run(*TINY, "--ranks", "2").stdout == f"{plan('kimi-vl-tiny', sequence=64, image=(16, 16), ranks=2)}\n"


def test_every_option_reaches_the_plan() -> None:
    values = {
        "ranks": 8,
        "dtype": "fp32",
        "compute_dtype": "bf16",
        "optimizer": "adamw",
        "sharding": "fsdp",
        "partition": "matrix",
        "replicate": 2,
        "expert_parallel": 2,
        "sequence": 40,
        "images_per_sequence": 2,
        "image": [16, 8],
        "micro_batch": 90,
        "micro_batches": 3,
        "checkpointing": "full",
    }
    options = [
        text
        for name, value in values.items()
        for text in (f"--{name.replace('_', '-')}", "16x8" if name == "image" else str(value))
    ]
    assert json.loads(run("plan", "kimi-vl-tiny", *options, "--json").stdout)["options"] == values


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--sequence", "5000"], "plan with sequence=4096 or less"),
        (["--ranks", "8", "--sharding", "fsdp", "--expert-parallel", "8"], "spread them over 5 ranks"),
        (["--expert-parallel", "2", "--ranks", "2"], "needs sharding='fsdp'"),
    ],
)
def test_what_cannot_be_is_refused_with_the_way_out(options: list[str], words: str) -> None:
    with pytest.raises(VlkitError, match=re.escape(words)):
        run("plan", "kimi-vl-tiny", *options)


def test_a_size_that_is_none_is_a_mistake_of_the_command() -> None:
    done = run("plan", "kimi-vl-tiny", "--image", "big")
    assert done.exit_code == 2
    assert "1024x768" in done.stderr


def quoted() -> list[tuple[str, str]]:
    """(command, output) of every block of the page."""
    blocks = re.findall(r"^```console\n\$ vlkit (.*?)\n(.*?)^```", PAGE.read_text("utf-8"), flags=re.M | re.S)
    return [(command.replace("\\\n", " "), output) for command, output in blocks]


@pytest.mark.parametrize(
    ("command", "output"), quoted(), ids=lambda text: text[-40:] if text.startswith("plan") else ""
)
def test_the_page_shows_what_the_command_prints(command: str, output: str) -> None:
    assert run(*shlex.split(command)).stdout == output


def test_the_page_has_small_and_large_runs() -> None:
    ranks = {int(re.findall(r"--ranks (\d+)", command)[0]) for command, _ in quoted()}
    assert {8, 64, 1024} <= ranks


def test_the_run_on_the_page_about_ranks_is_one(tmp_path: Path) -> None:
    page = (PAGE.parents[1] / "distributed.md").read_text("utf-8")
    (text,) = re.findall(r"^```toml\n(.*?)^```", page, flags=re.M | re.S)
    (tmp_path / "run.toml").write_text(text, encoding="utf-8")
    config = read_train_config(tmp_path / "run.toml")
    assert config.ranks.expert_parallel == 8
    assert config.run == str(tmp_path / "runs" / "first")
