"""Starting points: decoders filled from published language models.

model = vlkit.compose(vision="moonvit", llm="qwen3-0.6b")
load_decoder(model.llm, "Qwen/Qwen3-0.6B")
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from vlkit.config import Config
from vlkit.errors import ConfigError
from vlkit.hub.keymap import KeyMap
from vlkit.hub.pretrained import LoadReport, load_weights, open_checkpoint, resolve
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
# What no shape shows: another value loads and gives other numbers.
_UNSEEN = {"theta": ("rope_theta", "rotary_emb_base"), "norm_eps": ("rms_norm_eps", "layer_norm_epsilon")}


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
        repo_or_folder: A folder, or a repository id of the Hub.
        revision: Branch, tag or commit.
        cache_dir: Where downloads are kept; None means the Hub client's own place.
        token: For gated and private repositories; None means the one that is stored.
        local_files_only: Never ask the Hub.
        allow_pickle: Read `.bin` files if there is nothing else, with torch's weights_only loader.

    Returns:
        What was ignored or cast.

    Raises:
        ConfigError: A decoder whose published names are not known, or a checkpoint whose config.json has another rotary base
            or epsilon than the decoder.
        KeyMismatchError: Names or shapes that do not fit, all in one report. The decoder is unchanged.
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
        _check_unseen(decoder.config, read_json(folder / "config.json"), folder)
    with open_checkpoint(folder, allow_pickle=allow_pickle) as checkpoint:
        return load_weights(decoder, checkpoint, keys)


def _check_unseen(config: Any, values: Mapping[str, Any], folder: Path) -> None:
    nested = values.get("rope_parameters")
    values = {**(nested if isinstance(nested, Mapping) else {}), **values}
    for field, names in _UNSEEN.items():
        for name in names:
            found = values.get(name)
            if found is not None and found != getattr(config, field):
                raise ConfigError(
                    f"{folder / 'config.json'}: {name} is {found}, the decoder has {field}={getattr(config, field)}; "
                    f"make the decoder with {field}={found}"
                )
