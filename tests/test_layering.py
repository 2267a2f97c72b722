"""Imports point one way, and every room holds only what belongs there."""

from __future__ import annotations

import ast
import importlib
import pkgutil
from pathlib import Path

import pytest
from torch import nn

ROOT = Path(__file__).parent.parent / "vlkit"
FOUNDATIONS = {"config", "registry", "packing", "errors", "version"}
MIDDLE = {"layers", "hub", "processing", "objectives", "optim"}
PARTS = {"vision", "projectors", "llm"}
# The demo and the command line stand on everything; the face names things and imports them when asked.
MAY_IMPORT = {
    **dict.fromkeys(FOUNDATIONS, FOUNDATIONS),
    **{room: FOUNDATIONS | {room} for room in MIDDLE},
    "optim": FOUNDATIONS | {"optim", "hub"},  # its states are files like checkpoints
    "processing": FOUNDATIONS | {"processing", "hub"},  # vocabularies and settings come from repositories too
    **{room: FOUNDATIONS | MIDDLE | {room} for room in PARTS},
    "generation": FOUNDATIONS | MIDDLE | PARTS | {"generation"},
    "models": FOUNDATIONS | MIDDLE | PARTS | {"generation", "models"},
    "summary": FOUNDATIONS | MIDDLE | PARTS | {"generation", "models"},
    "testing": FOUNDATIONS | MIDDLE | PARTS | {"generation", "models", "testing"},
    "training": FOUNDATIONS | MIDDLE | PARTS | {"generation", "models", "summary", "training"},
}
FREE = {"__init__", "__main__", "cli", "demo"}


def rooms_imported(path: Path) -> set[str]:
    """Rooms of vlkit that a file imports, anywhere in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names = (
                [f"{node.module}.{alias.name}" for alias in node.names]
                if node.module == "vlkit"
                else [node.module or ""]
            )
        else:
            continue
        found |= {name.split(".")[1] for name in names if name.startswith("vlkit.")}
    return found


@pytest.mark.parametrize("path", sorted(ROOT.rglob("*.py")), ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_point_one_way(path: Path) -> None:
    room = path.relative_to(ROOT).parts[0].removesuffix(".py")
    if room in FREE:
        return
    assert room in MAY_IMPORT, f"{room} is a new room: say in MAY_IMPORT what it may import"
    assert rooms_imported(path) <= MAY_IMPORT[room]


def test_models_hold_one_module() -> None:
    """A family is data: only vlm.py defines an nn.Module."""
    for path in (ROOT / "models").glob("*.py"):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        modules = [
            node.name
            for node in ast.walk(tree)
            if isinstance(node, ast.ClassDef) and any("Module" in ast.unparse(base) for base in node.bases)
        ]
        assert not modules or path.name == "vlm.py", f"{path.name} defines {modules}"


def test_a_module_inherits_from_nothing_but_nn_module() -> None:
    """Compose, do not inherit."""
    for info in pkgutil.walk_packages([str(ROOT)], prefix="vlkit."):
        if info.name == "vlkit.__main__":
            continue
        for name, found in vars(importlib.import_module(info.name)).items():
            if isinstance(found, type) and issubclass(found, nn.Module) and found.__module__ == info.name:
                assert found.__bases__ in {(nn.Module,), (nn.LayerNorm,)}, (
                    f"{info.name}.{name} inherits from {found.__bases__}"
                )
