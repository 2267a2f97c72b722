"""Whole models from folders and repositories, and back: config, key map and weights in a family's own Hub layout, or in vlkit's.

repository or folder -> config.json -> family by model_type (or vlkit's own) -> VLMConfig -> model on meta -> weights streamed in
"""

from __future__ import annotations

import json
import os
import tempfile
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch

from vlkit.errors import CheckpointError, ConfigError, UnknownFieldWarning, UnknownModelError
from vlkit.generation.settings import read_generation_settings
from vlkit.hub import pretrained as hub
from vlkit.hub.checkpoint import write_manifest
from vlkit.hub.keymap import KeyMap, rename
from vlkit.hub.safe_files import safe_file
from vlkit.hub.strict_json import read_json
from vlkit.models.meta import on_meta
from vlkit.models.vlm import VisionLanguageModel, VLMConfig
from vlkit.registry import families, list_models, unknown_name
from vlkit.version import __version__

if TYPE_CHECKING:
    from vlkit.models.family import Family

OWN_MODEL_TYPE = "vlkit"
GENERATION = "generation_config.json"


def from_pretrained(
    repo_or_folder: str | os.PathLike[str],
    *,
    revision: str | None = None,
    cache_dir: str | Path | None = None,
    token: str | bool | None = None,
    local_files_only: bool = False,
    dtype: torch.dtype | Literal["auto"] = "auto",
    device: torch.device | str = "cpu",
    strict: bool = True,
    strict_config: bool = False,
    layout: int | None = None,
    mapped: bool = True,
    check_finite: bool | None = None,
    allow_quantized: bool = False,
    allow_pickle: bool = False,
) -> VisionLanguageModel:
    """Load a model: its family by the checkpoint's own model_type, its weights streamed from mapped files.

    Args:
        repo_or_folder: A folder, or a repository id of the Hub.
        revision: Branch, tag or commit; all files come from the one commit that it names at the start.
        cache_dir: Where downloads are kept; None means the Hub client's own place.
        token: For gated and private repositories; None means the one that is stored.
        local_files_only: Never ask the Hub.
        dtype: Of the parameters; "auto" is what most of the checkpoint's numbers have. Buffers keep the model's own.
        device: Where the weights go.
        strict: Every name and shape of the weights must fit; False loads what fits and warns of the rest.
        strict_config: Refuse fields of config.json that have no effect here, instead of warning of them.
        layout: Which of the family's published layouts the weights are in, for the rare files that fit two: 0 is the one that
            the family writes, the others follow in the order of its `other_keys`.
        mapped: On the CPU, weights stay views of the mapped files until something writes to them, so that loading copies nothing.
            False copies them, for files that somebody may overwrite in place; vlkit's own saves never do.
        check_finite: Refuse NaN and infinity; None looks for them in models below 10^8 parameters.
        allow_quantized: Take integers and 8-bit floats as bare numbers, without scales.
        allow_pickle: Read `.bin` files if there is nothing else, with torch's weights_only loader.

    Raises:
        CheckpointError: Files that are missing, broken, unsafe, or do not fit the model.
        ConfigError: A config.json that is malformed or that this family's code would not follow.
        UnknownModelError: No family answers to its model_type.
    """
    if isinstance(dtype, str) and dtype != "auto":
        raise ConfigError(f"dtype: expected 'auto' or a torch.dtype, found {dtype!r}")
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, TypeError) as failure:
        reason = str(failure).splitlines()[0]
        raise ConfigError(f"device {device!r} cannot be used: {reason}") from failure
    if torch.device(device).type == "meta":
        raise ConfigError("device 'meta' holds no weights; vlkit.create_model(..., device='meta') builds the shapes")
    if str(repo_or_folder) in list_models() and not Path(repo_or_folder).is_dir():
        raise CheckpointError(
            f"{str(repo_or_folder)!r} is a registered model, not a folder or repository: use vlkit.create_model"
        )
    folder = hub.resolve(
        repo_or_folder,
        revision=revision,
        cache_dir=cache_dir,
        token=token,
        local_files_only=local_files_only,
        allow_pickle=allow_pickle,
    )
    config = read_config(folder, strict=strict_config, allow_quantized=allow_quantized)
    with on_meta():
        model = VisionLanguageModel(config)
    read_weights(
        model,
        folder,
        dtype=dtype,
        device=device,
        strict=strict,
        layout=layout,
        mapped=mapped,
        check_finite=check_finite,
        allow_quantized=allow_quantized,
        allow_pickle=allow_pickle,
    )
    return model.eval()


def read_weights(
    model: VisionLanguageModel,
    folder: Path,
    *,
    dtype: torch.dtype | Literal["auto"] = "auto",
    device: torch.device | str = "cpu",
    strict: bool = True,
    layout: int | None = None,
    mapped: bool = True,
    check_finite: bool | None = None,
    allow_quantized: bool = False,
    allow_pickle: bool = False,
    holding: hub.Holding | None = None,
) -> None:
    """Fill a model from a folder whose config it has. See `from_pretrained`; `holding` as in `vlkit.hub.pretrained.load_weights`.

    Raises:
        CheckpointError: Files that are missing, broken, unsafe, or do not fit the model.
    """
    with hub.open_checkpoint(folder, allow_pickle=allow_pickle) as checkpoint:
        report = hub.load_weights(
            model,
            checkpoint,
            layouts_of(model.config),
            dtype=dtype,
            device=device,
            strict=strict,
            layout=layout,
            mapped=mapped,
            check_finite=check_finite,
            allow_quantized=allow_quantized,
            holding=holding,
        )
    head = model.llm.head_weight
    hub.refuse_another_head(head, folder, report.ignored, allow_pickle=allow_pickle, holding=holding)
    model.published_layout = report.layout
    model.published_generation = _read_generation(folder)
    if dtype == "auto":
        model.published_dtypes = dict(report.cast)


def save_pretrained(
    model: VisionLanguageModel,
    folder: str | os.PathLike[str],
    *,
    max_shard_size: int | str = "5GB",
    manifest: bool = False,
    check_finite: bool | None = None,
    gather: hub.Gather | None = None,
) -> None:
    """Write config.json and the weights, whole or not at all, in the layout that `model.config.family` names.

    A family that was published in several layouts is written in the one that the model was loaded from. Families also get a
    generation_config.json, with the ids that end an answer where other tools look for them, and whatever else it held.

    Other files of an existing folder (tokenizer, notes) stay; its older weights go. What is missing from the Hub layout of a
    family, such as the vocabulary, is written by `Processor.save_pretrained` into the same folder.

    Args:
        model: The model.
        folder: Made if it is not there.
        max_shard_size: Bytes, or a text such as "5GB"; more go into several files with an index.
        manifest: Also write SHA256SUMS, which `sha256sum -c` and `vlkit.hub.checkpoint.verify_manifest` read.
        check_finite: Refuse NaN and infinity, as loading does; None looks for them in models below 10^8 parameters.
        gather: Of a model that lies on several ranks: see `vlkit.training.save_sharded`, which gives it.

    Raises:
        KeyMismatchError: Tensors that are not those of `model.config`, as after resizing an embedding: nobody could load them.
        NonFiniteWeightsError: A tensor holds NaN or infinity.
        DiskFullError: Not enough space; the old folder is whole.
        ConfigError: The family's layout cannot express the model, or it has adapters.
    """
    if model.parts_are_sharded and gather is None:
        raise ConfigError(
            "the model lies on several ranks: call vlkit.training.save_sharded(model, folder) on all of them"
        )
    if any(".lora_A." in name for name, _ in model.named_parameters()):
        raise ConfigError(
            "the model has adapters: merge_lora(model) makes it one that can be saved, or write them alone with "
            "save_adapter(model, folder); both are in vlkit.training"
        )
    with on_meta():
        hub.refuse_other_tensors(model, VisionLanguageModel(model.config))
    hub.refuse_non_finite(model, check_finite)
    written = write_config(model.config)
    dtype = next(model.parameters()).dtype
    written.setdefault("torch_dtype", str(dtype).removeprefix("torch."))
    texts = {"config.json": written}
    if model.config.family is not None and (generation := _write_generation(model)):
        texts[GENERATION] = generation
    layouts = layouts_of(model.config)

    def write(staging: Path) -> None:
        for name, values in texts.items():
            (staging / name).write_text(json.dumps(values, indent=2, allow_nan=False) + "\n", encoding="utf-8")
        hub.save_weights(
            model,
            staging,
            layouts,
            layout=model.published_layout,
            max_shard_size=max_shard_size,
            dtypes=model.published_dtypes,
            gather=gather,
        )
        if manifest:
            write_manifest(staging)

    hub.write_folder(Path(folder), write, replaces=hub.is_weight_file)


def push_to_hub(
    model: VisionLanguageModel,
    repo_id: str,
    *,
    private: bool | None = None,
    token: str | bool | None = None,
    commit_message: str = "Upload a vlkit model",
    max_shard_size: int | str = "5GB",
) -> str:
    """Save to a temporary folder and upload it as one commit.

    Returns:
        The address of the commit.

    Raises:
        huggingface_hub's own errors, for example when no token is stored.
    """
    from huggingface_hub import HfApi

    api = HfApi(token=token)
    with tempfile.TemporaryDirectory() as parent:
        folder = Path(parent) / "model"
        save_pretrained(model, folder, max_shard_size=max_shard_size)
        api.create_repo(repo_id, private=private, exist_ok=True)
        return str(api.upload_folder(repo_id=repo_id, folder_path=folder, commit_message=commit_message))


def read_config(folder: Path, *, strict: bool = False, allow_quantized: bool = False) -> VLMConfig:
    """The config of a checkpoint, whatever layout it is in, with the stop ids that generation_config.json adds.

    Args:
        folder: Holds config.json.
        strict: Fields without an effect are an error instead of a warning.
        allow_quantized: Do not refuse a checkpoint that says it is quantised.

    Raises:
        UnknownModelError: No family answers to the model_type; the message has the nearest.
        ConfigError: What the family's `read_config` raises, with the path.
    """
    path = folder / "config.json"
    values = read_json(safe_file(folder, path.name))
    quantised = values.get("quantization_config")
    if quantised is not None and not allow_quantized:
        method = quantised.get("quant_method") if isinstance(quantised, dict) else None
        raise ConfigError(
            f"{path}: the weights are quantised ({method or 'quantization_config'}), which vlkit does not read: load the "
            "repository that they were made from, or pass allow_quantized=True to take the bare numbers"
        )
    model_type = values.get("model_type")
    if model_type == OWN_MODEL_TYPE:
        return _read_own(values, path)
    if not isinstance(model_type, str):
        raise ConfigError(f"{path}: model_type must name a family, found {model_type!r}")
    by_type = {name: family for family in families().values() for name in family.model_types}
    if model_type not in by_type:
        error = unknown_name("model_type", model_type, [*by_type, OWN_MODEL_TYPE], "vlkit.registry.register_family")
        raise UnknownModelError(f"{path}: {error}")
    with warnings.catch_warnings():
        if strict:
            warnings.simplefilter("error", UnknownFieldWarning)
        try:
            config = by_type[model_type].read_config(values)
        except UnknownFieldWarning as unknown:
            raise ConfigError(f"{path}: {unknown}; strict_config=False ignores them") from None
        except ConfigError as error:
            raise ConfigError(f"{path}: {error}") from error
    return _with_stop_ids(config, folder)


def _with_stop_ids(config: VLMConfig, folder: Path) -> VLMConfig:
    """The config, which also stops where the checkpoint's generation_config.json says."""
    values = _read_generation(folder)
    try:
        more = _ends(values, config)
    except ConfigError as error:
        raise ConfigError(f"{folder / GENERATION}: eos_token_id {values.get('eos_token_id')!r}: {error}") from error
    return config.replace(stop_ids=tuple(dict.fromkeys((*config.stop_ids, *more))))


def _read_generation(folder: Path) -> dict[str, Any]:
    return read_json(safe_file(folder, GENERATION)) if (folder / GENERATION).exists() else {}


def _ends(generation: Mapping[str, Any], config: VLMConfig) -> list[int]:
    """The ids in a generation_config.json that end an answer."""
    settings = read_generation_settings({"eos_token_id": generation.get("eos_token_id")})
    # transformers writes the default of a class even beside a small vocabulary: such an id never comes.
    return [end for end in settings.stop_ids if end < config.llm.vocab_size]  # type: ignore[attr-defined]


def _write_generation(model: VisionLanguageModel) -> dict[str, Any]:
    """generation_config.json as it was read, unless the model stops elsewhere by now."""
    values, stops = model.published_generation, model.config.stop_ids
    if set(_ends(values, model.config)) == set(stops):
        return values
    return {**values, "eos_token_id": list(stops)}


def write_config(config: VLMConfig) -> dict[str, Any]:
    """What config.json says of a model, in the layout of its family."""
    if config.family is None:
        return {"model_type": OWN_MODEL_TYPE, "vlkit_version": __version__, "model": config.to_dict()}
    return _family(config).write_config(config)


def keys_of(config: VLMConfig) -> KeyMap:
    """The published names of a model's weights: the family's, or our own names as they are."""
    return layouts_of(config)[0]


def layouts_of(config: VLMConfig) -> tuple[KeyMap, ...]:
    """All layouts in which such a model's weights were published; a new model is written in the first."""
    if config.family is None:
        return (KeyMap(rename("{path}", "{path}")),)
    family = _family(config)
    return (family.keys(config), *family.other_keys(config))


def _family(config: VLMConfig) -> Family:
    known = families()
    if config.family not in known:
        raise ConfigError(f"VLMConfig.family: {config.family!r} is not registered; known are {', '.join(known)}")
    return known[config.family]


def _read_own(values: Mapping[str, Any], path: Path) -> VLMConfig:
    try:
        return VLMConfig.from_dict(values["model"])
    except KeyError:
        raise ConfigError(f"{path}: missing 'model'; it has {', '.join(sorted(values))}") from None
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from error
