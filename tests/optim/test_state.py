"""State of an optimizer in one process: saved whole, loaded with the same bits, or refused before anything changes."""

from __future__ import annotations

import copy
import errno
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import OneCycleLR
from torch.testing import assert_close

from vlkit.errors import DiskFullError, OptimizerStateError
from vlkit.optim import Muon, load_state, save_state

SHAPES = {"wq": (7, 5), "experts": (3, 4, 6), "norm": (5,), "embed": (6, 4)}
FP32 = {"ns_dtype": torch.float32}


def parameters(seed: int = 0, dtype: torch.dtype = torch.float32) -> dict[str, nn.Parameter]:
    generator = torch.Generator().manual_seed(seed)
    return {name: nn.Parameter(torch.randn(s, generator=generator).mul(0.1).to(dtype)) for name, s in SHAPES.items()}


def build(params: dict[str, nn.Parameter], lr: Any = 0.01, **options: Any) -> Muon:
    groups = [
        {"params": [(name, params[name]) for name in ("wq", "experts")], **FP32},
        {"params": [(name, params[name]) for name in ("norm", "embed")], "algorithm": "adamw", "lr": 0.002},
    ]
    return Muon(groups, lr, **options)


def train(optimizer: torch.optim.Optimizer, params: Sequence[Tensor], steps: int, first: int = 0) -> None:
    for step in range(first, first + steps):
        generator = torch.Generator().manual_seed(1000 + step)
        for param in params:
            param.grad = torch.randn(param.shape, generator=generator).to(param.dtype)
        optimizer.step()


def trained(steps: int = 3, dtype: torch.dtype = torch.float32) -> tuple[Muon, dict[str, nn.Parameter]]:
    params = parameters(dtype=dtype)
    optimizer = build(params)
    train(optimizer, list(params.values()), steps)
    return optimizer, params


def snapshot(optimizer: Muon) -> dict[str, Any]:
    return copy.deepcopy(optimizer.full_state_dict())


def resumed(params: dict[str, nn.Parameter]) -> tuple[Muon, dict[str, nn.Parameter]]:
    """A new optimizer on copies of the weights, with another learning rate, which a loaded state replaces."""
    copies = {name: nn.Parameter(param.detach().clone()) for name, param in params.items()}
    return build(copies, 0.5), copies


# Whole states


def test_keys_and_tensors_are_those_of_torch() -> None:
    optimizer, _ = trained()
    state = optimizer.full_state_dict()
    assert {name: set(entry) for name, entry in state["state"].items()} == {
        "wq": {"momentum_buffer"},
        "experts": {"momentum_buffer"},
        "norm": {"step", "exp_avg", "exp_avg_sq"},
        "embed": {"step", "exp_avg", "exp_avg_sq"},
    }
    assert state["state"]["experts"]["momentum_buffer"].shape == (3, 4, 6)
    assert state["header"]["version"] == 1
    assert state["header"]["momentum_form"] == "ema"
    assert state["header"]["momentum"] == [0.95, 0.95]
    assert [group["params"] for group in state["param_groups"]] == [["wq", "experts"], ["norm", "embed"]]


def test_a_full_state_is_a_copy() -> None:
    optimizer, params = trained()
    state = optimizer.full_state_dict()
    before = state["state"]["wq"]["momentum_buffer"].clone()
    train(optimizer, list(params.values()), 1, first=3)
    assert torch.equal(state["state"]["wq"]["momentum_buffer"], before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("way", ["dict", "files", "sharded"])
def test_training_goes_on_bit_for_bit(tmp_path: Path, dtype: torch.dtype, way: str) -> None:
    """State of bf16 parameters stays fp32."""
    optimizer, params = trained(dtype=dtype)
    other, copies = resumed(params)
    if way == "dict":
        other.load_full_state_dict(optimizer.full_state_dict())
    elif way == "files":
        save_state(optimizer, tmp_path / "state")
        load_state(other, tmp_path / "state")
    else:
        target = other.sharded_state_dict()
        for name, value in optimizer.sharded_state_dict().items():
            target[name].copy_(value)
        other.load_sharded_state_dict(target)
    train(optimizer, list(params.values()), 3, first=3)
    train(other, list(copies.values()), 3, first=3)
    assert_close(list(copies.values()), list(params.values()), rtol=0, atol=0)
    assert other.state[copies["wq"]]["momentum_buffer"].dtype == torch.float32
    assert other.state[copies["norm"]]["exp_avg"].dtype == torch.float32


def test_parameters_are_known_by_name_not_by_place() -> None:
    optimizer, params = trained()
    copies = {name: nn.Parameter(param.detach().clone()) for name, param in params.items()}
    groups = [
        {"params": [(name, copies[name]) for name in ("embed", "norm")], "algorithm": "adamw"},
        {"params": [(name, copies[name]) for name in ("experts", "wq")], **FP32},
    ]
    other = Muon(groups, 0.5)
    other.load_full_state_dict(optimizer.full_state_dict())
    assert [group["lr"] for group in other.param_groups] == [0.002, 0.01]
    train(optimizer, list(params.values()), 2, first=3)
    train(other, [copies[name] for name in params], 2, first=3)
    assert_close(copies, params, rtol=0, atol=0)


def test_other_groups_load_without_their_options() -> None:
    optimizer, params = trained()
    copies = {name: nn.Parameter(param.detach().clone()) for name, param in params.items()}
    groups = [
        {"params": [(name, copies[name])], "algorithm": "muon" if "w" in name or "x" in name else "adamw"}
        for name in copies
    ]
    other = Muon(groups, 0.25)
    with pytest.raises(OptimizerStateError, match="2 groups, this optimizer has 4; options=False"):
        other.load_full_state_dict(optimizer.full_state_dict())
    other.load_full_state_dict(optimizer.full_state_dict(), options=False)
    assert other.param_groups[0]["lr"] == 0.25
    assert torch.equal(other.state[copies["embed"]]["exp_avg"], optimizer.state[params["embed"]]["exp_avg"])


def test_parameters_in_another_group_are_named() -> None:
    def of(first: Sequence[str], second: Sequence[str]) -> Muon:
        params = parameters()
        return Muon(
            [{"params": [(n, params[n]) for n in names], "algorithm": "adamw"} for names in (first, second)], 0.1
        )

    state = of(["wq", "norm"], ["embed"]).full_state_dict()
    with pytest.raises(
        OptimizerStateError, match=r"group 0: .*2 parameters, this one 1: .*not in this group 1 \('norm'\)"
    ):
        of(["wq"], ["norm", "embed"]).load_full_state_dict(state)
    of(["embed"], ["norm", "wq"]).load_full_state_dict(state)


def test_parameters_without_names_are_called_by_their_place(tmp_path: Path) -> None:
    params = list(parameters().values())[:2]
    optimizer = Muon(params, 0.01, **FP32)
    train(optimizer, params, 2)
    assert list(optimizer.full_state_dict()["state"]) == ["0.0", "0.1"]
    save_state(optimizer, tmp_path)
    copies = [nn.Parameter(param.detach().clone()) for param in params]
    other = Muon(copies, 0.5, **FP32)
    load_state(other, tmp_path)
    train(optimizer, params, 2, first=2)
    train(other, copies, 2, first=2)
    assert_close(copies, params, rtol=0, atol=0)


def test_loading_fills_the_tensors_that_are_there() -> None:
    """So that whoever looks at them, as a view of a larger buffer for one, sees what was loaded."""
    optimizer, params = trained()
    other, copies = resumed(params)
    tensor = other.state[copies["wq"]]["momentum_buffer"]
    other.load_full_state_dict(optimizer.full_state_dict())
    assert other.state[copies["wq"]]["momentum_buffer"] is tensor
    other.load_state_dict(optimizer.state_dict())
    assert other.state[copies["wq"]]["momentum_buffer"] is tensor


def test_a_momentum_of_another_dtype_is_cast_to_ours() -> None:
    optimizer, params = trained()
    copies = {name: nn.Parameter(param.detach().clone()) for name, param in params.items()}
    other = build(copies, momentum_dtype=torch.bfloat16)
    other.load_full_state_dict(optimizer.full_state_dict(), options=False)
    buffer = other.state[copies["wq"]]["momentum_buffer"]
    assert buffer.dtype == torch.bfloat16
    assert torch.equal(buffer, optimizer.state[params["wq"]]["momentum_buffer"].bfloat16())


def test_options_of_every_kind_survive_a_file(tmp_path: Path) -> None:
    """Tuples, dtypes, None, tables of coefficients, a tensor as learning rate, what schedulers add."""
    params = parameters()
    options = {
        "betas": (0.8, 0.99),
        "momentum_dtype": torch.bfloat16,
        "ns": ((3.4445, -4.7750, 2.0315), (2.0, -1.5, 0.5)),
    }
    optimizer = build(params, torch.tensor(0.25), ns_dtype=torch.float64, **options)
    OneCycleLR(optimizer, max_lr=0.125, total_steps=9)
    optimizer.skipped_steps = 2
    save_state(optimizer, tmp_path)
    other = build(parameters(), torch.tensor(9.0))
    load_state(other, tmp_path)
    for ours, theirs in zip(other.param_groups, optimizer.param_groups, strict=True):
        assert {k: v for k, v in ours.items() if k != "params"} == {k: v for k, v in theirs.items() if k != "params"}
    assert isinstance(other.param_groups[0]["lr"], Tensor)
    assert other.skipped_steps == 2


def test_momentum_has_the_dtype_that_the_options_say(tmp_path: Path) -> None:
    """A loaded option is followed, and training goes on bit for bit; with options=False this optimizer keeps its own."""
    params = parameters()
    optimizer = build(params, momentum_dtype=torch.bfloat16)
    train(optimizer, list(params.values()), 1)
    save_state(optimizer, tmp_path)
    for options in (True, False):
        copies = {name: nn.Parameter(param.detach().clone()) for name, param in params.items()}
        other = build(copies)
        load_state(other, tmp_path, options=options)
        dtype = other.param_groups[0]["momentum_dtype"]
        assert other.state[copies["wq"]]["momentum_buffer"].dtype == dtype
        assert dtype == (torch.bfloat16 if options else torch.float32)
        if options:
            resumed_copies, resumed_optimizer = copies, other
    train(optimizer, list(params.values()), 1)
    train(resumed_optimizer, list(resumed_copies.values()), 1)
    assert all(torch.equal(params[name], resumed_copies[name]) for name in params)


@pytest.mark.parametrize(
    "rubbish", [None, "x", {"state": 5, "param_groups": 3}, {"state": {}, "param_groups": [7]}, {}]
)
def test_what_is_no_state_is_refused(rubbish: Any) -> None:
    optimizer = build(parameters())
    with pytest.raises(OptimizerStateError, match="expected"):
        optimizer.load_state_dict(rubbish)
    with pytest.raises(OptimizerStateError):
        optimizer.load_full_state_dict(rubbish)


# States of other optimizers


@pytest.mark.parametrize("named", [True, False])
def test_states_of_torch_muon_and_adamw_load_together(named: bool) -> None:
    """Largest seen difference after three more steps: 2e-2 of the update of Muon, which torch makes in bf16."""
    params = parameters()
    pairs = list(params.items()) if named else list(params.values())
    muon = torch.optim.Muon(pairs[:1], 0.02, momentum=0.9, adjust_lr_fn=None)
    adamw = torch.optim.AdamW(pairs[2:], 0.003, betas=(0.8, 0.9), eps=1e-6)
    for step in range(3):
        for param in params.values():
            param.grad = torch.randn(param.shape, generator=torch.Generator().manual_seed(step))
        muon.step()
        adamw.step()
    copies = {name: nn.Parameter(param.detach().clone()) for name, param in params.items() if name != "experts"}
    groups = [
        {"params": [("norm", copies["norm"]), ("embed", copies["embed"])], "algorithm": "adamw"},
        {"params": [("wq", copies["wq"])]},
    ]
    ours = Muon(groups, 0.5, ns_dtype=torch.bfloat16)
    ours.load_full_state_dict([muon.state_dict(), adamw.state_dict()])
    assert ours.param_groups[0]["adam_eps"] == 1e-6
    assert ours.param_groups[1]["adjust_lr"] == "original"
    before = {name: param.detach().clone() for name, param in params.items()}
    for step in range(3, 6):
        for name in copies:
            params[name].grad = torch.randn(params[name].shape, generator=torch.Generator().manual_seed(step))
            copies[name].grad = params[name].grad.clone()
        muon.step()
        adamw.step()
        ours.step()
    assert_close(copies["norm"], params["norm"], rtol=1e-6, atol=1e-6)
    difference = (copies["wq"] - params["wq"]).norm() / (params["wq"] - before["wq"]).norm()
    assert difference < 3e-2


def test_a_state_of_torch_muon_loads_where_the_rest_begins_anew() -> None:
    params = parameters()
    theirs = torch.optim.Muon([params["wq"]], 0.02)
    train(theirs, [params["wq"]], 2)
    ours, copies = resumed(params)
    train(ours, list(copies.values()), 1)
    with pytest.raises(OptimizerStateError, match="1 groups, this optimizer has 2"):
        ours.load_full_state_dict(theirs.state_dict())
    ours.load_full_state_dict(theirs.state_dict(), reinitialize=["experts", "norm", "^embed$"])
    assert torch.equal(ours.state[copies["wq"]]["momentum_buffer"], theirs.state[params["wq"]]["momentum_buffer"])
    assert not any(value.any() for name in ("experts", "norm", "embed") for value in ours.state[copies[name]].values())


def test_momentum_that_sums_gradients_becomes_a_mean() -> None:
    """A running sum, as Moonlight keeps it, gives the same training once loaded."""
    optimizer, params = trained()
    state = optimizer.full_state_dict()
    state["header"]["momentum_form"] = "sum"
    for entry in state["state"].values():
        if "momentum_buffer" in entry:
            entry["momentum_buffer"] /= 1 - 0.95
    other, copies = resumed(params)
    other.load_full_state_dict(state)
    for name in ("wq", "experts"):
        ours, theirs = (o.state[p[name]]["momentum_buffer"] for o, p in ((other, copies), (optimizer, params)))
        assert_close(ours, theirs, rtol=1e-6, atol=0)


# Refused


def poke(key: str, value: float, name: str = "norm") -> Callable[[dict[str, Any]], Any]:
    def change(state: dict[str, Any]) -> None:
        state["state"][name][key].view(-1)[0] = value

    return change


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda s: s.clear(), "has nothing, expected 'state' and 'param_groups': it is empty"),
        (lambda s: s["state"].clear(), "0 parameters, this optimizer has 4: missing 4"),
        (
            lambda s: s["state"].pop("wq"),
            r"3 parameters, this optimizer has 4: missing 1 \('wq'\); foreign none.*reinit",
        ),
        (
            lambda s: s["state"]["norm"].pop("exp_avg"),
            "norm: the saved state has 'step', 'exp_avg_sq', expected step, exp_avg",
        ),
        (lambda s: s["state"].update(other={}), r"in none of its groups: 1 \('other'\)"),
        (
            lambda s: s["state"].update(wq=s["state"]["norm"]),
            "wq: .*'exp_avg'.*expected momentum_buffer: it is of another",
        ),
        (lambda s: s["state"].update(wq=s["state"]["experts"]), r"wq.*shape \(3, 4, 6\), the parameter needs \(7, 5\)"),
        (lambda s: s["param_groups"].pop(), "1 groups, this optimizer has 2|none of its groups"),
        (lambda s: s["param_groups"][0]["params"].reverse() or s["param_groups"].reverse(), None),
        (lambda s: s["param_groups"][0].update(algorithm="adamw"), "of 'adamw', this group runs 'muon'"),
        (lambda s: s["param_groups"][0].update(lr=-1.0), "group 0: the saved options cannot be used: lr must not be"),
        (lambda s: s["param_groups"][0].update(lr="fast"), "group 0: the saved options cannot be used"),
        (lambda s: s["header"].update(version=99), "version 99, this release reads 1"),
        (lambda s: s["header"].update(momentum_form="max"), "'ema' or 'sum'"),
        (poke("exp_avg", float("nan")), "norm: the saved exp_avg has 1 of 5 values that are NaN or infinite"),
        (poke("momentum_buffer", float("inf"), "wq"), "wq: the saved momentum_buffer has 1 of 35 values"),
        (poke("exp_avg_sq", -1e-3), "norm: the saved exp_avg_sq has values below 0, down to -0.001"),
        (poke("step", -1.0), "norm: the saved step has values below 0"),
        (poke("step", float("nan")), "norm: the saved step has 1 of 1 values that are NaN"),
    ],
)
def test_a_state_that_does_not_fit_is_named_and_changes_nothing(spoil: Callable[[Any], Any], words: str | None) -> None:
    optimizer, params = trained()
    state = optimizer.full_state_dict()
    spoil(state)
    other, copies = resumed(params)
    train(other, list(copies.values()), 1)
    before = snapshot(other)
    if words is None:
        other.load_full_state_dict(state)  # order does not matter
        return
    with pytest.raises(OptimizerStateError, match=words):
        other.load_full_state_dict(state)
    after = snapshot(other)
    assert_close(after["state"], before["state"], rtol=0, atol=0)
    assert after["param_groups"] == before["param_groups"]


@pytest.mark.parametrize("bad", [float("nan"), -1.0])
def test_a_rank_local_state_with_impossible_values_is_refused(bad: float) -> None:
    optimizer, params = trained()
    state = copy.deepcopy(optimizer.state_dict())
    state["state"][3]["exp_avg_sq"][0, 0] = bad
    other, _ = resumed(params)
    before = snapshot(other)
    with pytest.raises(OptimizerStateError, match="embed: the saved exp_avg_sq"):
        other.load_state_dict(state)
    assert_close(snapshot(other)["state"], before["state"], rtol=0, atol=0)


def test_named_parameters_begin_anew_whatever_the_state_has() -> None:
    optimizer, params = trained()
    state = optimizer.full_state_dict()
    state["state"]["norm"]["exp_avg"][0] = float("nan")
    del state["state"]["experts"]["momentum_buffer"]
    other, copies = resumed(params)
    train(other, list(copies.values()), 1)
    other.load_full_state_dict(state, reinitialize=["^norm", "exp"])
    for name in ("norm", "experts"):
        assert not any(value.any() for value in other.state[copies[name]].values())
    assert torch.equal(other.state[copies["wq"]]["momentum_buffer"], optimizer.state[params["wq"]]["momentum_buffer"])
    assert other.state[copies["embed"]]["step"] == 3


def test_two_parameters_with_one_name_have_no_state_by_name() -> None:
    first, second = parameters()["wq"], parameters()["wq"]
    optimizer = Muon([{"params": [("a", first)]}, {"params": [("a", second)]}], 0.1)
    with pytest.raises(OptimizerStateError, match="two parameters are called 'a'"):
        optimizer.full_state_dict()


# Files


def edit(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    path = folder / "optimizer.json"
    description = json.loads(path.read_text())
    change(description)
    path.write_text(json.dumps(description))


def cut(path: Path, length: int) -> None:
    path.write_bytes(path.read_bytes()[:length])


def flip(path: Path, at: int) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda f: cut(f / "optimizer.safetensors", -20), "cannot be read.*truncated"),
        (lambda f: cut(f / "optimizer.safetensors", 0), "cannot be read"),
        (lambda f: flip(f / "optimizer.safetensors", -3), "another checksum"),
        (lambda f: (f / "optimizer.safetensors").unlink(), "cannot be read"),
        (lambda f: (f / "optimizer.json").unlink(), "no such file"),
        (lambda f: cut(f / "optimizer.json", 100), "not JSON"),
        (lambda f: (f / "optimizer.json").write_text("{}"), "of different saves"),
        (lambda f: edit(f, lambda d: d["checksums"].pop("wq.momentum_buffer")), "of different saves"),
        (lambda f: edit(f, lambda d: d.pop("param_groups")), "param_groups cannot be understood"),
        (lambda f: edit(f, lambda d: d.update(param_groups=[1])), "param_groups cannot be understood"),
        (lambda f: edit(f, lambda d: d["param_groups"][0].pop("params")), "no list 'params' in group 0"),
        (lambda f: edit(f, lambda d: d["param_groups"][0].update(momentum=1.5)), r"momentum must lie in \[0, 1\)"),
        (lambda f: edit(f, lambda d: d["header"].update(version="1")), "version '1', this release"),
    ],
)
def test_damaged_files_are_named_and_change_nothing(tmp_path: Path, damage: Callable[[Path], Any], words: str) -> None:
    optimizer, params = trained()
    save_state(optimizer, tmp_path)
    damage(tmp_path)
    other, copies = resumed(params)
    train(other, list(copies.values()), 1)
    before = snapshot(other)
    with pytest.raises(OptimizerStateError, match=words):
        load_state(other, tmp_path)
    after = snapshot(other)
    assert_close(after["state"], before["state"], rtol=0, atol=0)
    assert after["param_groups"] == before["param_groups"]


def test_tensors_under_swapped_names_are_found_out(tmp_path: Path) -> None:
    optimizer, params = trained()
    save_state(optimizer, tmp_path)
    path = tmp_path / "optimizer.safetensors"
    data = path.read_bytes()
    length = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:length])
    header["norm.exp_avg"], header["norm.exp_avg_sq"] = header["norm.exp_avg_sq"], header["norm.exp_avg"]
    path.write_bytes(data[:8] + json.dumps(header, separators=(",", ":")).encode().ljust(length - 8) + data[length:])
    other, _ = resumed(params)
    with pytest.raises(OptimizerStateError, match=r"'norm.exp_avg(_sq)?' has another checksum"):
        load_state(other, tmp_path)


def test_a_state_of_another_model_is_refused(tmp_path: Path) -> None:
    optimizer, _ = trained()
    save_state(optimizer, tmp_path)
    foreign = nn.ModuleDict({"wq": nn.Linear(9, 5, bias=False), "out": nn.Linear(3, 3, bias=False)})
    other = Muon([{"params": list(foreign.named_parameters())}], 0.1)
    with pytest.raises(OptimizerStateError, match="2 groups, this optimizer has 1"):
        load_state(other, tmp_path)
    with pytest.raises(
        OptimizerStateError, match=r"missing 2 \('out.weight', 'wq.weight'\); foreign 4 \('embed', 'experts'"
    ):
        load_state(other, tmp_path, options=False)


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_keeps_the_old_state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    optimizer, params = trained()
    folder = tmp_path / "state"
    save_state(optimizer, folder)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    train(optimizer, list(params.values()), 1, first=3)

    def full(*_: object, **__: object) -> None:
        raise OSError(number, "No space left on device")

    monkeypatch.setattr("vlkit.optim.state.write_safetensors", full)
    with pytest.raises(DiskFullError, match="no space left"):
        save_state(optimizer, folder)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    assert list(tmp_path.iterdir()) == [folder]


def test_a_state_replaces_an_older_one_and_leaves_other_files(tmp_path: Path) -> None:
    optimizer, params = trained()
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    save_state(optimizer, folder)
    train(optimizer, list(params.values()), 1, first=3)
    save_state(optimizer, folder)
    other, copies = resumed(params)
    load_state(other, folder)
    assert other.state[copies["norm"]]["step"] == 4
    assert sorted(path.name for path in folder.iterdir()) == ["config.json", "optimizer.json", "optimizer.safetensors"]


# Sharded states of one process


def test_a_sharded_state_lists_everything_under_torch_names() -> None:
    optimizer, params = trained()
    state = optimizer.sharded_state_dict()
    assert state["state.wq.momentum_buffer"].data_ptr() == optimizer.state[params["wq"]]["momentum_buffer"].data_ptr()
    assert state["param_groups.1.lr"].item() == 0.002
    assert all(isinstance(value, Tensor) for value in state.values())


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda s: s.pop("state.norm.step"), r"missing 1 \('state.norm.step'\)"),
        (lambda s: s.update(other=torch.zeros(1)), r"foreign 1 \('other'\)"),
        (lambda s: s["header.version"].fill_(7), "version 7"),
        (lambda s: s["state.norm.exp_avg_sq"].fill_(-1), "norm.exp_avg_sq"),
    ],
)
def test_a_sharded_state_that_does_not_fit_is_refused(spoil: Callable[[Any], Any], words: str) -> None:
    optimizer, _ = trained()
    state = optimizer.sharded_state_dict()
    spoil(state)
    with pytest.raises(OptimizerStateError, match=words):
        optimizer.load_sharded_state_dict(state)


# torch.optim.Optimizer


def test_hooks_of_torch_are_called() -> None:
    optimizer, params = trained()
    other, _ = resumed(params)
    called = []
    other.register_load_state_dict_pre_hook(lambda _, state: called.append("before"))
    other.register_load_state_dict_post_hook(lambda _: called.append("after"))
    optimizer.register_state_dict_post_hook(lambda _, state: called.append("saved"))
    other.load_state_dict(state_dict=optimizer.state_dict())
    assert called == ["saved", "before", "after"]
