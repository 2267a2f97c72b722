"""Stages of published recipes as data: what sources state, each number with its source, and what a run has to say itself.

    preset("kimi-vl/sft-32k").known()        {"epochs": 1.0, "optimizer": {"kind": "muon", "lr": 2e-05, ...}, ...}
    preset("kimi-vl/sft-32k").unknown()      {"schedule.warmup": "not stated", ...}
    [[stages]] preset = "kimi-vl/sft-32k"    in a config: its known values, under what the table says itself, which has
                                             to say all that is unknown

`vlkit stages` lists them, `vlkit stages 'kimi-vl/*' --toml` writes a list of stages to edit.
"""

from __future__ import annotations

import difflib
from fnmatch import fnmatchcase

from vlkit.errors import UnknownModelError
from vlkit.training.presets import aguvis, andesvl, kimi_vl, mobilevlm, ui_tars
from vlkit.training.presets.fact import Fact, Stage, Unknown, unknown

__all__ = ["Fact", "Stage", "Unknown", "list_presets", "preset", "unknown"]

_STAGES = {stage.name: stage for module in (kimi_vl, andesvl, ui_tars, aguvis, mobilevlm) for stage in module.STAGES}


def list_presets(pattern: str = "*") -> list[str]:
    """Names that fit a wildcard pattern, in the order of their recipes."""
    return [name for name in _STAGES if fnmatchcase(name, pattern)]


def preset(name: str) -> Stage:
    """A published stage.

    Raises:
        UnknownModelError: No such stage; with the nearest names.
    """
    if name not in _STAGES:
        near = difflib.get_close_matches(name, _STAGES, n=3)
        hint = f"did you mean {' or '.join(near)}?" if near else "`vlkit stages` lists them"
        raise UnknownModelError(f"there is no preset {name!r}; {hint}")
    return _STAGES[name]
