"""Every trainable parameter in exactly one group, and in the right one."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

import vlkit
from vlkit.errors import ConfigError
from vlkit.optim import Muon, ParamGroups, freeze, muon_param_groups, warmup_decay
from vlkit.optim.units import units_of
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
    assert any(line.split() == ["experts.up", "4x6x8", "muon", "lr", "decay", "4", "6x8", "experts"] for line in lines)


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


# Rates, layer-wise decay, frozen parts


def tiny(name: str = "kimi-vl-tiny") -> nn.Module:
    with torch.device("meta"):
        return vlkit.create_model(name)


def rates(groups: ParamGroups) -> dict[str, float | None]:
    """What the optimizer would use, by name; None for its own rate."""
    return {name: group.get("lr") for group in groups for name in group["param_names"]}


def test_every_part_gets_its_rate_and_the_longest_name_decides() -> None:
    lr = {
        "": 1e-3,
        "vision": 1e-5,
        "vision.blocks.*.mlp": 2e-5,
        "vision.blocks.0": 3e-5,
        "vision.blocks.0.mlp.fc1": 4e-5,
    }
    found = rates(muon_param_groups(tiny(), lr=lr))
    assert found["llm.blocks.0.attn.q.weight"] == 1e-3
    assert found["projector.fc1.bias"] == 1e-3
    assert found["vision.blocks.1.attn.q.weight"] == 1e-5
    assert found["vision.blocks.1.mlp.fc1.weight"] == 2e-5
    assert found["vision.blocks.0.attn.q.weight"] == 3e-5
    assert found["vision.blocks.0.mlp.fc2.weight"] == 2e-5  # four words are more than three
    assert found["vision.blocks.0.mlp.fc1.weight"] == 4e-5


def test_what_no_part_names_gets_the_rate_of_the_optimizer() -> None:
    groups = muon_param_groups(tiny(), lr={"vision": 1e-5})
    assert rates(groups)["llm.embedding.weight"] is None
    optimizer = Muon(groups, lr=0.5)
    assert {group["lr"] for group in optimizer.param_groups} == {1e-5, 0.5}


def test_one_word_is_not_the_beginning_of_another() -> None:
    """`vision` is no part of `vision2`."""
    model = nn.ModuleDict({"vision": nn.Linear(3, 3), "vision2": nn.Linear(3, 3)})
    assert rates(muon_param_groups(model, lr={"vision": 1e-5}))["vision2.weight"] is None


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"lr": {"visoin": 1e-5}}, "lr: 'visoin' names no parameter; parts of this model are vision, projector, llm"),
        ({"lr": {"llm.blocks.*.mlp": 1.0, "llm.blocks.0.*": 1.0}}, "fit llm.blocks.0.mlp.gate.weight equally well"),
        ({"lr": {"llm": -1.0}}, "'llm' has the rate -1.0"),
        ({"lr": {"llm": "fast"}}, "'llm' has the rate 'fast'"),
        ({"lr": {"llm": float("nan")}}, "'llm' has the rate nan"),
        ({"layer_decay": {"vision": 0.8}}, "lr names none for vision"),
        ({"lr": {"": 1.0}, "layer_decay": {"vision": 1.2}}, r"'vision' has the factor 1.2, expected one in \(0, 1\]"),
        ({"lr": {"": 1.0}, "layer_decay": {"projector": 0.8}}, "'projector' has 0 stacks"),
        ({"lr": {"": 1.0}, "layer_decay": {"": 0.8}}, "'' has 2 stacks"),
        ({"lr": {"": 1.0}, "layer_decay": {"vision.*.0": 0.8}}, "is no module of the model"),
        ({"lr": {"": 1.0}, "layer_decay": {"visoin": 0.8}}, "layer_decay: 'visoin' names no parameter"),
        ({"splits": "head"}, "splits: 'head' is not one of 'declared', 'heads'"),
    ],
)
def test_rates_that_cannot_be_meant_are_refused(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        muon_param_groups(tiny(), **options)


def test_layer_decay_is_that_of_beit() -> None:
    """lr d^(L + 1 - k): the patch embedding is k = 0, block j is k = j from 1, and what follows the blocks k = L + 1."""
    model = tiny()
    num_blocks = len(model.vision.blocks)
    groups = muon_param_groups(model, lr={"": 1e-3, "vision": 2e-3}, layer_decay={"vision": 0.8})
    found = rates(groups)
    expected = {
        "vision.patch_embed.proj.weight": 2e-3 * 0.8 ** (num_blocks + 1),
        "vision.positions.table": 2e-3 * 0.8 ** (num_blocks + 1),
        "vision.blocks.0.attn.q.weight": 2e-3 * 0.8**num_blocks,
        "vision.blocks.1.norm2.bias": 2e-3 * 0.8 ** (num_blocks - 1),
        "vision.norm.weight": 2e-3,
        "projector.fc1.weight": 1e-3,
        "llm.blocks.0.attn.q.weight": 1e-3,
    }
    assert {name: found[name] for name in expected} == pytest.approx(expected, rel=1e-12)
    row = next(row for row in groups.report.rows if row.name == "vision.blocks.0.attn.q.weight")
    assert row.factor == pytest.approx(0.8**num_blocks)
    assert f"{row.lr:.3g} (x{row.factor:.3g})" in str(groups.report)


@pytest.mark.parametrize(
    ("kind", "name"), [(kind, name) for kind in ("vision", "llm") for name in list_components(kind, "*-tiny")]
)
def test_layer_decay_finds_the_ends_of_every_tower_and_decoder(kind: str, name: str) -> None:
    """What turns inputs into tokens is below the first block, the last norm and the head above the last, in every part."""
    part = component(kind, name)
    with torch.device("meta"):
        model = nn.ModuleDict({"part": part.module(part.configs[name])})
    factors = {
        row.name.removeprefix("part."): row.factor
        for row in muon_param_groups(model, lr={"": 1.0}, layer_decay={"part": 0.5}).report.rows
    }
    words = {name: set(name.split(".")) for name in factors}
    below = {"patch_embed", "positions", "embedding", "pos_embed", "cls_token", "reg_token", "norm_pre", "patch_norm"}
    num_blocks = max(int(name.split("blocks.")[1].split(".")[0]) for name in factors if "blocks." in name) + 1
    for parameter, factor in factors.items():
        if "blocks." in parameter:
            level = int(parameter.split("blocks.")[1].split(".")[0]) + 1
        else:
            level = 0 if words[parameter] & below else num_blocks + 1
        assert factor == 0.5 ** (num_blocks + 1 - level), parameter


def test_schedules_multiply_every_rate() -> None:
    """With the ratios between parts and layers kept."""
    model = vlkit.create_model("kimi-vl-tiny")
    groups = muon_param_groups(model, lr={"llm": 1e-3, "vision": 1e-4}, layer_decay={"vision": 0.8})
    optimizer = Muon(groups, lr=0.1)
    before = [group["lr"] for group in optimizer.param_groups]
    scheduler = LambdaLR(optimizer, partial(warmup_decay, total=10, warmup=4))
    assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([rate / 4 for rate in before])
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    scheduler.step()
    assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([rate / 2 for rate in before])
    assert len(set(before)) > 4


def test_frozen_parts_leave_the_groups_and_do_not_move() -> None:
    """After one step exactly the expected names have changed, all others bit for bit the same."""
    model = vlkit.create_model("kimi-vl-tiny")
    freeze(model, ["vision", "llm.embedding"], thaw=["vision.blocks.1", "vision.norm"])
    groups = muon_param_groups(model, lr={"vision": 1e-2, "llm": 1e-2})
    optimizer = Muon(groups, lr=1e-2)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    for parameter in model.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0))
    optimizer.step()
    changed = {name for name, parameter in model.named_parameters() if not torch.equal(parameter, before[name])}
    expected = {
        name
        for name in before
        if name.startswith(("vision.blocks.1.", "vision.norm.", "projector.", "llm."))
        and not name.startswith("llm.embedding")
    }
    assert changed == expected == set(rates(groups))
    counts = groups.report.num_parameters()
    assert counts["vision"][0] == sum(before[name].numel() for name in expected if name.startswith("vision."))
    assert counts["llm"][1] == before["llm.embedding.weight"].numel()
    assert counts["projector"][1] == 0


@pytest.mark.parametrize(
    ("parts", "thaw", "words"),
    [
        (["visoin"], [], "freeze: 'visoin' names no parameter"),
        (["vision"], ["vision"], "'vision' is to be frozen and to be trained"),
        ("vision", [], "takes lists of parts, found the text 'vision'"),
    ],
)
def test_parts_that_cannot_be_frozen_are_refused(parts: Any, thaw: list[str], words: str) -> None:
    model = tiny()
    with pytest.raises(ConfigError, match=words):
        freeze(model, parts, thaw=thaw)
    assert all(parameter.requires_grad for name, parameter in model.named_parameters() if "positions" not in name)


# Matrices


def matrices(groups: ParamGroups, ending: str) -> set[tuple[tuple[int, int, int], ...]]:
    return {row.matrices for row in groups.report.rows if row.name.endswith(ending) and row.route == "muon"}


def test_heads_become_matrices_where_asked_for() -> None:
    """Rows of q and of what makes keys and values from the latent, columns of the output; what heads share stays whole."""
    model = tiny()
    config = model.llm.config
    whole, heads = muon_param_groups(model), muon_param_groups(model, splits="heads")
    assert matrices(whole, "llm.blocks.0.attn.q.weight") == {
        ((1, config.num_heads * (config.nope_dim + config.rope_dim), config.dim),)
    }
    heads = muon_param_groups(model, splits="heads")
    attn = "llm.blocks.0.attn."
    assert matrices(heads, attn + "q.weight") == {((config.num_heads, config.nope_dim + config.rope_dim, config.dim),)}
    assert matrices(heads, attn + "kv_up.weight") == {
        ((config.num_heads, config.nope_dim + config.value_dim, config.kv_rank),)
    }
    assert matrices(heads, attn + "out.weight") == {((config.num_heads, config.dim, config.value_dim),)}
    assert matrices(heads, attn + "kv_down.weight") == {((1, config.kv_rank + config.rope_dim, config.dim),)}
    tower = model.vision.config
    head_dim = tower.dim // tower.num_heads
    assert matrices(heads, "vision.blocks.0.attn.k.weight") == {((tower.num_heads, head_dim, tower.dim),)}
    assert matrices(heads, "vision.blocks.0.attn.out.weight") == {((tower.num_heads, tower.dim, head_dim),)}
    assert matrices(heads, "mlp.fc1.weight") == matrices(whole, "mlp.fc1.weight")


def test_the_groups_built_last_say_how_a_weight_is_cut() -> None:
    model = tiny("andesvl-tiny")
    weight = model.llm.blocks[0].attn.k.weight
    config = model.llm.config
    muon_param_groups(model, splits="heads")
    assert units_of(weight)[0].count == config.num_kv_heads
    muon_param_groups(model)
    assert units_of(weight)[0].count == 1
    weight.muon_splits = (1, weight.shape[0] - 1)  # a person's word counts more
    muon_param_groups(model, splits="heads")
    assert [units.rows for units in units_of(weight)] == [1, weight.shape[0] - 1]


def test_a_fused_weight_of_timm_is_its_parts() -> None:
    part = component("vision", "timm-tiny")
    with torch.device("meta"):
        model = part.module(part.configs["timm-tiny"])
    dim = model.trunk.embed_dim
    num_heads = model.trunk.blocks[0].attn.num_heads
    assert matrices(muon_param_groups(model), "attn.qkv.weight") == {((3, dim, dim),)}
    assert matrices(muon_param_groups(model, splits="heads"), "attn.qkv.weight") == {
        ((3 * num_heads, dim // num_heads, dim),)
    }


@pytest.mark.parametrize("splits", ["declared", "heads"])
@pytest.mark.parametrize("name", vlkit.list_models("*-tiny"))
def test_every_trainable_parameter_of_every_model_is_in_one_group(name: str, splits: Any) -> None:
    model = tiny(name)
    groups = muon_param_groups(
        model,
        lr={"vision": 1e-5, "projector": 1e-4, "llm": 2e-5},
        layer_decay={"vision": 0.9, "llm": 0.95},
        decay_vectors=False,
        splits=splits,
    )
    held = [name for group in groups for name in group["param_names"]]
    assert sorted(held) == sorted(name for name, p in model.named_parameters() if p.requires_grad)
    assert len({id(p) for group in groups for p in group["params"]}) == len(held)
    by_name = {row.name: row for row in groups.report.rows}
    for group in groups:
        for name, parameter in zip(group["param_names"], group["params"], strict=True):
            row = by_name[name]
            assert (row.route, row.lr) == (group["algorithm"], group["lr"])
            assert row.decays == ("weight_decay" not in group)
            if row.route == "muon":
                assert sum(count * rows * cols for count, rows, cols in row.matrices) == parameter.numel()


def test_gate_and_up_in_one_weight_of_timm_are_two() -> None:
    from timm.layers import GluMlp

    with torch.device("meta"):
        model = nn.ModuleDict({"mlp": GluMlp(8, 12)})
    assert matrices(muon_param_groups(model), "fc1.weight") == {((2, 6, 8),)}
    assert matrices(muon_param_groups(model), "fc2.weight") == {((1, 8, 6),)}


@pytest.mark.parametrize("limit", [1e-3, 1e6])
def test_clipping_counts_the_whole_model_once(limit: float) -> None:
    """The norm is torch's over all parameters, tied ones once, and the state holds what torch's clipping leaves."""
    model = vlkit.create_model("andesvl-tiny")
    for i, parameter in enumerate(model.parameters()):
        parameter.grad = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(i)) * 0.1
    optimizer = Muon(muon_param_groups(model, lr={"vision": 1e-3}), 1e-2, max_grad_norm=limit)
    optimizer.step()
    norm = nn.utils.clip_grad_norm_(model.parameters(), limit)
    assert optimizer.last_grad_norm.item() == pytest.approx(norm.item(), rel=1e-6)
    for group in optimizer.param_groups:
        key, share = ("momentum_buffer", 0.05) if group["algorithm"] == "muon" else ("exp_avg", 0.1)
        for parameter in group["params"]:
            torch.testing.assert_close(optimizer.state[parameter][key], parameter.grad * share, rtol=1e-5, atol=1e-9)
