"""Training: models over many ranks, runs that resume, and what a run will cost.

Names are loaded when they are first used: torch's sharding costs seconds that a run on one process need not wait.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vlkit.training.config import TrainConfig, read_train_config
    from vlkit.training.experts import balance_experts, parallel_experts
    from vlkit.training.faults import EXIT_STOPPED
    from vlkit.training.gathering import gather_model, save_sharded
    from vlkit.training.loop import Result, train
    from vlkit.training.lora import LoraOptions, add_lora, merge_lora, without_lora
    from vlkit.training.lora_files import load_adapter, save_adapter
    from vlkit.training.recompute import checkpoint_blocks
    from vlkit.training.rope_theta import set_rope_theta
    from vlkit.training.sharding import load_sharded, make_mesh, shard_model

_HOME = {
    "EXIT_STOPPED": "faults",
    "LoraOptions": "lora",
    "Result": "loop",
    "TrainConfig": "config",
    "add_lora": "lora",
    "balance_experts": "experts",
    "checkpoint_blocks": "recompute",
    "gather_model": "gathering",
    "load_adapter": "lora_files",
    "load_sharded": "sharding",
    "make_mesh": "sharding",
    "merge_lora": "lora",
    "parallel_experts": "experts",
    "read_train_config": "config",
    "save_adapter": "lora_files",
    "save_sharded": "gathering",
    "set_rope_theta": "rope_theta",
    "shard_model": "sharding",
    "train": "loop",
    "without_lora": "lora",
}

__all__ = [
    "EXIT_STOPPED",
    "LoraOptions",
    "Result",
    "TrainConfig",
    "add_lora",
    "balance_experts",
    "checkpoint_blocks",
    "gather_model",
    "load_adapter",
    "load_sharded",
    "make_mesh",
    "merge_lora",
    "parallel_experts",
    "read_train_config",
    "save_adapter",
    "save_sharded",
    "set_rope_theta",
    "shard_model",
    "train",
    "without_lora",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'vlkit.training' has no attribute {name!r}")
    value = getattr(importlib.import_module(f"vlkit.training.{_HOME[name]}"), name)
    globals()[name] = value
    return value
