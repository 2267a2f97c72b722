"""The public face: its names, what importing it costs in modules, and the README's own code."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

import vlkit

ROOT = Path(__file__).parent.parent
PUBLIC = [
    "list_models",
    "list_components",
    "create_model",
    "compose",
    "from_pretrained",
    "Processor",
    "Batch",
    "Layout",
    "Packed",
    "VisionLanguageModel",
    "VLMConfig",
    "Output",
    "vision",
    "projectors",
    "llm",
    "layers",
    "models",
    "processing",
    "generation",
    "objectives",
    "optim",
    "hub",
    "testing",
    "training",
]


@pytest.mark.parametrize("name", PUBLIC)
def test_public_name(name: str) -> None:
    assert getattr(vlkit, name) is not None
    assert name in dir(vlkit)


def test_other_names_are_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'form_pretrained'"):
        _ = vlkit.form_pretrained


def imported_by(code: str) -> set[str]:
    """Top-level and vlkit modules that a fresh interpreter has after running the code."""
    script = f"{code}\nimport sys; print('\\n'.join(sys.modules))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, cwd=ROOT)
    return set(done.stdout.split())


def test_import_loads_nothing_that_is_not_used() -> None:
    """Optional and heavy packages wait until they are needed."""
    loaded = imported_by("import vlkit")
    assert not loaded & {
        "timm",
        "tokenizers",
        "tiktoken",
        "jinja2",
        "transformers",
        "huggingface_hub",
        "PIL",
        "vlkit.models",
    }


def test_help_does_not_import_torch() -> None:
    loaded = imported_by("import vlkit.cli")
    assert not loaded & {"torch", "numpy", "PIL", "huggingface_hub", "transformers"}


def blocks(text: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL)


README = (ROOT / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("block", blocks(README, "python"), ids=lambda b: b.strip().splitlines()[-1][:40])
def test_readme_block_runs(block: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    exec(compile(block, "README.md", "exec"), {"__name__": "readme"})


def test_readme_has_blocks() -> None:
    assert len(blocks(README, "python")) >= 3


@pytest.mark.parametrize("page", sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")]), ids=lambda p: p.name)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)[^)]*\)", page.read_text(encoding="utf-8")):
        if not target.startswith(("http://", "https://", "mailto:")):
            assert (page.parent / target).exists(), f"{page.name} links to {target}"


@pytest.mark.parametrize("example", sorted(ROOT.glob("examples/*.py")), ids=lambda p: p.name)
def test_example_runs(example: Path, tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, str(example), "--small"],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
