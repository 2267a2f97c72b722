"""Models from names: a registered one, or a composition of registered parts."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

import torch

from vlkit.config import Config
from vlkit.errors import ConfigError
from vlkit.models.meta import on_meta
from vlkit.models.vlm import VisionLanguageModel, VLMConfig
from vlkit.registry import KINDS, component, component_of, list_models, model_spec

if TYPE_CHECKING:
    from vlkit.models.family import ModelSpec
    from vlkit.processing import Processor

Part = str | Config | Mapping[str, Any]


def create_model(
    name_or_config: str | VLMConfig,
    *,
    pretrained: bool = False,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
    allow_pickle: bool = False,
    **overrides: Any,
) -> VisionLanguageModel:
    """Build a registered model, or one from a config.

        create_model("kimi-vl-tiny")
        create_model("kimi-vl-a3b", device="meta", llm={"num_layers": 4})

    Args:
        name_or_config: A name of `list_models`, or a VLMConfig.
        pretrained: Load the published weights from the Hub; otherwise weights are drawn from torch's random state.
        dtype: Of the weights; None means torch's default, or the checkpoint's own when pretrained.
        device: None means torch's default device; "meta" allocates nothing.
        allow_pickle: With pretrained, read pickled weights where a repository has no others, as those of AndesVL; see
            `from_pretrained`.
        overrides: Fields of VLMConfig. A part is given as a name, a config, or a dictionary of the fields to change; the
            projector's widths follow the tower and the decoder.

    Raises:
        UnknownModelError: No such name; the message has the nearest.
        ConfigError: Parts that do not fit, unknown fields, or pretrained weights that cannot be had.
    """
    spec: ModelSpec | None = None
    if isinstance(name_or_config, str):
        spec = model_spec(name_or_config)
        config = spec.config
    elif isinstance(name_or_config, VLMConfig):
        config = name_or_config
    else:
        raise ConfigError(f"expected a registered name or a VLMConfig, found {type(name_or_config).__name__}")
    if overrides:
        config = _override(config, overrides)
    if not pretrained:
        return build(config, dtype=dtype, device=device)
    if overrides or spec is None or spec.checkpoint is None:
        reason = "changed models have no published weights" if overrides else "no published weights are known"
        raise ConfigError(f"create_model(pretrained=True): {reason}; use vlkit.from_pretrained(repository or folder)")
    from vlkit.models.pretrained import from_pretrained

    return from_pretrained(
        spec.checkpoint.repo_id,
        revision=spec.checkpoint.revision,
        dtype=dtype or "auto",
        device=device or "cpu",
        allow_pickle=allow_pickle,
    )


def compose(
    *,
    vision: Part,
    projector: Part = "pixel-shuffle",
    llm: Part,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
    **more: Any,
) -> VisionLanguageModel:
    """Build a model from a tower, a projector and a decoder.

        compose(vision="moonvit-tiny", projector="pixel-shuffle", llm="qwen3-tiny")

    Args:
        vision: A name of `list_components("vision")`, or a config.
        projector: A name, whose widths are fitted to the other two; a dictionary of fields of the pixel-shuffle projector,
            likewise; or a config, which is checked.
        llm: A name of `list_components("llm")`, or a config.
        dtype: Of the weights; None means torch's default.
        device: None means torch's default; "meta" allocates nothing.
        more: Fields of VLMConfig, such as image_token_id and stop_ids; by default those of the built-in byte tokenizer.

    Raises:
        UnknownModelError: No such part; the message has the nearest names.
        ConfigError: Parts that do not fit; the message has both numbers.
    """
    from vlkit.processing import ByteTokenizer

    special = ByteTokenizer().special
    tower, decoder = _part("vision", vision), _part("llm", llm)
    fields = {"image_token_id": special["<|media_pad|>"], "stop_ids": (special["<|im_end|>"],), **more}
    default = component("projector", "pixel-shuffle").configs["pixel-shuffle"]  # whose fields a dictionary changes
    config = VLMConfig.from_dict(
        {"vision": tower, "projector": _fitted(projector, tower, decoder, default), "llm": decoder, **fields}
    )
    return build(config, dtype=dtype, device=device)


def create_processor(model: str | VisionLanguageModel) -> Processor:
    """The processor of a registered model, or one over bytes that fits a composed model.

    Args:
        model: A name of `list_models`, or a model. One that a registered name stands for gets that name's processor. Any other
            gets one over bytes that sizes images for its tower and projector: with the chat format of the registered model
            that has its placeholders, such as the one whose part was swapped, or else the plain format.

    Raises:
        UnknownModelError: No such name.
        ConfigError: The model's vocabulary comes from files: use Processor.from_pretrained(repository or folder).
    """
    from vlkit.processing import Processor, ProcessorConfig

    if isinstance(model, str):
        return _processor_of(model_spec(model))
    if not isinstance(model, VisionLanguageModel):
        raise ConfigError(f"create_processor: expected a registered name or a model, found {type(model).__name__}")
    config: Any = model.config
    for name in list_models():
        if model_spec(name).config == config:
            return _processor_of(model_spec(name))
    fitted = {
        "patch_size": config.vision.patch_size,
        "merge_size": config.projector.merge_size,
        "frames_per_patch": getattr(config.vision, "frames_per_patch", 1),
        "tokens_per_image": _tokens_per_image(config.projector),
    }
    if hasattr(config.vision, "pixel_statistics"):
        fitted |= config.vision.pixel_statistics._asdict()
    base = ProcessorConfig()
    for name in list_models():
        spec = model_spec(name)
        same = all(
            getattr(spec.config, f) == getattr(config, f) for f in ("image_token_id", "video_token_id", "hub_inputs")
        )
        if same and spec.config.family is not None and spec.processor.tokenizer == "bytes":
            base = spec.processor
            break
    processor = Processor(base.replace(image=base.image.replace(**fitted)))
    if processor.image_token_id != config.image_token_id:
        raise ConfigError(
            f"the model's image_token_id is {config.image_token_id}, the built-in byte tokenizer's is "
            f"{processor.image_token_id}; give the model the id, or make a "
            "Processor with the tokenizer that the model was trained with"
        )
    return processor


def _tokens_per_image(projector: Any) -> int | None:
    """How many tokens the projector makes of an image, if that is the same for all sizes."""
    sides = (projector.merge_size, 2 * projector.merge_size, 3 * projector.merge_size)
    counts = {math.prod(projector.out_grid((1, side, side))) for side in sides}
    return counts.pop() if len(counts) == 1 else None


def _processor_of(spec: ModelSpec) -> Processor:
    from vlkit.processing import Processor

    if spec.processor.tokenizer == "files":
        source = repr(spec.checkpoint.repo_id) if spec.checkpoint else "repository or folder"
        raise ConfigError(f"the vocabulary comes from files: use Processor.from_pretrained({source})")
    return Processor(spec.processor)


def build(
    config: VLMConfig, *, dtype: torch.dtype | None = None, device: torch.device | str | None = None
) -> VisionLanguageModel:
    """A model with freshly drawn weights: shapes first, on meta, then memory once, then values.

    Raises:
        ConfigError: A tensor that no `reset_parameters` of its part gives values to; it would be whatever memory holds.
    """
    if not (dtype is None or (isinstance(dtype, torch.dtype) and dtype.is_floating_point)):
        raise ConfigError(f"dtype: expected a floating torch.dtype such as torch.bfloat16, found {dtype!r}")
    try:
        device = torch.get_default_device() if device is None else torch.device(device)
    except (RuntimeError, TypeError) as error:
        raise ConfigError(f"device: {device!r} is none: {str(error).splitlines()[0]}") from error
    with on_meta():
        model = VisionLanguageModel(config)
    model.to(dtype=dtype or torch.get_default_dtype())
    if device.type != "meta":
        model.to_empty(device=device)
        draw_weights(model)
    return model


def draw_weights(
    model: VisionLanguageModel,
    *,
    during: AbstractContextManager[object] | None = None,
    local: Callable[[torch.Tensor], torch.Tensor] = torch.Tensor.detach,
) -> None:
    """Give all weights of a model their first values, from torch's random state.

    Args:
        during: Holds while the values are drawn.
        local: What of a tensor has memory here.

    Raises:
        ConfigError: A tensor that no `reset_parameters` of its part gives values to; it would be whatever memory holds.
    """
    named = dict(model.named_parameters()) | dict(model.named_buffers())
    tensors = {name: local(tensor).view(-1)[:1] for name, tensor in named.items()}
    for tensor in tensors.values():
        tensor.fill_(_mark(tensor))
    with during or nullcontext():
        model.reset_parameters()
    left = [name for name, tensor in tensors.items() if tensor.numel() and _is_mark(tensor[0])]
    if left:
        raise ConfigError(
            f"no reset_parameters gives values to {', '.join(left)}: parts are built on meta, so what __init__ writes is "
            "lost; fill parameters and buffers in a method reset_parameters of the module that owns them"
        )


def _mark(tensor: torch.Tensor) -> float | int:
    """A value that no initialisation writes."""
    return float("nan") if tensor.dtype.is_floating_point or tensor.is_complex() else _least(tensor)


def _is_mark(value: torch.Tensor) -> bool:
    if value.dtype.is_floating_point or value.is_complex():
        return bool(value.isnan())
    return value.dtype != torch.bool and bool(value == _least(value))


def _least(tensor: torch.Tensor) -> int:
    return 0 if tensor.dtype == torch.bool else torch.iinfo(tensor.dtype).min


def _part(kind: str, part: Part, current: Config | None = None) -> Config:
    if isinstance(part, str):
        return component(kind, part).configs[part]
    if isinstance(part, Config):
        component_of(part)  # raises where it is not registered
        return part
    if not isinstance(part, Mapping) or current is None:
        wanted = "a registered name or a config" + (", or a dictionary of fields to change" if current else "")
        raise ConfigError(f"{kind}: expected {wanted}, found {type(part).__name__}")
    return current.replace(**part)


def _fitted(projector: Part, vision: Config, llm: Config, current: Config | None = None) -> Config:
    """The projector between two parts: widths that a person did not write follow the neighbours."""
    if isinstance(projector, Config):
        return projector
    for part, width in ((vision, "out_dim"), (llm, "dim")):
        if not hasattr(part, width):
            raise ConfigError(
                f"{type(part).__name__} has no {width}; docs/architecture.md says what each kind of part promises"
            )
    widths = {"in_dim": vision.out_dim, "out_dim": llm.dim}  # type: ignore[attr-defined]
    changes = dict(projector) if isinstance(projector, Mapping) else {}
    base = current if isinstance(projector, Mapping) and current is not None else _part("projector", projector)
    if hasattr(base, "num_levels"):  # a projector that reads several depths of the tower takes as many as there are
        widths["num_levels"] = getattr(vision, "num_levels", 1)
    return base.replace(**{**widths, **changes})


def _override(config: VLMConfig, overrides: dict[str, Any]) -> VLMConfig:
    fields = dict(overrides)
    parts = {k: _part(k, fields.pop(k, {}), getattr(config, k)) for k in ("vision", "llm")}
    parts["projector"] = _fitted(fields.pop("projector", {}), parts["vision"], parts["llm"], config.projector)
    swapped = any(component_of(parts[k]) is not component_of(getattr(config, k)) for k in KINDS)
    if swapped:
        fields.setdefault("family", None)  # the family's Hub layout cannot hold another part
    return config.replace(**parts, **fields)
