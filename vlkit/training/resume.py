"""What is saved of a run beside its tensors, and whether a run may go on from it."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from vlkit.errors import ConfigError
from vlkit.optim import Muon
from vlkit.training.config import TrainConfig
from vlkit.training.progress import Progress
from vlkit.training.ranks import Ranks, as_change, first_difference
from vlkit.training.run_stages import Stage
from vlkit.training.stage_run import StageRun

# What a run may not be resumed with when it has changed; everything else may change, and is said.
FIXED = ("model", "parameters", "processor", "data", "seed", "shuffle", "objective", "draws")
# What those of them were that a run did not write down before there was anything else.
BEFORE = {"objective": "next-token", "draws": "epochs"}
# Options that decide which parameters are in one group of the optimizer, whose saved state is by groups.
GROUPING = ("kind", "muon", "adamw", "part_lr", "layer_decay", "decay_vectors")


def run_state(run: StageRun, config: TrainConfig, fingerprint: Mapping[str, Any]) -> dict[str, Any]:
    """All of a run that is no tensor, as JSON."""
    return {
        "progress": vars(run.progress),
        **run.state(),
        "random": "drawn from seed, step and rank",
        "schedule": {"total": run.stage.steps, **run.config.schedule.to_dict()},
        "stage": run.stage.name,
        "before": run.stage.before,
        "ranks": run.ranks.size,
        "config": config.to_dict(),
        "fingerprint": fingerprint,
        "groups": groups_of(run.optimizer),
    }


def groups_of(optimizer: Muon) -> list[list[Any]]:
    """Algorithm and names of every group of the optimizer."""
    return [[group["algorithm"], sorted(group["param_names"])] for group in optimizer.param_groups]


def check_resumable(
    path: Path,
    state: Mapping[str, Any],
    config: TrainConfig,
    stages: Sequence[Stage],
    fingerprints: Sequence[Mapping[str, Any]],
    ranks: Ranks,
    say: Callable[[str], object],
) -> None:
    """Refuse to go on with another model, other data or another kind of objective, in another stage, or beyond the end; say what
    else has changed.

    Raises:
        ConfigError: With what has changed.
    """
    progress = Progress.from_dict(state["progress"])
    name, before = state.get("stage", ""), state.get("before", 0)
    found = next((stage for stage in stages if stage.name == name), None)
    if found is None or (found.number, found.before) != (progress.stage, before):
        asked = (
            "is not in the config" if found is None else f"begins at step {found.before} of the config, not at {before}"
        )
        raise ConfigError(
            f"{path}: the run cannot go on with this config: it is in stage {name!r}, which {asked}. Give the new run another "
            "folder with `run`"
        )
    for key in FIXED:
        was, now = (_fixed(each, key) for each in (state["fingerprint"], fingerprints[found.number]))
        if difference := first_difference(was, now, key):
            raise ConfigError(
                f"{path}: the run cannot go on with this config: {difference}. Give the new run another folder with `run`"
            )
    total = stages[-1].before + stages[-1].steps
    if progress.step > total or progress.stage_step > found.steps:
        asked_for = (
            f"the config asks for {total}" if not name else f"stage {name!r} ends at {found.before + found.steps}"
        )
        raise ConfigError(
            f"{path}: {progress.step} steps are done, and {asked_for}: there is nothing to do, and nothing was "
            "changed. Ask for more steps, or give the shorter run another folder with `run`"
        )
    saved = _fields(_as_now(state["config"]))
    for key, value in _fields(_plain(config)).items():
        if difference := first_difference(saved.get(key), value, key, as_change):
            say(f"changed since {path.name}: {difference}")
    if state["ranks"] != ranks.size:
        say(f"changed since {path.name}: ranks: {as_change(str(state['ranks']), str(ranks.size))}")


def check_groups(path: Path, state: Mapping[str, Any], optimizer: Muon, config: TrainConfig) -> None:
    """Refuse a state whose groups are others.

    Raises:
        ConfigError: With the options that made them others.
    """
    if state.get("groups", groups_of(optimizer)) == groups_of(optimizer):
        return
    before, now = state["config"].get("optimizer", {}), _plain(config)["optimizer"]
    changes = [first_difference(before.get(key), now[key], f"optimizer.{key}", as_change) for key in GROUPING]
    said = ", ".join(filter(None, changes)) or "other rates are equal than were"
    raise ConfigError(
        f"{path}: the run cannot go on with this config: its optimizer groups the parameters in another way, and the "
        f"saved state is by groups ({said}). Set that back, or give the new run another folder with `run`"
    )


def keep_state(before: Muon, now: Muon) -> int:
    """Collective. Take over the state of parameters that both optimizers have, by name; how many there are.

    A parameter that another algorithm updates now begins anew.
    """
    state = before.full_state_dict()
    algorithms = [
        {name: group["algorithm"] for group in optimizer.param_groups for name in group["param_names"]}
        for optimizer in (before, now)
    ]
    names = [name for name, algorithm in algorithms[1].items() if algorithms[0].get(name) == algorithm]
    chosen = set(names)
    kept = None
    if state:
        groups = [{**group, "params": [n for n in group["params"] if n in chosen]} for group in state["param_groups"]]
        tensors = {name: value for name, value in state["state"].items() if name in chosen}
        kept = {**state, "state": tensors, "param_groups": groups}
    anew = [f"^{re.escape(name)}$" for name in algorithms[1] if name not in chosen]
    now.load_full_state_dict(kept, reinitialize=anew, options=False)
    return len(names)


def _plain(config: TrainConfig) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(json.dumps(config.to_dict()))
    return found


def _fixed(fingerprint: Mapping[str, Any], key: str) -> Any:
    """What must be as it was. How many tokens' logits exist at once is how a loss is computed, and not what a model is."""
    value = fingerprint.get(key, BEFORE.get(key))
    return {name: each for name, each in value.items() if name != "loss_chunk"} if key == "model" else value


def _fields(config: Mapping[str, Any]) -> dict[str, Any]:
    """What is told where it has changed; models and files are compared by what they are, not where."""
    data = config.get("data", {})
    told = {key: value for key, value in config.items() if key not in ("run", "model", "data")}
    told |= {f"data.{key}": value for key, value in data.items() if key not in ("files", "streams")}
    return told | {f"data.streams.{each['name']}.share": each.get("share") for each in data.get("streams", ())}


def _as_now(saved: Mapping[str, Any]) -> Mapping[str, Any]:
    """A config as it was saved, with the fields that have come since; as it is where it is none any more."""
    try:
        return _plain(TrainConfig.from_dict(saved))
    except ConfigError:
        return saved
