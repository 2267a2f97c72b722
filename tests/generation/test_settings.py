"""Settings read from generation_config.json."""

from __future__ import annotations

import pytest

from vlkit.errors import ConfigError
from vlkit.generation import GenerationSettings, read_generation_settings


def test_one_end_or_several() -> None:
    assert read_generation_settings({"eos_token_id": 5}).stop_ids == (5,)
    assert read_generation_settings({"eos_token_id": [7, 5]}).stop_ids == (7, 5)
    assert read_generation_settings({"eos_token_id": None}) == GenerationSettings()


def test_a_temperature_counts_only_where_sampling_is_asked_for() -> None:
    cold = read_generation_settings({"temperature": 0.7, "top_p": 0.8, "top_k": 20})
    assert cold.sampling() == {"temperature": 0.0, "top_p": 1.0, "top_k": 0}
    warm = read_generation_settings({"temperature": 0.7, "top_p": 0.8, "top_k": 20, "do_sample": True})
    assert warm.sampling() == {"temperature": 0.7, "top_p": 0.8, "top_k": 20}


def test_what_is_absent_is_as_in_transformers() -> None:
    assert read_generation_settings({"do_sample": True}).sampling() == {"temperature": 1.0, "top_p": 1.0, "top_k": 50}


def test_what_has_no_effect_here_is_said() -> None:
    with pytest.warns(UserWarning, match=r"num_beams=4, repetition_penalty=1\.05"):
        read_generation_settings({"repetition_penalty": 1.05, "num_beams": 4, "typical_p": 1.0})


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"eos_token_id": "2"}, "stop_ids"),
        ({"eos_token_id": [-1]}, "stop_ids"),
        ({"eos_token_id": [True]}, "stop_ids"),
        ({"do_sample": 1}, "sample"),
        ({"temperature": 0}, "temperature"),
        ({"top_p": 0.0}, "top_p"),
        ({"top_k": -1}, "top_k"),
        ([], "JSON object"),
    ],
)
def test_mistakes_are_named(values: object, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        read_generation_settings(values)  # type: ignore[arg-type]
