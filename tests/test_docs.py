"""Pages that quote code: what they show stands in the tree, and what they run runs."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
QUOTING = ["docs/adding-a-model.md"]
FAMILIES = sorted(f"docs/families/{page.name}" for page in ROOT.glob("docs/families/*.md"))


def blocks(page: str, language: str = "python") -> list[str]:
    return re.findall(
        rf"^```{language}\n(.*?)^```", (ROOT / page).read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL
    )


@pytest.mark.parametrize("page", QUOTING)
def test_quoted_code_stands_in_the_tree(page: str) -> None:
    """A block that begins with the path of a file is part of it, line by line; others run."""
    quoted = 0
    for block in blocks(page):
        first, rest = block.split("\n", 1)
        path = re.fullmatch(r"# (\S+\.py)", first)
        if path is None:
            exec(compile(block, page, "exec"), {"__name__": "docs"})
            continue
        quoted += 1
        assert rest in (ROOT / path[1]).read_text(encoding="utf-8"), f"{page}: not in {path[1]}:\n{rest}"
    assert quoted


@pytest.mark.parametrize("page", FAMILIES)
def test_code_of_family_pages_runs(page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for block in blocks(page):
        exec(compile(block, page, "exec"), {"__name__": "docs"})


def test_code_of_the_training_page_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its blocks are one program."""
    monkeypatch.chdir(tmp_path)
    names = {"__name__": "docs"}
    for block in blocks("docs/training.md"):
        exec(compile(block, "docs/training.md", "exec"), names)


@pytest.mark.slow
def test_code_of_the_training_page_about_adapters_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """PEFT takes seconds to import."""
    monkeypatch.chdir(tmp_path)
    (block,) = blocks("docs/training.md", "py")
    exec(compile(block, "docs/training.md", "exec"), {"__name__": "docs"})
    assert (tmp_path / "adapter/adapter_model.safetensors").is_file()


@pytest.mark.parametrize("page", ["docs/training.md", "docs/distributed.md"])
def test_configs_of_pages_are_configs(page: str) -> None:
    """With what they leave out: a model, data, a length."""
    from vlkit.training import TrainConfig

    for block in blocks(page, "toml"):
        values = tomllib.loads(block)
        data = values.pop("data", {})
        files = {} if "streams" in data else {"files": ["train.jsonl"]}
        base = {"run": "runs/docs", "model": {"name": "kimi-vl-tiny"}, "steps": 100}
        config = TrainConfig.from_dict({**base, **values, "data": {**files, **data}})
        assert config.resolved_stages()


@pytest.mark.parametrize("page", sorted(ROOT.glob("docs/*/*.md")), ids=lambda p: p.name)
def test_links_of_inner_pages_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)[^)]*\)", page.read_text(encoding="utf-8")):
        if not target.startswith(("http://", "https://", "mailto:")):
            assert (page.parent / target).exists(), f"{page.name} links to {target}"
