"""Starting points: decoders filled from published language models.

model = vlkit.compose(vision="moonvit", llm=decoder_config("Qwen/Qwen3-0.6B"))
load_decoder(model.llm, "Qwen/Qwen3-0.6B")
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from vlkit.config import Config
from vlkit.errors import ConfigError
from vlkit.hub.fields import HubFields
from vlkit.hub.keymap import KeyMap
from vlkit.hub.pretrained import LoadReport, load_weights, open_checkpoint, refuse_another_head, resolve
from vlkit.hub.safe_files import safe_file
from vlkit.hub.strict_json import read_json
from vlkit.llm import llama, moonlight, qwen, qwen2, qwen3
from vlkit.llm.decoder import Decoder
from vlkit.llm.llama import LlamaConfig
from vlkit.llm.moonlight import MoonlightConfig
from vlkit.llm.qwen import QwenConfig
from vlkit.llm.qwen2 import Qwen2Config
from vlkit.llm.qwen3 import Qwen3Config

_KEYS: Mapping[type[Config], Callable[[Any], KeyMap]] = {
    LlamaConfig: llama.keys,
    MoonlightConfig: moonlight.keys,
    QwenConfig: qwen.keys,
    Qwen2Config: qwen2.keys,
    Qwen3Config: qwen3.keys,
}
_READERS: Mapping[str, Callable[[HubFields], Config]] = {  # by the model_type of config.json
    "deepseek_v3": moonlight.read_config,
    "llama": llama.read_config,
    "mistral": llama.read_config,
    "qwen": qwen.read_config,
    "qwen2": qwen2.read_config,
    "qwen3": qwen3.read_config,
    "qwen3_moe": qwen3.read_config,
}
_WITHOUT_EFFECT = (  # training only, serving only, fixed by the architecture, or following from other fields
    "attention_dropout", "attn_dropout_prob", "emb_dropout_prob", "initializer_range", "output_router_logits",
    "router_aux_loss_coef", "aux_loss_alpha", "seq_aux", "pretraining_tp", "ep_size", "num_nextn_predict_layers", "use_cache",
    "bos_token_id", "eos_token_id", "pad_token_id", "sliding_window", "max_window_layers", "head_dim", "qk_head_dim",
    "is_llama_config", "bf16", "fp16", "fp32", "onnx_safe", "tokenizer_type", "use_flash_attn", "use_cache_quantization",
    "use_cache_kernel", "softmax_in_fp32",
)  # fmt: skip
# Of a decoder alone: how long sequences may be, and coordinates, which are equal in text.
_FREE = {"max_positions", "rope_sections", "rope_interleaved"}


def decoder_config(
    repo_or_folder: str | os.PathLike[str],
    *,
    revision: str | None = None,
    cache_dir: str | Path | None = None,
    token: str | bool | None = None,
    local_files_only: bool = False,
) -> Config:
    """The config of the decoder that a published language model fills, read from its config.json; no weights are fetched.

        config = decoder_config("Qwen/Qwen3-0.6B")
        vlkit.compose(vision="moonvit", llm=config)

    Args:
        repo_or_folder: A folder, or a repository id of the Hub.
        revision: Branch, tag or commit.
        cache_dir: Where downloads are kept; None means the Hub client's own place.
        token: For gated and private repositories; None means the one that is stored.
        local_files_only: Never ask the Hub.

    Raises:
        ConfigError: A language model of another kind, a field that is missing, or a value that the decoder would ignore, such
            as a sliding window or a scaled rotation.
    """
    folder = resolve(
        repo_or_folder,
        revision=revision,
        cache_dir=cache_dir,
        token=token,
        local_files_only=local_files_only,
        weights=False,
    )
    return _read_config(folder)


def load_decoder(
    decoder: Decoder,
    repo_or_folder: str | os.PathLike[str],
    *,
    revision: str | None = None,
    cache_dir: str | Path | None = None,
    token: str | bool | None = None,
    local_files_only: bool = False,
    allow_pickle: bool = False,
) -> LoadReport:
    """Fill a decoder with the weights of a published language model of its kind, streamed from its files.

    Args:
        decoder: With the sizes of the checkpoint. Parameters keep their dtype and device; those on meta are allocated on the
            CPU, in the dtype of the checkpoint.
        repo_or_folder: A folder, or a repository id of the Hub. Its config.json must mean the decoder's config, up to the
            longest sequence and `rope_sections`; a folder without one is held against names and shapes alone.
        revision: Branch, tag or commit.
        cache_dir: Where downloads are kept; None means the Hub client's own place.
        token: For gated and private repositories; None means the one that is stored.
        local_files_only: Never ask the Hub.
        allow_pickle: Read `.bin` files if there is nothing else, with torch's weights_only loader.

    Returns:
        What was ignored or cast.

    Raises:
        ConfigError: A decoder whose published names are not known, what `decoder_config` raises, or a config.json that means
            another config than the decoder's. The decoder is unchanged.
        KeyMismatchError: Names or shapes that do not fit, all in one report; the decoder is unchanged. Or a tied decoder, but
            a head with other numbers than the embedding's in the files.
    """
    if type(decoder.config) not in _KEYS:
        known = ", ".join(config.__name__ for config in _KEYS)
        raise ConfigError(f"no published names are known for {type(decoder.config).__name__}, only for {known}")
    keys = _KEYS[type(decoder.config)](decoder.config)  # type: ignore[index]
    folder = resolve(
        repo_or_folder,
        revision=revision,
        cache_dir=cache_dir,
        token=token,
        local_files_only=local_files_only,
        allow_pickle=allow_pickle,
    )
    if (folder / "config.json").is_file():
        _refuse_another(decoder.config, _read_config(folder), folder)
    with open_checkpoint(folder, allow_pickle=allow_pickle) as checkpoint:
        report = load_weights(decoder, checkpoint, keys)
    refuse_another_head(decoder.head_weight, folder, report.ignored, allow_pickle=allow_pickle)
    return report


def _read_config(folder: Path) -> Config:
    path = safe_file(folder, "config.json")
    text = HubFields(read_json(path), "config.json")
    kind = text.take("model_type")
    if not isinstance(kind, str) or kind not in _READERS:
        raise ConfigError(f"{path}: no decoder is known for model_type {kind!r}, only for {', '.join(_READERS)}")
    if text.take("quantization_config", None) is not None:
        raise ConfigError(
            f"{path}: the weights are quantised, which vlkit does not read; load the repository that they were made from"
        )
    try:
        config = _READERS[kind](text)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from error
    text.warn_of_rest(*_WITHOUT_EFFECT)
    return config


def _refuse_another(ours: Any, theirs: Any, folder: Path) -> None:
    """Refuse a checkpoint that means another config; most of a config shows in no shape."""
    where, way = f"{folder / 'config.json'}:", "make the decoder from vlkit.llm.decoder_config(folder)"
    if type(theirs) is not type(ours):
        raise ConfigError(f"{where} it means a {type(theirs).__name__}, the decoder has a {type(ours).__name__}; {way}")
    found, wanted = theirs.to_dict(), ours.to_dict()
    free = _FREE
    if isinstance(theirs, Qwen3Config) and bool(theirs.num_experts) == bool(wanted["num_experts"]):
        free = free | ({"mlp_dim"} if theirs.num_experts else {"top_k", "expert_dim", "normalize"})  # unused
    other = [name for name in found if name not in free and found[name] != wanted[name]]
    if other:
        listed = "; ".join(f"it means {name}={found[name]}, the decoder has {wanted[name]}" for name in other)
        raise ConfigError(f"{where} {listed}; {way}")
