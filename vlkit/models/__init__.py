"""Whole models: one module (VisionLanguageModel), and one data file per family."""

from vlkit.models import andesvl, compositions, kimi_vl, qwen2_5_vl, qwen2_vl, qwen3_vl, qwen_vl
from vlkit.models.vlm import Output, VisionLanguageModel, VLMConfig

__all__ = [
    "Output",
    "VLMConfig",
    "VisionLanguageModel",
    "andesvl",
    "compositions",
    "kimi_vl",
    "qwen2_5_vl",
    "qwen2_vl",
    "qwen3_vl",
    "qwen_vl",
]
