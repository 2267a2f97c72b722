"""LoRA through PEFT: small matrices beside the linear layers of any part, under the names that people know.

    add_lora(model, LoraOptions(targets=("q_proj", "v_proj"), parts=("llm",), rank=16))
    W x  ->  W x + scale * B (A x)      A [rank, in], B [out, rank] = 0 at first, scale = alpha / rank
    merge_lora(model)                   W + scale * B A, and the layers as they were
    with without_lora(model): ...       what the model gave before, such as the reference of a preference loss

A target is the end of a layer's name, in whole words between dots: as the Hub's modules of the family call it ("q_proj",
"self_attn.o_proj", the tower's fused "attn.qkv"), as this library does ("attn.q"), or "all-linear". In the adapted parts the
base rests and the adapters learn; other parts stay as they were. `vlkit.training.lora_files` writes and reads adapters in
PEFT's format.

Source: Hu et al., arXiv:2106.09685; rslora, arXiv:2312.03732.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn

from vlkit.config import Config, Positive, Size
from vlkit.errors import ConfigError, MissingDependencyError
from vlkit.hub.keymap import KeyMap, Rule
from vlkit.models.pretrained import layouts_of
from vlkit.models.vlm import VisionLanguageModel
from vlkit.optim.parts import is_dtensor
from vlkit.training.options import Share

NAME = "default"  # of the adapter inside PEFT's layers
ALL_LINEAR = "all-linear"
KNOWN = {
    "q": "q_proj",
    "k": "k_proj",
    "v": "v_proj",
    "out": "o_proj",
    "gate": "gate_proj",
    "up": "up_proj",
    "down": "down_proj",
}  # ours -> what people call it where the Hub's name is another one
MODULE_LAYOUTS = {"qwen2-vl": 1, "qwen2.5-vl": 1}
"""Families whose checkpoints have other names than the modules of their code, and the layout that has those of the modules."""


class LoraOptions(Config):
    """Which layers get adapters, and of which size.

    Attributes:
        targets: Ends of layers' names, see the top of this file; or "all-linear", all that can have adapters: not the head, nor
            what the Hub holds in another shape, such as patch embeddings.
        parts: Parts of the model in which they are looked for.
        rank: Rows of A and columns of B.
        alpha: Strength; B A is multiplied with alpha / rank.
        dropout: Share of the inputs of A that are 0 in training.
        rslora: Multiply with alpha / sqrt(rank) instead.
    """

    targets: tuple[str, ...] = (ALL_LINEAR,)
    parts: tuple[Literal["vision", "projector", "llm"], ...] = ("llm",)
    rank: Size = 16
    alpha: Positive = 32.0
    dropout: Share = 0.0
    rslora: bool = False

    def check(self) -> None:
        if not self.targets or not self.parts:
            raise ConfigError("LoraOptions: targets and parts name at least one each")
        if self.dropout == 1:
            raise ConfigError("LoraOptions.dropout: 1 drops everything; expected a share below 1")

    @property
    def scale(self) -> float:
        """What B A is multiplied with."""
        return self.alpha / (math.sqrt(self.rank) if self.rslora else self.rank)


def add_lora(model: VisionLanguageModel, options: LoraOptions) -> list[str]:
    """Put adapters beside the linear layers that the options name, in place. B is 0: the model gives what it gave.

    Call it after freezing parts and before an optimizer is made: in the adapted parts it freezes what is not an adapter.

    Args:
        model: On any device, also meta; whole, not sharded.
        options: Which layers.

    Returns:
        Names of the adapted layers.

    Raises:
        ConfigError: A target without a layer, a layer that cannot be adapted or whose adapter could not be saved, a model that
            has adapters or is sharded.
        MissingDependencyError: PEFT is not installed.
    """
    names = _targeted(model, options)
    trained = {name: p.requires_grad for name, p in model.named_parameters()}
    inject(model, dict.fromkeys(names, (options.rank, options.scale)), dropout=options.dropout)
    for name, parameter in model.named_parameters():
        inside = name.split(".")[0] in options.parts
        base = name.replace(".base_layer.", ".")
        parameter.requires_grad_(is_adapter(name) if inside else trained[base])
    return names


def inject(model: VisionLanguageModel, layers: Mapping[str, tuple[int, float]], *, dropout: float = 0.0) -> None:
    """Put PEFT's layers in the place of linear ones; all that is no adapter is then frozen.

    Args:
        model: Whole, without adapters.
        layers: Name of each layer -> (rank, scale).
        dropout: In all of them.
    """
    if has_lora(model):
        raise ConfigError("the model has adapters already; merge_lora or remove_lora first")
    if model.parts_are_sharded or any(is_dtensor(p) for p in model.parameters()):
        raise ConfigError("adapters are added to a whole model: before shard_model, or with ranks.sharding = 'zero1'")
    peft = import_peft()
    (rank, scale), *_ = layers.values()
    config = peft.LoraConfig(
        r=rank,
        lora_alpha=scale * rank,
        lora_dropout=dropout,
        target_modules=list(layers),
        rank_pattern={name: r for name, (r, _) in layers.items() if r != rank},
        alpha_pattern={name: s * r for name, (r, s) in layers.items() if s * r != scale * rank},
    )
    peft.inject_adapter_in_model(config, model, adapter_name=NAME)
    adapted = {name for name, _ in lora_layers(model)}
    assert adapted == set(layers), f"PEFT adapted other layers: {sorted(adapted ^ set(layers))[:3]}"


def lora_layers(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """Name and module of every layer that has an adapter."""
    return ((name, module) for name, module in model.named_modules() if hasattr(module, "lora_A"))


def has_lora(model: nn.Module) -> bool:
    """Whether any layer has an adapter."""
    return next(lora_layers(model), None) is not None


def is_adapter(name: str) -> bool:
    """Whether a parameter of this name belongs to an adapter."""
    return ".lora_A." in name or ".lora_B." in name


def merge_lora(model: nn.Module) -> None:
    """Add every adapter to its layer and take it away, in place. Names and shapes are then those of the model without.

    In bf16 the sum is rounded to bf16, as everything that is saved.
    """
    for name, layer in list(lora_layers(model)):
        layer.merge()
        _put_back(model, name, layer)


def remove_lora(model: nn.Module) -> None:
    """Take the adapters away, in place; the model gives what it gave before they were added."""
    for name, layer in list(lora_layers(model)):
        _put_back(model, name, layer)


@contextmanager
def without_lora(model: nn.Module) -> Iterator[None]:
    """The model without its adapters, for as long as it takes; which parameters learn stays as it is."""
    layers = [(layer, [p.requires_grad for p in layer.parameters()]) for _, layer in lora_layers(model)]
    for layer, _ in layers:
        layer.enable_adapters(False)
    try:
        yield
    finally:
        for layer, learning in layers:
            layer.enable_adapters(True)
            for parameter, was in zip(layer.parameters(), learning, strict=True):
                parameter.requires_grad_(was)


def import_peft() -> Any:
    """PEFT, or an error that says how to get it."""
    try:
        import peft
    except ImportError as missing:
        raise MissingDependencyError("LoRA needs PEFT: pip install 'vlkit[peft]'") from missing
    return peft


def module_keys(model: VisionLanguageModel) -> KeyMap:
    """Names of weights by the modules of the family's own code, which adapters are saved for."""
    return layouts_of(model.config)[MODULE_LAYOUTS.get(model.config.family or "", 0)]


def linear_layers(model: VisionLanguageModel) -> dict[str, nn.Linear]:
    """All linear layers by their names, whether they have adapters or not."""
    found = {}
    for name, module in model.named_modules():
        layer = getattr(module, "base_layer", module)
        if isinstance(layer, nn.Linear) and not name.endswith(".base_layer") and ".lora_" not in name:
            found[name] = layer
    return found


def published_layers(model: VisionLanguageModel) -> dict[str, tuple[str, Rule, int]]:
    """Linear layer -> (the Hub's module, the rule between their weights, the layer's part of that module)."""
    keys, layers = module_keys(model), linear_layers(model)
    shapes = {f"{name}.weight": tuple(layer.weight.shape) for name, layer in layers.items()}
    made = {}
    for step in keys.plan_save(shapes):
        if step.row is None and step.target.endswith(".weight"):
            for part, source in enumerate(step.sources):
                made[source.removesuffix(".weight")] = (step.target.removesuffix(".weight"), step.rule, part)
    return {name: made[name] for name in layers if name in made}


def _put_back(model: nn.Module, name: str, layer: Any) -> None:
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, layer.get_base_layer())


def _targeted(model: VisionLanguageModel, options: LoraOptions) -> list[str]:
    """The layers that the options name, in the order of the model."""
    published = published_layers(model)
    known = {
        name: _spellings(name, published[name][0] if name in published else None)
        for name in linear_layers(model)
        if name.split(".")[0] in options.parts
    }
    chosen: set[str] = set()
    for target in options.targets:
        if target == ALL_LINEAR:
            fitting = [name for name in known if _obstacle(name, published) is None]
        else:
            end = f".{target}"
            fitting = [name for name, all_ in known.items() if any(f".{other}".endswith(end) for other in all_)]
        if not fitting:
            _refuse_target(model, target, options.parts, known)
        chosen.update(fitting)
    for name in chosen:
        if obstacle := _obstacle(name, published):
            raise ConfigError(f"LoraOptions.targets: {name} {obstacle}")
    return [name for name in known if name in chosen]


def _spellings(name: str, published: str | None) -> list[str]:
    """Names by which people call a layer."""
    head, _, last = name.rpartition(".")
    spellings = [name] if published is None else [name, published]
    return spellings + ([f"{head}.{KNOWN[last]}"] if last in KNOWN else [])


def _refuse_target(model: nn.Module, target: str, parts: Sequence[str], known: Mapping[str, Sequence[str]]) -> None:
    for name, parameter in model.named_parameters():
        if parameter.ndim == 3 and "experts" in name and name.split(".")[0] in parts and target in (
            "experts",
            KNOWN.get(name.rpartition(".")[2]),
            name.rpartition(".")[2],
        ):  # fmt: skip
            raise ConfigError(
                f"LoraOptions.targets: {target!r} fits only the stacked experts ({name} {list(parameter.shape)}), whose adapters "
                "are not supported: PEFT would make the whole stack anew in every forward, and the Hub has other names for "
                "each expert. The layers of attention and of shared experts can have them"
            )
    ends = list(dict.fromkeys(other.rpartition(".")[2] for spellings in known.values() for other in spellings))
    raise ConfigError(
        f"LoraOptions.targets: {target!r} names no linear layer of {', '.join(parts)}; there are "
        f"{', '.join(ends) if ends else 'none'}, and {ALL_LINEAR!r}"
    )


def _obstacle(name: str, published: Mapping[str, tuple[str, Rule, int]]) -> str | None:
    """Why a layer cannot have an adapter: training would not see it, or it could not be saved."""
    if name == "llm.lm_head":
        return "is the head, whose weight alone the loss reads: it cannot have an adapter"
    if name not in published:
        return "is no layer of its own on the Hub: an adapter could not be saved"
    theirs, rule, _ = published[name]
    if not moves_rows(rule):
        return f"is {theirs} on the Hub, in another shape or order: an adapter could not be saved"
    return None


def moves_rows(rule: Rule) -> bool:
    """Whether a weight and its published form differ at most by the order of rows, or by lying in one with others.

    The functions of a rule are anybody's, so the question is put to numbers: f(B A) has to be f(B) A.
    """
    if rule.dim not in (0, -2) and rule.parts:
        return False
    if rule.to_theirs is None:
        return True
    generator = torch.Generator().manual_seed(0)
    b, a = (torch.randint(-9, 9, shape, generator=generator).double() for shape in ((48, 48), (48, 48)))
    try:
        return torch.equal(rule.to_theirs(b @ a), rule.to_theirs(b) @ a)
    except (RuntimeError, ValueError, IndexError):
        return False


def lora_pair(layer: Any) -> tuple[Tensor, Tensor, float]:
    """A, B and the scale of an adapted layer."""
    return layer.lora_A[NAME].weight, layer.lora_B[NAME].weight, float(layer.scaling[NAME])
