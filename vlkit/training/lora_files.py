"""Adapters in PEFT's format: adapter_config.json and adapter_model.safetensors, by the names of the family's own modules.

    ours    llm.blocks.0.attn.q                      vision.blocks.0.attn.q, .k, .v
    file    model.language_model.layers.0.self_attn.q_proj        model.visual.blocks.0.attn.qkv

So transformers and PEFT read them on the same checkpoint, and theirs are read here. Where the Hub has one layer of several
of ours, adapters of rank r on its parts become one of the summed rank: A are stacked, B stand in blocks. If all parts
have the same A, as after reading such an adapter, it stays what it was.
"""

from __future__ import annotations

import json
import math
import os
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from vlkit.errors import CheckpointError, ConfigError, CorruptCheckpointError, KeyMismatchError
from vlkit.hub.atomic import write_folder
from vlkit.hub.keymap import KeyMap, Rule
from vlkit.hub.safe_files import safe_file
from vlkit.hub.safetensors_file import write_safetensors
from vlkit.hub.strict_json import read_json
from vlkit.models.pretrained import layouts_of
from vlkit.models.vlm import VisionLanguageModel
from vlkit.training.lora import import_peft, inject, linear_layers, lora_layers, lora_pair, moves_rows, published_layers

CONFIG, WEIGHTS, PREFIX = "adapter_config.json", "adapter_model.safetensors", "base_model.model."
WITHOUT_EFFECT = {  # of adapter_config.json: what a loaded adapter computes does not depend on them
    "auto_mapping", "base_model_name_or_path", "corda_config", "eva_config", "inference_mode", "init_lora_weights",
    "loftq_config", "megatron_core", "peft_type", "peft_version", "qalora_group_size", "revision", "task_type", "use_qalora",
    "target_modules", "exclude_modules", "lora_dropout", "r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern",
    "runtime_config", "ensure_weight_tying",
}  # fmt: skip


class Adapter(NamedTuple):
    """One adapter: the layer gives W x + scale * B A x."""

    a: Tensor
    b: Tensor
    scale: float


def save_adapter(model: VisionLanguageModel, folder: str | os.PathLike[str], *, base: str | None = None) -> None:
    """Write the adapters of a model, whole or not at all; other files of the folder stay.

    Args:
        model: With adapters, of `add_lora` or `load_adapter`.
        folder: Made if it is not there.
        base: Repository or folder of the model that the adapters belong to, as adapter_config.json names it.

    Raises:
        ConfigError: The model has no adapters.
        DiskFullError: Not enough space.
    """
    ours = {name: Adapter(*lora_pair(layer)) for name, layer in lora_layers(model)}
    if not ours:
        raise ConfigError("save_adapter: the model has no adapters; model.save_pretrained writes a whole model")
    theirs = _published(model, ours)
    dropout = next(layer.lora_dropout["default"] for _, layer in lora_layers(model))
    (rank, alpha), _ = Counter((len(one.a), _alpha(one)) for one in theirs.values()).most_common(1)[0]
    config = import_peft().LoraConfig(
        r=rank,
        lora_alpha=alpha,
        lora_dropout=getattr(dropout, "p", 0.0),
        target_modules=sorted(theirs),
        rank_pattern={name: len(one.a) for name, one in theirs.items() if len(one.a) != rank},
        alpha_pattern={name: _alpha(one) for name, one in theirs.items() if _alpha(one) != alpha},
        base_model_name_or_path=base,
        inference_mode=True,
    )
    values = {key: sorted(value) if isinstance(value, set) else value for key, value in config.to_dict().items()}
    tensors = {}
    for name, one in theirs.items():
        for kind, matrix in (("A", one.a), ("B", one.b)):
            tensors[f"{PREFIX}{name}.lora_{kind}.weight"] = matrix.detach().cpu().contiguous()

    def write(staging: Path) -> None:
        (staging / CONFIG).write_text(
            json.dumps(values, indent=2, sort_keys=True, default=str) + "\n", encoding="utf-8"
        )
        listed = [(name, matrix.dtype, tuple(matrix.shape)) for name, matrix in tensors.items()]
        write_safetensors(staging / WEIGHTS, listed, tensors.__getitem__, metadata={"format": "pt"})

    write_folder(Path(folder), write, replaces=lambda name: name in (CONFIG, WEIGHTS))


def load_adapter(model: VisionLanguageModel, folder: str | os.PathLike[str]) -> list[str]:
    """Put the adapters of a folder beside the layers that they belong to; all that is no adapter is then frozen.

    Args:
        model: The model that they were trained on, without adapters.
        folder: With adapter_config.json and adapter_model.safetensors, of `save_adapter` or of PEFT.

    Returns:
        Names of the adapted layers.

    Raises:
        CheckpointError: Files that are missing or broken.
        KeyMismatchError: Adapters for layers that the model does not have, or of other sizes.
        ConfigError: Another method than LoRA, or variants of it that compute something else.
    """
    folder = Path(folder)
    config = read_json(safe_file(folder, CONFIG))
    _refuse_variants(config, folder / CONFIG)
    found = _read(folder, config)
    ours = _translated(model, found, folder)
    inject(
        model,
        {name: (len(one.a), one.scale) for name, one in ours.items()},
        dropout=float(config.get("lora_dropout", 0)),
    )
    with torch.no_grad():
        for name, layer in lora_layers(model):
            a, b, _ = lora_pair(layer)
            a.copy_(ours[name].a)
            b.copy_(ours[name].b)
    return list(ours)


def _alpha(one: Adapter) -> float:
    """The alpha that gives the scale, a whole number where it is one."""
    alpha = round(one.scale * len(one.a), 9)
    return int(alpha) if alpha.is_integer() else alpha


def _published(model: VisionLanguageModel, ours: Mapping[str, Adapter]) -> dict[str, Adapter]:
    """Adapters of the Hub's modules."""
    places: dict[str, tuple[Rule, dict[int, str], dict[int, int]]] = {}
    layers = linear_layers(model)
    for name, (module, rule, part) in published_layers(model).items():
        _, members, rows = places.setdefault(module, (rule, {}, {}))
        members[part], rows[part] = name, layers[name].out_features
    theirs = {}
    for module, (rule, members, rows) in places.items():
        adapted = {part: ours[name] for part, name in members.items() if name in ours}
        if adapted:
            theirs[module] = _joined(rule, adapted, rows)
    return theirs


def _joined(rule: Rule, adapters: Mapping[int, Adapter], rows: Mapping[int, int]) -> Adapter:
    """One adapter of a layer that several of ours are parts of; parts without an adapter have B = 0."""
    first, *others = adapters.values()
    shared = all(other.scale == first.scale and torch.equal(other.a, first.a) for other in others)
    total = len(first.a) if shared else sum(len(one.a) for one in adapters.values())
    blocks, start = [], 0
    for part in sorted(rows):
        block = first.b.new_zeros(rows[part], total)
        if part in adapters:
            one = adapters[part]
            width = len(one.a)
            block[:, start : start + width] = one.b.detach() * (one.scale / first.scale)
            start += 0 if shared else width
        blocks.append(block)
    a = first.a if shared else torch.cat([adapters[part].a for part in sorted(adapters)])
    return Adapter(a, rule.join(blocks), first.scale)


def _refuse_variants(config: Mapping[str, Any], where: Path) -> None:
    if config.get("peft_type") != "LORA":
        raise ConfigError(f"{where}: peft_type {config.get('peft_type')!r} is not supported, only 'LORA'")
    if config.get("bias", "none") != "none":
        raise ConfigError(
            f"{where}: bias {config['bias']!r} is not supported: biases were trained that are no adapters"
        )
    for field, value in config.items():
        if field not in WITHOUT_EFFECT and field != "bias" and value:
            raise ConfigError(f"{where}: {field} = {value!r} is not supported; it changes what an adapter computes")


def _read(folder: Path, config: Mapping[str, Any]) -> dict[str, Adapter]:
    """The adapters of a file by their modules' names."""
    path = safe_file(folder, WEIGHTS)
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise CorruptCheckpointError(f"{path}: cannot be read: {error}") from error
    pairs: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        module, dot, kind = name.removeprefix(PREFIX).rpartition(".lora_")
        if not name.startswith(PREFIX) or not dot or kind not in ("A.weight", "B.weight") or tensor.ndim != 2:
            raise KeyMismatchError(f"{path}: {name} {list(tensor.shape)} is no matrix of an adapter of a linear layer")
        pairs.setdefault(module, {})[kind[0]] = tensor
    found = {}
    for module, pair in pairs.items():
        if set(pair) != {"A", "B"} or len(pair["A"]) != pair["B"].shape[1]:
            sizes = ", ".join(f"{kind} {list(tensor.shape)}" for kind, tensor in pair.items())
            raise CheckpointError(f"{path}: {module}: A [rank, in] and B [out, rank] expected, found {sizes}")
        rank = _patterned(config.get("rank_pattern"), module, config.get("r"))
        if rank != len(pair["A"]):
            raise CheckpointError(f"{path}: {module}: rank {len(pair['A'])}, but {CONFIG} says {rank}")
        alpha = _patterned(config.get("alpha_pattern"), module, config.get("lora_alpha"))
        if isinstance(alpha, bool) or not isinstance(alpha, int | float):
            raise ConfigError(f"{folder / CONFIG}: lora_alpha {alpha!r} is no number")
        scale = alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)
        found[module] = Adapter(pair["A"], pair["B"], scale)
    if not found:
        raise CheckpointError(f"{path}: holds no adapters")
    return found


def _patterned(pattern: Any, module: str, default: Any) -> Any:
    """The value for a module: of the longest end of its name that the pattern has."""
    ends = [end for end in pattern or {} if f".{module}".endswith(f".{end}")]
    return pattern[max(ends, key=len)] if ends else default


def _translated(model: VisionLanguageModel, found: Mapping[str, Adapter], folder: Path) -> dict[str, Adapter]:
    """Adapters of our layers, by that layout of the family which has all the names."""
    layers, problems = linear_layers(model), []
    for keys in layouts_of(model.config):
        ours: dict[str, Adapter] = {}
        try:
            for module, one in found.items():
                ours |= _parts(keys, module, one)
        except KeyMismatchError as error:
            problems.append(str(error))
            continue
        wrong = [
            f"{name}: {'no such layer' if name not in layers else _sizes(one, layers[name].weight)}"
            for name, one in ours.items()
            if name not in layers or (len(one.b), one.a.shape[1]) != tuple(layers[name].weight.shape)
        ]
        if not wrong:
            return {name: ours[name] for name in layers if name in ours}
        problems.append("\n".join(wrong[:5]))
    raise KeyMismatchError(
        f"{folder / WEIGHTS}: these adapters do not fit the model ({len(found)} modules, such as {next(iter(found))}); were "
        f"they trained on another?\n{min(problems, key=len)}"
    )


def _sizes(one: Adapter, weight: Tensor) -> str:
    return f"the adapter is for [{len(one.b)}, {one.a.shape[1]}], the layer is {list(weight.shape)}"


def _parts(keys: KeyMap, module: str, one: Adapter) -> dict[str, Adapter]:
    name, shape = f"{module}.weight", (len(one.b), one.a.shape[1])
    steps = keys.plan_load({name: shape})
    if not steps or any(step.rule.over is not None or not moves_rows(step.rule) for step in steps):
        raise KeyMismatchError(f"{module}: no linear layer of this model")
    return {
        step.target.removesuffix(".weight"): Adapter(one.a, step.rule.block(one.b, step.part), one.scale)
        for step in steps
    }
