"""vlkit: composable building blocks for vision-language models.

    model = vlkit.create_model("kimi-vl-tiny")
    model = vlkit.compose(vision="moonvit-tiny", projector="pixel-shuffle", llm="qwen3-tiny")
    model = vlkit.from_pretrained("moonshotai/Kimi-VL-A3B-Instruct")

Names are loaded when they are first used, so that `import vlkit` costs little more than torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from vlkit.version import __version__

if TYPE_CHECKING:
    from vlkit import (
        generation,
        hub,
        layers,
        llm,
        models,
        objectives,
        optim,
        processing,
        projectors,
        testing,
        training,
        vision,
    )
    from vlkit.models import Output, VisionLanguageModel, VLMConfig
    from vlkit.models.factory import compose, create_model, create_processor
    from vlkit.models.pretrained import from_pretrained
    from vlkit.packing import Batch, Layout, Packed
    from vlkit.processing import Processor
    from vlkit.registry import list_components, list_models

_HOME = {
    "Batch": "vlkit.packing",
    "Layout": "vlkit.packing",
    "Output": "vlkit.models",
    "Packed": "vlkit.packing",
    "Processor": "vlkit.processing",
    "VLMConfig": "vlkit.models",
    "VisionLanguageModel": "vlkit.models",
    "compose": "vlkit.models.factory",
    "create_model": "vlkit.models.factory",
    "create_processor": "vlkit.models.factory",
    "from_pretrained": "vlkit.models.pretrained",
    "list_components": "vlkit.registry",
    "list_models": "vlkit.registry",
}
_ROOMS = (
    "config",
    "errors",
    "generation",
    "hub",
    "layers",
    "llm",
    "models",
    "objectives",
    "optim",
    "packing",
    "processing",
    "projectors",
    "registry",
    "testing",
    "training",
    "vision",
)

__all__ = ["__version__", *_HOME, *_ROOMS]


def __getattr__(name: str) -> Any:
    if name in _HOME:
        value = getattr(importlib.import_module(_HOME[name]), name)
    elif name in _ROOMS:
        value = importlib.import_module(f"vlkit.{name}")
    else:
        raise AttributeError(f"module 'vlkit' has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
