"""Published stages as data: every number has a source, and what nobody stated has to be said."""

from __future__ import annotations

import re
import tomllib
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

import vlkit
from vlkit.cli import app
from vlkit.errors import ConfigError, UnknownModelError
from vlkit.training import TrainConfig
from vlkit.training.build import make_optimizer, trained_parts
from vlkit.training.presets import Fact, Stage, Unknown, list_presets, preset, report, unknown
from vlkit.training.presets.fact import plain, put
from vlkit.training.ranks import Ranks

ALL = list_presets()


def test_every_stage_that_the_recipes_have_is_there() -> None:
    assert [name.split("/")[1] for name in list_presets("kimi-vl/*")] == (
        ["vit-coca", "alignment", "joint", "cooldown", "long-32k", "long-128k", "sft-32k", "sft-128k", "long-cot", "rl"]
    )
    assert [name.split("/")[1] for name in list_presets("andesvl/*")] == (
        ["alignment", "joint", "multitask-instruct", "multitask-thinking", "sft", "mpo", "grpo"]
    )
    assert list_presets("ui-tars/*") == ["ui-tars/continual", "ui-tars/sft", "ui-tars/dpo"]
    assert list_presets("aguvis/*-72b") == ["aguvis/grounding-72b", "aguvis/planning-72b"]
    assert list_presets("mobilevlm/*") == ["mobilevlm/stage-1", "mobilevlm/stage-2", "mobilevlm/sft"]
    assert len(ALL) == len(set(ALL)) == 27


@pytest.mark.parametrize("name", ALL)
def test_every_value_says_where_it_is_from_and_every_gap_why_it_is_one(name: str) -> None:
    stage = preset(name)
    entries = [*stage.about.values(), *stage.sets.values()]
    assert len(entries) > 8
    for entry in entries:
        if isinstance(entry, Unknown):
            assert len(entry.why) >= len("not stated")
            continue
        assert entry.value is not None
        assert entry.sure in ("read", "summary", "recalled")
        # A paper by its number, or a public repository by owner and name.
        assert re.search(r"arXiv:\d{4}\.\d{5}|^[\w-]+/[\w-]+, ", entry.source), entry.source


@pytest.mark.parametrize("name", ALL)
def test_a_stage_states_or_leaves_open_what_every_run_needs(name: str) -> None:
    sets = preset(name).sets
    for path in (
        "objective.kind",
        "train",
        "optimizer.kind",
        "optimizer.lr",
        "optimizer.weight_decay",
        "schedule.warmup",
    ):
        assert path in sets
    assert {"epochs", "steps|epochs"} & set(sets)
    assert {"batch", "batch|packs"} & set(sets)
    assert {"schedule.shape", "schedule.decay"} & set(sets)
    kind = sets["objective.kind"]
    if isinstance(kind, Fact) and kind.value == "next-token":
        assert {"data.pack_tokens", "data.max_tokens"} & set(sets)
        assert "data.labels" in sets


def test_kimi_vl_sums_to_its_tokens() -> None:
    def tokens(stage: str) -> float:
        entry = preset(f"kimi-vl/{stage}").about["tokens"]
        assert isinstance(entry, Fact)
        return entry.value

    assert tokens("long-32k") == tokens("long-128k")  # stated together
    joint = tokens("joint") + tokens("cooldown") + tokens("long-32k")
    assert joint == pytest.approx(2.3e12)  # as the report says of the joint recipe
    assert tokens("vit-coca") + tokens("alignment") + joint == pytest.approx(4.4e12)


def test_numbers_of_the_recipes() -> None:
    long = [preset(f"kimi-vl/{name}").known() for name in ("joint", "long-32k", "long-128k")]
    assert [stage["data"]["pack_tokens"] for stage in long] == [8192, 4 * 8192, 16 * 8192]
    assert [stage.get("rope_theta") for stage in long] == [None, 8e5, 8e5]
    for name, peak, low in (("sft-32k", 2e-5, 2e-6), ("sft-128k", 1e-5, 1e-6)):
        known = preset(f"kimi-vl/{name}").known()
        assert known["optimizer"]["lr"] == peak
        assert peak * known["schedule"]["final"] == pytest.approx(low)
    assert preset("kimi-vl/vit-coca").known()["objective"] == {"kind": "contrast", "caption_weight": 2.0}
    assert preset("kimi-vl/alignment").known()["train"] == ["vision", "projector"]
    for size, rate in (("7b", 1e-5), ("72b", 5e-6)):
        for part in ("grounding", "planning"):
            known = preset(f"aguvis/{part}-{size}").known()
            assert (known["optimizer"]["lr"], known["batch"], known["train"]) == (rate, 128, ["projector", "llm"])
            assert known["resolution"] == {"points": [[0.0, 937_664]]}
            assert known["schedule"]["warmup"] == 0.03
    batches = [preset(name).known()["batch"] for name in list_presets("mobilevlm/*")]
    assert batches == [512, 224, 384]
    assert [len(preset(name).known()["train"]) for name in list_presets("mobilevlm/*")] == [3, 3, 2]
    assert preset("ui-tars/continual").known()["schedule"] == {"decay": 0}


def test_rates_that_nobody_published_are_unknown() -> None:
    for name in (*list_presets("andesvl/*"), *list_presets("ui-tars/*"), "kimi-vl/joint", "kimi-vl/rl"):
        assert "optimizer.lr" in preset(name).unknown()
    assert "objective.tau" in preset("kimi-vl/rl").unknown()
    assert "objective.beta" in preset("ui-tars/dpo").unknown()
    assert preset("aguvis/planning-7b").unknown() == {}


def test_a_run_that_leaves_gaps_is_refused_with_all_of_them() -> None:
    stage = preset("kimi-vl/sft-128k")
    with pytest.raises(ConfigError, match="say it in the stage") as refusal:
        stage.refuse_gaps({"packs": 2, "optimizer": {"weight_decay": 0.1}})
    listed = str(refusal.value).splitlines()[1:]
    assert [line.split(":")[0].strip() for line in listed] == [
        "schedule.warmup",
        "schedule.shape",
        "balance_rate",
        "steps",
    ]
    assert "warmed up again" in listed[0]
    assert "sources have epochs = 1, and how many packs" in listed[3]
    said = {"batch": 2, "optimizer": {"weight_decay": 0.0}, "schedule": {"warmup": 0, "shape": "linear"}}
    with pytest.raises(ConfigError, match="balance_rate"):
        stage.refuse_gaps({**said, "balance_rate": None})
    stage.refuse_gaps({**said, "balance_rate": 0.0})
    with pytest.raises(ConfigError, match="steps or epochs"):
        preset("kimi-vl/joint").refuse_gaps({"optimizer": 3})


def test_what_is_known_is_a_table_of_its_own() -> None:
    preset("kimi-vl/sft-32k").known()["data"]["labels"]["on"] = "all"
    assert preset("kimi-vl/sft-32k").known()["data"]["labels"] == {"on": "answers", "special": "answers"}


def test_a_name_that_is_none_gets_the_nearest() -> None:
    with pytest.raises(UnknownModelError, match="did you mean kimi-vl/sft-32k"):
        preset("kimi-vl/sft32k")


def test_a_list_of_stages_is_toml_that_says_what_is_known() -> None:
    stages = [preset(name) for name in ALL]
    found = tomllib.loads(report.toml(stages))["stages"]
    for stage, table in zip(stages, found, strict=True):
        assert table.pop("name") == stage.name.replace("/", "-")
        assert table.pop("preset") == stage.name
        assert table == stage.known()
    text = report.toml([preset("kimi-vl/rl")])
    assert 'name = "rl"' in text
    assert "# objective.tau =    unknown: a strength above 0 that is not stated" in text
    assert "# steps or epochs =" in text


def test_a_table_shows_values_sources_and_certainty() -> None:
    made = Stage(
        "a/b",
        "A stage",
        about={"tokens": Fact(2.5e11, "arXiv:0000.00000, section 1", "summary")},
        sets={
            "optimizer.lr": Fact(2e-5, "arXiv:0000.00000, section 1", note="of all"),
            "steps|epochs": unknown("not stated"),
        },
    )
    assert report.table(made).splitlines() == [
        "a/b: A stage",
        "  tokens  0.25 T  [1, as a summary has it]",
        "  in a run's config:",
        "    optimizer.lr     2e-5  [1] of all",
        "    steps or epochs  ?  not stated",
        "  [1] arXiv:0000.00000, section 1",
    ]
    assert report.overview([made]).splitlines()[1] == "a/b                    2e-5  1       A stage"


def test_the_command_shows_them() -> None:
    run = CliRunner().invoke
    lines = run(app, ["stages"]).output.splitlines()
    assert [line.split()[0] for line in lines[1:]] == ALL
    shown = run(app, ["stages", "mobilevlm/sft"]).output
    assert shown == report.table(preset("mobilevlm/sft")) + "\n"
    assert "512" in run(app, ["stages", "mobilevlm/*", "--toml"]).output
    refused = run(app, ["stages", "kimi"])
    assert "no stage fits 'kimi'; `vlkit stages` lists all, '*kimi*' does" in str(refused.exception)


# What a run might say where sources say nothing.
SAID = {
    "train": ["llm"],
    "steps|epochs": 4,
    "batch|packs": 2,
    "batch": 2,
    "data.pack_tokens": 64,
    "data.labels": {"on": "all"},
    "data.streams": [{"name": "text", "files": ["text.jsonl"], "share": [[0.0, 1.0], [1.0, 0.6]]}],
    "data.draws": "prioritised",
    "resolution.points": [[0.0, 4096], [0.5, 8192]],
    "objective.tau": 0.1,
    "objective.beta": 0.1,
    "objective.weights": [0.8, 0.2, 1.0],
    "objective.verifier": "exact",
    "objective.group": 4,
    "objective.max_new_tokens": 8,
    "objective.clip": [0.2, 0.2],
    "objective.kl_weight": 0.0,
    "objective.length_weight": 0.5,
    "objective.length_from": 0.5,
    "optimizer.kind": "adamw",
    "optimizer.lr": 1e-3,
    "optimizer.weight_decay": 0.1,
    "schedule.warmup": 0.25,
    "schedule.shape": "linear",
    "schedule.final": 0.1,
    "balance_rate": 1e-3,
}
FIRST = {"steps|epochs": "steps", "batch|packs": "batch"}


def filled(name: str) -> dict[str, Any]:
    """A stage of a run that takes a preset and says what is unknown, and nothing else."""
    table: dict[str, Any] = {"name": name.replace("/", "-"), "preset": name}
    for path in preset(name).unknown():
        put(table, FIRST.get(path, path), SAID[path])
    if "streams" in preset(name).known().get("data", {}):
        table.setdefault("data", {})["streams"] = [{"name": n, "files": [f"{n}.jsonl"]} for n in ("long", "replay")]
    return table


@pytest.mark.parametrize("name", ALL)
def test_a_run_takes_what_is_known_and_what_it_says_of_the_rest(name: str) -> None:
    base = {"run": "run", "model": {"name": "kimi-vl-tiny"}, "data": {"files": ["train.jsonl"]}, "steps": 9}
    ((_, stage),) = TrainConfig.from_dict({**base, "stages": [filled(name)]}).resolved_stages()
    values = plain(stage.to_dict())
    for path, entry in preset(name).sets.items():
        wanted = entry.value if isinstance(entry, Fact) else SAID[path]
        if path == "data.streams" and isinstance(entry, Fact):
            assert [(s["name"], s["share"]) for s in values["data"]["streams"]] == [("long", 0.25), ("replay", 0.75)]
            continue
        found: Any = values
        for key in FIRST.get(path, path).split("."):
            found = found[key]
        subset = {k: found[k] for k in wanted} if isinstance(wanted, dict) else found
        assert plain(subset) == plain(wanted if path != "data.streams" else found), path
    if unknowns := preset(name).unknown():
        with pytest.raises(ConfigError, match=re.escape(next(iter(unknowns)).replace("|", " or "))):
            TrainConfig.from_dict({**base, "stages": [{"name": "gaps", "preset": name}]})


@pytest.mark.parametrize(
    ("name", "model", "frozen"),
    [
        ("kimi-vl/sft-32k", "kimi-vl-tiny", set()),
        ("andesvl/alignment", "andesvl-tiny", {"llm"}),
        ("aguvis/planning-7b", "qwen2-vl-tiny", {"vision"}),
    ],
)
def test_rates_of_parts_and_layers_go_with_a_preset(name: str, model: str, frozen: set[str]) -> None:
    """What trains and the rate are the preset's; a run may give its parts rates of their own, and its layers a decay."""
    own = filled(name)
    base = {"run": "run", "model": {"name": model}, "data": {"files": ["x.jsonl"]}, "steps": 9}
    optimizer = {**own.get("optimizer", {}), "part_lr": {"projector": 3e-4}}
    if "llm" not in frozen:
        optimizer["layer_decay"] = {"llm": 0.5}
    ((_, stage),) = TrainConfig.from_dict({**base, "stages": [{**own, "optimizer": optimizer}]}).resolved_stages()
    network, ranks = vlkit.create_model(model), Ranks(0, 1, torch.device("cpu"))
    made = make_optimizer(trained_parts(network, None, stage, ranks), stage, ranks)
    rates = {each: group["lr"] for group in made.param_groups for each in group["param_names"]}
    assert {each.split(".")[0] for each in rates} == {"vision", "projector", "llm"} - frozen
    lr, blocks = stage.optimizer.lr, len(network.llm.blocks)
    known = preset(name).sets["optimizer.lr"]
    assert lr == (known.value if isinstance(known, Fact) else SAID["optimizer.lr"])
    for each, rate in rates.items():
        if each.startswith("projector"):
            wanted = 3e-4
        elif each.startswith("llm.blocks."):
            wanted = lr * 0.5 ** (blocks - int(each.split(".")[2]))
        elif each == "llm.embedding.weight":
            wanted = lr * 0.5 ** (blocks + 1)
        else:
            wanted = lr
        assert rate == pytest.approx(wanted), each
