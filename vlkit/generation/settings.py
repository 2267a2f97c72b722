"""What a checkpoint's generation_config.json says: where answers end, and how they are sampled.

{"eos_token_id": [151645, 151643], "do_sample": true, "temperature": 0.7, ...} -> GenerationSettings -> model.generate(...)
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Annotated, Any

from vlkit.config import AtLeast, AtMost, Config, Count, Positive
from vlkit.errors import ConfigError

# Settings of transformers that change what is generated, and the value at which they do not.
_WITHOUT_EFFECT: dict[str, tuple[Any, ...]] = {
    "repetition_penalty": (None, 1, 1.0),
    "no_repeat_ngram_size": (None, 0),
    "num_beams": (None, 1),
    "typical_p": (None, 1, 1.0),
    "min_p": (None, 0, 0.0),
    "epsilon_cutoff": (None, 0, 0.0),
    "eta_cutoff": (None, 0, 0.0),
    "bad_words_ids": (None,),
    "suppress_tokens": (None,),
    "begin_suppress_tokens": (None,),
    "forced_bos_token_id": (None,),
    "forced_eos_token_id": (None,),
}


class GenerationSettings(Config):
    """How a checkpoint's makers want it to generate; `model.generate(batch, **settings.sampling())` does it.

    Attributes:
        stop_ids: Ids that end an answer.
        sample: Whether to sample at all; otherwise the likeliest token is taken.
        temperature: Divides the logits.
        top_p: Nucleus sampling; 1 keeps all.
        top_k: Keep the k likeliest; 0 keeps all.
    """

    stop_ids: tuple[Count, ...] = ()
    sample: bool = False
    temperature: Positive = 1.0
    top_p: Annotated[float, AtLeast(0.0), AtMost(1.0)] = 1.0
    top_k: Count = 50

    def check(self) -> None:
        if not self.top_p:
            raise ConfigError("GenerationSettings.top_p: 0.0 would keep no token")

    def sampling(self) -> dict[str, Any]:
        """The arguments of `generate` that say how to choose a token."""
        if not self.sample:
            return {"temperature": 0.0, "top_p": 1.0, "top_k": 0}
        return {"temperature": self.temperature, "top_p": self.top_p, "top_k": self.top_k}


def read_generation_settings(values: Mapping[str, Any]) -> GenerationSettings:
    """The settings in a generation_config.json. What is absent or null has the value that transformers gives it.

    Warns of settings that change what transformers generates but have no counterpart here, such as a repetition penalty.

    Args:
        values: Content of the file.

    Raises:
        ConfigError: A value of the wrong type or out of range.
    """
    if not isinstance(values, Mapping):
        raise ConfigError(f"generation_config.json: expected a JSON object, found {type(values).__name__}")
    idle = sorted(name for name, neutral in _WITHOUT_EFFECT.items() if values.get(name) not in neutral)
    if idle:
        listed = ", ".join(f"{name}={values[name]!r}" for name in idle)
        warnings.warn(f"generation_config.json: settings without an effect in vlkit: {listed}", stacklevel=2)
    ends = values.get("eos_token_id")
    fields = {"do_sample": "sample", "temperature": "temperature", "top_p": "top_p", "top_k": "top_k"}
    found = {ours: values[theirs] for theirs, ours in fields.items() if values.get(theirs) is not None}
    found["stop_ids"] = () if ends is None else tuple(ends) if isinstance(ends, list) else (ends,)
    return GenerationSettings(**found)
