"""Stages: each is the run's config with some fields changed, trains what it names and nothing else, and resumes anywhere."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.testing import assert_close

import vlkit
from tests.ranks import run_ranks
from tests.training.runs import metrics, until, weights
from tests.training.samples import small_config, write_samples
from vlkit.errors import CheckpointError, ConfigError
from vlkit.training import TrainConfig, train
from vlkit.training.contrast_heads import ContrastConfig, ContrastHeads
from vlkit.training.ranks import Ranks
from vlkit.training.run_stages import Stage
from vlkit.training.stage_models import StageModels
from vlkit.training.tasks.next_token import NextToken
from vlkit.training.text_encoder import TextEncoderConfig

ALIGN = {"name": "align", "train": ["projector"], "steps": 3}
ALL = {"name": "sft", "steps": 4, "optimizer": {"lr": 1e-3}, "schedule": {"warmup": 2, "final": 0.1}}


def staged(folder: Path, *stages: dict[str, Any], **changes: Any) -> TrainConfig:
    return small_config(folder, **{"steps": None, "stages": stages or (ALIGN, ALL), **changes})


def of_stage(config: TrainConfig, name: str) -> dict[str, Tensor]:
    return dict(vlkit.from_pretrained(Path(config.run) / "stages" / name).state_dict())


def test_a_stage_changes_the_fields_that_it_names_and_no_other(tmp_path: Path) -> None:
    base = small_config(tmp_path, optimizer={"lr": 3e-3, "weight_decay": 0.2}, objective={"kind": "next-token"})
    stages = [
        {"name": "one", "optimizer": {"lr": 1e-4}, "epochs": 2},
        {"name": "two", "packs": 2, "data": {"pack_tokens": 90}, "micro_batch": None},
        {"name": "three", "objective": {"kind": "next-token", "normalise": "square"}, "train": ["llm"]},
        {"name": "four", "objective": {"kind": "dpo", "beta": 0.3}},
    ]
    found = dict(base.replace(stages=stages).resolved_stages())
    assert found["one"] == base.replace(optimizer=base.optimizer.replace(lr=1e-4), epochs=2.0, steps=None)
    data = base.data.replace(pack_tokens=90)
    assert found["two"] == base.replace(packs=2, batch=None, data=data, micro_batch=None)
    assert found["three"].task[0] == base.replace(objective=stages[2]["objective"]).task[0]
    assert found["four"].objective == {"kind": "dpo", "beta": 0.3}
    assert base.resolved_stages() == [("", base)]


def test_streams_of_a_stage_are_merged_by_their_names(tmp_path: Path) -> None:
    streams = [{"name": "a", "files": ["a.jsonl"], "share": 0.25}, {"name": "b", "files": ["b.jsonl"]}]
    config = small_config(
        tmp_path, data={"streams": streams}, stages=[{"name": "s", "data": {"streams": [{"name": "a"}]}}]
    )
    assert [stream.to_dict() for _, own in config.resolved_stages() for stream in own.data.streams] == [
        {"name": "a", "files": ["a.jsonl"], "share": 0.25}
    ]
    files = small_config(tmp_path, data={"streams": streams}, stages=[{"name": "s", "data": {"files": ["c.jsonl"]}}])
    assert files.resolved_stages()[0][1].data.streams == ()


@pytest.mark.parametrize(
    ("stages", "message"),
    [
        (["align"], r"stage 1 is no table: 'align'"),
        ([{"train": ["llm"]}], r"stage 1 needs a name of letters, .* found None"),
        ([{"name": "a/b"}], r"stage 1 needs a name .* found 'a/b'"),
        ([{"name": "a"}, {"name": "a"}], r"two stages are called 'a'"),
        ([{"name": "a", "seed": 3}], r"stage 'a': seed belongs to the whole run"),
        ([{"name": "a", "model": {"name": "kimi-vl-tiny"}}], r"stage 'a': model belongs to the whole run"),
        ([{"name": "a", "trian": ["llm"]}], r"stage 'a': TrainConfig has no field 'trian'; did you mean 'train'"),
        ([{"name": "a", "train": []}], r"stage 'a': TrainConfig.train: nothing is named"),
        ([{"name": "a", "steps": None}], r"stage 'a': TrainConfig: give either steps or epochs"),
        ([{"name": "a", "keep_state": True}], r"stage 'a': keep_state: no stage is before it"),
        (
            [{"name": "a", "schedule": {"warmup": 11}}],
            r"stage 'a': .*warmup=11 and decay=None do not fit into steps=10",
        ),
        ([{"name": "a", "max_positions": 64}], r"stage 'a': TrainConfig.max_positions: .* set both"),
        ([{"name": "a", "packs": 2}], r"stage 'a': TrainConfig.packs: packs of how many tokens\? set data.pack_tokens"),
        ([{"name": "a", "preset": 3}], r"stage 'a': preset: expected the name of a preset, found 3"),
        ([{"name": "a", "preset": "kimi-vl/sft-32k"}], r"its sources leave open what a run has to know"),
    ],
)
def test_stages_that_are_none_are_refused(tmp_path: Path, stages: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        small_config(tmp_path, stages=stages)


def test_a_part_that_is_not_there_is_refused_before_the_first_step(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="'vison' names no parameter; parts of this model are vision, projector, llm"):
        train(staged(tmp_path, ALIGN, {"name": "b", "steps": 1, "train": ["vison"]}))
    assert not (tmp_path / "run/metrics.jsonl").exists()


def test_a_stage_takes_what_is_known_of_a_published_one(tmp_path: Path) -> None:
    own = {
        "batch": 5,
        "schedule": {"warmup": 0, "shape": "linear"},
        "balance_rate": 0.0,
        "optimizer": {"weight_decay": 0.1},
    }
    config = staged(tmp_path, {"name": "sft", "preset": "kimi-vl/sft-32k", **own}, micro_batch=None)
    ((_, stage),) = config.resolved_stages()
    assert (stage.optimizer.lr, stage.schedule.final, stage.epochs, stage.data.pack_tokens) == (2e-5, 0.1, 1.0, 32768)


def test_every_stage_changes_only_what_it_trains(tmp_path: Path) -> None:
    """Every tensor is compared by its bits, buffers too."""
    model = {"name": "kimi-vl-tiny", "overrides": {"llm": {"num_layers": 3}}}  # of the blocks, 1 and 2 have experts
    last = {"name": "last", "train": ["llm.blocks.1", "vision.blocks.*.attn"], "steps": 2}
    config = staged(tmp_path, ALIGN, last, model=model)
    lines: list[str] = []
    train(config, say=lines.append)
    torch.manual_seed(config.seed)
    start = vlkit.create_model("kimi-vl-tiny", llm={"num_layers": 3}).state_dict()
    align, end = of_stage(config, "1-align"), of_stage(config, "2-last")
    changed = [
        {name for name in after if not torch.equal(before[name], after[name])}
        for before, after in ((start, align), (align, end))
    ]
    assert changed[0] == {name for name in start if name.startswith("projector.")}
    assert changed[1] == {
        name
        for name in start
        if name.startswith("llm.blocks.1.") or (name.startswith("vision.blocks.") and ".attn." in name)
    }
    assert_close(weights(config), end, rtol=0, atol=0)
    assert any(
        line.startswith("stage align (1/2): vision frozen of ") and ", projector trains of" in line for line in lines
    )


def test_the_rate_of_every_stage_begins_anew(tmp_path: Path) -> None:
    config = staged(tmp_path)
    lines: list[str] = []
    train(config, say=lines.append)
    entries = metrics(config)
    assert [(entry["stage"], entry["step"]) for entry in entries] == [("align", i) for i in (1, 2, 3)] + [
        ("sft", i) for i in (4, 5, 6, 7)
    ]
    assert [entry["lr"] for entry in entries[3:]] == pytest.approx([5e-4, 1e-3, 1e-3, 5.5e-4])
    assert set(entries[0]["rates"]) == {"projector"}
    assert set(entries[3]["rates"]) == {"vision", "projector", "llm"}
    assert any(line.startswith("step 5/7  stage sft 2/4  loss") for line in lines)


@pytest.mark.parametrize("stop", [pytest.param(2, marks=pytest.mark.slow), 3, pytest.param(4, marks=pytest.mark.slow)])
def test_a_run_of_stages_resumes_bit_for_bit(tmp_path: Path, stop: int) -> None:
    """Stopped within the first stage, at its end, and within the second; packs and threads too."""
    changes: dict[str, Any] = {
        "packs": 2,
        "micro_batch": None,
        "data": {"files": [str(tmp_path / "train.jsonl")], "workers": 2, "pack_tokens": 300},
    }
    whole = staged(tmp_path, ALIGN, {**ALL, "keep_state": True}, **changes)
    halves = whole.replace(run=str(tmp_path / "halves"))
    train(whole)
    until(halves, stop)
    train(halves)
    assert_close(weights(halves), weights(whole), rtol=0, atol=0)
    assert [{**m, "tokens_per_second": 0} for m in metrics(halves)] == [
        {**m, "tokens_per_second": 0} for m in metrics(whole)
    ]


def test_the_state_of_the_optimizer_is_kept_by_name_where_a_stage_says_so(tmp_path: Path) -> None:
    """Two stages alike with the state kept are one, but for the samples and rates, which both are made the same here."""
    data = {"files": [str(write_samples(tmp_path, 3))], "workers": 0, "shuffle": False}
    options: dict[str, Any] = {"data": data, "batch": 3, "schedule": {"decay": 0}, "micro_batch": None}
    one = small_config(tmp_path, steps=4, **options)
    two = staged(
        tmp_path,
        *({"name": name, "steps": 2, "keep_state": name == "b"} for name in "ab"),
        run=str(tmp_path / "2"),
        **options,
    )
    anew = staged(tmp_path, *({"name": name, "steps": 2} for name in "ab"), run=str(tmp_path / "3"), **options)
    lines: list[str] = []
    train(one)
    train(two, say=lines.append)
    train(anew)
    assert_close(weights(two), weights(one), rtol=0, atol=0)
    assert any(line.startswith("stage b: the optimizer's state of ") for line in lines)
    with pytest.raises(AssertionError):
        assert_close(weights(anew), weights(one), rtol=0, atol=0)


def test_a_task_may_begin_every_step_with_a_fresh_optimizer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As stages of one step do, which see the same samples here."""
    data = {"files": [str(write_samples(tmp_path, 3))], "workers": 0, "shuffle": False}
    options: dict[str, Any] = {
        "data": data,
        "batch": 3,
        "schedule": {"decay": 0},
        "optimizer": {"kind": "adamw", "lr": 1e-3},
    }
    stages = staged(tmp_path, {"name": "a", "steps": 1}, {"name": "b", "steps": 1}, **options)
    train(stages)
    monkeypatch.setattr(NextToken, "resets_optimizer", True)
    resets = small_config(tmp_path, run=str(tmp_path / "resets"), steps=2, **options)
    train(resets)
    assert_close(weights(resets), weights(stages), rtol=0, atol=0)


def test_wavelengths_stay_where_a_stage_has_set_them(tmp_path: Path) -> None:
    long = {"name": "long", "steps": 1, "rope_theta": 1e6, "max_positions": 9000}
    config = staged(tmp_path, {"name": "short", "steps": 1}, long, {"name": "sft", "steps": 1})
    until(config, 2)
    train(config)
    models = [vlkit.from_pretrained(Path(config.run) / "stages" / name) for name in ("1-short", "2-long", "3-sft")]
    assert [model.config.llm.theta for model in models] == [800000.0, 1e6, 1e6]
    assert models[2].config.llm.max_positions == 9000


def test_a_run_does_not_go_on_with_other_stages(tmp_path: Path) -> None:
    until(staged(tmp_path), 4)
    with pytest.raises(ConfigError, match="it is in stage 'sft', which begins at step 2 of the config, not at 3"):
        train(staged(tmp_path, {**ALIGN, "steps": 2}, ALL))
    with pytest.raises(ConfigError, match="it is in stage 'sft', which is not in the config"):
        train(staged(tmp_path, ALIGN))
    with pytest.raises(ConfigError, match=r"parameters\[.*found \"frozen\", expected \"trained\""):
        train(staged(tmp_path, ALIGN, {**ALL, "train": ["llm"]}))


def test_frozen_parts_are_in_evaluation_mode(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from vlkit.training import stage_run

    seen = []
    monkeypatch.setattr(
        stage_run.StageRun,
        "check_learning",
        lambda run: seen.append({name: part.training for name, part in run.model.named_children()}),
    )
    train(staged(tmp_path, {**ALIGN, "steps": 1}, {**ALL, "steps": 1, "schedule": {}}))
    assert seen == [
        {"vision": False, "projector": True, "llm": False},
        {"vision": True, "projector": True, "llm": True},
    ]


@pytest.mark.slow
def test_adapters_learn_in_stages_and_are_merged_into_what_is_saved(tmp_path: Path) -> None:
    """PEFT takes seconds to import."""
    lora = {"parts": ["llm"], "rank": 2, "targets": ["q_proj", "down_proj"]}
    config = staged(tmp_path, {**ALIGN, "train": ["llm"]}, {**ALL, "train": ["projector", "llm"]}, lora=lora)
    halves = config.replace(run=str(tmp_path / "halves"))
    train(config)
    until(halves, 5)
    train(halves)
    torch.manual_seed(config.seed)
    start = vlkit.create_model("kimi-vl-tiny").state_dict()
    align, sft = of_stage(config, "1-align"), of_stage(config, "2-sft")
    changed = {name for name in start if not torch.equal(start[name], align[name])} - {
        name for name in start if name.endswith("router.bias")
    }
    assert changed
    assert all(".q" in name or ".down" in name for name in changed)
    again = {name for name in start if not torch.equal(align[name], sft[name])}
    assert {name for name in again if name.startswith("projector.")} == {n for n in start if n.startswith("projector.")}
    assert not {name for name in again if name.startswith("vision.")}
    assert_close(weights(halves), weights(config), rtol=0, atol=0)
    assert (Path(config.run) / "model/adapter/adapter_config.json").is_file()


def test_adapters_are_not_sharded(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"adapters are not sharded; set ranks\.sharding"):
        small_config(tmp_path, lora={}, ranks={"sharding": "fsdp"})


def train_one(rank: int, config: TrainConfig) -> None:
    train(config)


@pytest.mark.slow
def test_stages_of_a_model_that_is_sharded_are_those_of_one_process(tmp_path: Path) -> None:
    """fp64; what records gradients changes between them, so parts are sharded anew. Largest difference seen 1e-15."""
    long = {"name": "long", "steps": 2, "rope_theta": 1e6, "max_positions": 9000, "keep_state": True}
    one = staged(tmp_path, {**ALIGN, "steps": 2}, long, {"name": "llm", "train": ["llm"], "steps": 2}, dtype="float64")
    two = one.replace(run=str(tmp_path / "two"), ranks=one.ranks.replace(sharding="fsdp"))
    train(one)
    until(two, 3, num_ranks=2)
    run_ranks(train_one, 2, two)
    for name in ("1-align", "2-long", "3-llm"):
        assert_close(of_stage(two, name), of_stage(one, name), rtol=0, atol=1e-10)


@pytest.mark.slow
@pytest.mark.parametrize("name", vlkit.list_models("*-tiny"))
def test_a_stage_of_any_family_changes_only_what_it_trains(tmp_path: Path, name: str) -> None:
    stages = [{"name": part, "train": [part]} for part in ("vision", "projector", "llm")]
    config = small_config(tmp_path, model={"name": name}, steps=1, stages=stages, batch=2)
    train(config)
    torch.manual_seed(config.seed)
    states = [dict(vlkit.create_model(name).state_dict())]
    states += [of_stage(config, f"{number}-{stage['name']}") for number, stage in enumerate(stages, start=1)]
    for stage, before, after in zip(stages, states, states[1:], strict=False):
        changed = {key for key in before if not torch.equal(before[key], after[key])}
        assert changed
        assert {key.split(".")[0] for key in changed} == {stage["name"]}


def test_what_an_objective_trains_goes_on_from_the_last_stage_of_its_kind_or_says_that_it_begins_anew(
    tmp_path: Path,
) -> None:
    objective = {"kind": "contrast"}
    stages = [{"name": "a", "objective": objective}, {"name": "b"}, {"name": "c", "objective": objective}]
    config = small_config(tmp_path, stages=stages, micro_batch=None)
    parts: Any = [
        Stage(number, name, own, (), 1, number) for number, (name, own) in enumerate(config.resolved_stages())
    ]
    nothing: Any = None
    models = StageModels(config, parts, nothing, nothing, Ranks(0, 1, torch.device("cpu")))
    text = TextEncoderConfig(vocab_size=5, dim=4, num_layers=1, num_heads=1, mlp_dim=4)
    heads, ours, other = (
        ContrastHeads(ContrastConfig(image_dim=4, dim=2, pool_heads=pool_heads, text=text)) for pool_heads in (1, 1, 2)
    )
    with pytest.raises(CheckpointError, match=r"1-a/contrast: missing, and stage 'c' goes on with .* in stage 'a'"):
        models.take_modules(ours, parts[2])
    heads.save_pretrained(models.folder(parts[0]) / "contrast")
    assert models.take_modules(ours, parts[0]) is None
    assert not torch.equal(ours.image_proj.weight, heads.image_proj.weight)
    state = torch.get_rng_state()
    assert models.take_modules(ours, parts[2]) is None
    assert all(torch.equal(value, ours.state_dict()[name]) for name, value in heads.state_dict().items())
    assert "'contrast' trains beside the model begins anew" in str(models.take_modules(other, parts[2]))
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.slow
def test_heads_go_on_over_a_stage_of_another_kind(tmp_path: Path) -> None:
    samples = [{"image": f"{index}.png", "text": f"picture {index}"} for index in (1, 2)]
    small_config(tmp_path)  # writes the images
    (tmp_path / "captions.jsonl").write_text("".join(json.dumps(sample) + "\n" for sample in samples))
    sizes = {"pool_heads": 2, "text_dim": 8, "text_layers": 1, "text_heads": 2, "text_mlp_dim": 8}
    data, captions = ({"files": [str(tmp_path / name)], "workers": 0} for name in ("train.jsonl", "captions.jsonl"))
    contrast = {"objective": {"kind": "contrast", "dim": 8, **sizes}, "data": captions}
    stages = [
        {"name": "a", **contrast},
        {"name": "b"},
        {"name": "c", **contrast, "train": ["projector"]},
        {"name": "d", **contrast, "objective": {**contrast["objective"], "dim": 12}},
    ]
    lines: list[str] = []
    train(small_config(tmp_path, batch=2, micro_batch=None, steps=1, data=data, stages=stages), say=lines.append)
    assert [line[:8] for line in lines if "begins anew" in line] == ["stage d:"]
    first, later, anew = (
        load_file(tmp_path / f"run/stages/{name}/contrast/model.safetensors") for name in ("1-a", "3-c", "4-d")
    )
    assert all(torch.equal(first[name], later[name]) for name in first)
    assert anew["text_proj.weight"].shape[0] == 12
