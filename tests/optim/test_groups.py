"""Every trainable parameter in exactly one group, and in the right one."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import vlkit
from vlkit.errors import ConfigError
from vlkit.optim import Muon, ParamGroups, muon_param_groups
from vlkit.registry import component, list_components


class Experts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Parameter(torch.zeros(4, 6, 8))


class Router(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(4, 8))


class PatchEmbed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.proj = nn.Linear(12, 8)


class Zoo(nn.Module):
    """One of everything."""

    def __init__(self) -> None:
        super().__init__()
        self.patch_embed = PatchEmbed()
        self.stem = nn.Conv2d(3, 8, 4)
        self.hidden_conv = nn.Conv2d(8, 8, 3)
        self.audio_conv = nn.Conv1d(8, 8, 3)
        self.pos_embed = nn.Parameter(torch.zeros(1, 9, 8))
        self.cls_token = nn.Parameter(torch.zeros(1, 1, 8))
        self.bare_matrix = nn.Parameter(torch.zeros(8, 5))
        self.embedding = nn.Embedding(20, 8)
        self.norm = nn.LayerNorm(8)
        self.fc = nn.Linear(8, 8)
        self.router = Router()
        self.experts = Experts()
        self.frozen = nn.Linear(8, 8).requires_grad_(False)
        self.empty = nn.Parameter(torch.zeros(0, 8))
        self.lm_head = nn.Linear(8, 20, bias=False)


ROUTES = {
    "patch_embed.proj.weight": ("adamw", "patch embedding"),
    "patch_embed.proj.bias": ("adamw", "vector"),
    "stem.weight": ("adamw", "patch embedding"),
    "hidden_conv.weight": ("muon", "convolution"),
    "audio_conv.weight": ("muon", "convolution"),
    "pos_embed": ("adamw", "table"),
    "cls_token": ("adamw", "vector"),
    "bare_matrix": ("muon", "matrix"),
    "embedding.weight": ("adamw", "embedding"),
    "norm.weight": ("adamw", "vector"),
    "fc.weight": ("muon", "matrix"),
    "router.weight": ("muon", "router"),
    "experts.up": ("muon", "experts"),
    "frozen.weight": ("none", "frozen"),
    "empty": ("none", "empty"),
    "lm_head.weight": ("adamw", "output head"),
}


def routes(groups: ParamGroups) -> dict[str, tuple[str, str]]:
    return {row.name: (row.route, row.reason) for row in groups.report.rows}


def grouped_names(groups: ParamGroups, algorithm: str) -> list[str]:
    return [name for group in groups if group["algorithm"] == algorithm for name in group["param_names"]]


@pytest.mark.parametrize("name", ROUTES)
def test_a_parameter_goes_where_its_purpose_says(name: str) -> None:
    assert routes(muon_param_groups(Zoo()))[name] == ROUTES[name]


def test_groups_hold_what_the_report_says() -> None:
    model = Zoo()
    groups = muon_param_groups(model)
    for algorithm in ("muon", "adamw"):
        assert grouped_names(groups, algorithm) == groups.report.names(algorithm)
    held = [parameter for group in groups for parameter in group["params"]]
    names = [name for group in groups for name in group["param_names"]]
    by_name = dict(model.named_parameters())
    assert all(by_name[name] is parameter for name, parameter in zip(names, held, strict=True))
    assert {id(p) for p in held} == {id(p) for p in model.parameters() if p.requires_grad and p.numel()}


def test_switches_change_only_what_they_name() -> None:
    plain = routes(muon_param_groups(Zoo()))
    changed = routes(muon_param_groups(Zoo(), router="adamw", patch_embed="muon"))
    assert {name for name in plain if plain[name] != changed[name]} == {
        "router.weight",
        "stem.weight",
        "patch_embed.proj.weight",
    }


def test_vectors_can_be_spared_weight_decay() -> None:
    groups = muon_param_groups(Zoo(), decay_vectors=False)
    spared = [name for group in groups if group.get("weight_decay") == 0.0 for name in group["param_names"]]
    assert set(spared) == {row.name for row in groups.report.rows if row.reason == "vector"}


def test_a_person_decides_first() -> None:
    model = Zoo()
    model.lm_head.weight.use_muon = True
    model.fc.weight.use_muon = False
    found = routes(muon_param_groups(model, muon=["^embedding"], adamw=[r"experts\."]))
    assert found["lm_head.weight"] == ("muon", "use_muon")
    assert found["fc.weight"] == ("adamw", "use_muon")
    assert found["embedding.weight"] == ("muon", "pattern '^embedding'")
    assert found["experts.up"] == ("adamw", r"pattern 'experts\\.'")
    assert found["frozen.weight"][0] == "none"


@pytest.mark.parametrize(
    ("patterns", "words"),
    [
        ({"muon": ["decoder"]}, "'decoder' matches no parameter"),
        ({"muon": ["fc"], "adamw": ["weight"]}, "fc.weight is asked for by muon"),
        ({"muon": ["norm"]}, r"norm.weight has shape \(8,\)"),
    ],
)
def test_patterns_that_cannot_be_meant_are_refused(patterns: dict[str, list[str]], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        muon_param_groups(Zoo(), **patterns)


def test_a_tied_head_is_listed_once_as_embedding() -> None:
    for head_first in (False, True):
        model = nn.Module()
        embedding, head = nn.Embedding(20, 8), nn.Linear(8, 20, bias=False)
        head.weight = embedding.weight
        for name, module in [("out", head), ("tokens", embedding)][:: 1 if head_first else -1]:
            model.add_module(name, module)
        groups = muon_param_groups(model)
        assert grouped_names(groups, "adamw") == ["out.weight" if head_first else "tokens.weight"]
        assert grouped_names(groups, "muon") == []


def test_report_prints_every_parameter() -> None:
    text = str(muon_param_groups(Zoo()).report)
    lines = text.splitlines()
    assert len(lines) == len(list(Zoo().parameters())) + 1
    assert lines[-1] == "6 muon, 13 adamw, 3 none"
    assert any(line.split() == ["experts.up", "4x6x8", "muon", "experts"] for line in lines)


def test_optimizer_takes_the_groups_and_keeps_the_names() -> None:
    """A one-dimensional convolution is one matrix there, though its kernel has three axes."""
    model = Zoo()
    optimizer = Muon(muon_param_groups(model), lr=0.1)
    assert "experts.up" in optimizer.state_dict()["param_groups"][0]["param_names"]
    model.audio_conv.weight.grad = torch.randn(8, 8, 3)
    before = model.audio_conv.weight.detach().clone()
    optimizer.step()
    update = (model.audio_conv.weight - before * (1 - 0.1 * 0.1)).flatten(1)
    singular = torch.linalg.svdvals(update / (0.1 * 0.2 * 24**0.5))
    assert singular.min() > 0.8
    assert singular.max() < 1.2


# The library's own parts


@pytest.mark.parametrize(
    ("kind", "name"),
    [(kind, name) for kind in ("vision", "projector", "llm") for name in list_components(kind, "*-tiny")],
)
def test_parts_are_routed_by_type(kind: str, name: str) -> None:
    part = component(kind, name)
    with torch.device("meta"):
        model = part.module(part.configs[name])
    groups = muon_param_groups(model)
    trainable = {parameter_name for parameter_name, p in model.named_parameters() if p.requires_grad}
    assert sorted([*grouped_names(groups, "muon"), *grouped_names(groups, "adamw")]) == sorted(trainable)
    for parameter_name in grouped_names(groups, "muon"):
        last = parameter_name.split(".")[-2]
        assert "norm" not in last, parameter_name
        assert last not in ("embedding", "lm_head", "positions"), parameter_name
        assert not parameter_name.startswith("patch_embed"), parameter_name
    matrices = {n for n, m in model.named_modules() if isinstance(m, nn.Linear)}
    special = {n for n in matrices if n.startswith("patch_embed") or n.split(".")[-1] == "lm_head"}
    assert {f"{n}.weight" for n in matrices - special} <= set(grouped_names(groups, "muon"))


@pytest.mark.parametrize("name", vlkit.list_models("*-tiny"))
def test_models_train_with_their_groups(name: str) -> None:
    model = vlkit.create_model(name)
    optimizer = Muon(muon_param_groups(model), lr=1e-2)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    optimizer.step()
    assert not [n for n, p in model.named_parameters() if torch.equal(p, before[n]) == p.requires_grad]
