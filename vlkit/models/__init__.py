"""Whole models: one module (VisionLanguageModel), and one data file per family."""

from vlkit.models import compositions, kimi_vl
from vlkit.models.vlm import Output, VisionLanguageModel, VLMConfig

__all__ = ["Output", "VLMConfig", "VisionLanguageModel", "compositions", "kimi_vl"]
