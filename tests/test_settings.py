"""The settings of the network and model.py's GPTConfig are the same statement, made twice."""

from dataclasses import asdict, fields
from typing import Any, get_args, get_origin, get_type_hints

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from conftest import tiny_config
from glyphgpt.settings import ModelConfig
from model import GPTConfig

SIZES = ("vocab_size", "block_size", "n_layer", "n_head", "n_embd", "ngram", "ngram_rows")


def test_both_configs_have_the_same_fields_and_choices() -> None:
    """Annotated bounds of the settings aside."""
    hints = get_type_hints(GPTConfig)
    assert hints.keys() == ModelConfig.model_fields.keys()
    for name, field in ModelConfig.model_fields.items():
        assert field.annotation == hints[name]


def test_defaults_of_the_settings_are_a_network() -> None:
    assert ModelConfig.model_validate(asdict(tiny_config())).model_dump() == asdict(tiny_config())


CHOICES: dict[str, st.SearchStrategy[Any]] = {
    name: st.sampled_from(get_args(hint)) if get_origin(hint) else st.booleans()
    for name, hint in get_type_hints(GPTConfig).items()
    if name not in (*SIZES, "dropout")
}


@pytest.mark.parametrize(
    "change",
    [
        {"n_head": 3},
        {"n_embd": 6, "position": "rotary"},
        {"n_embd": 7, "n_head": 1, "position": "sinusoidal"},
        *({size: 0} for size in SIZES),
    ],
    ids=str,
)
def test_both_configs_refuse_sizes_that_do_not_fit(change: dict[str, Any]) -> None:
    network = {**asdict(tiny_config()), **change}
    with pytest.raises(ValueError):
        GPTConfig(**network)
    with pytest.raises(ValidationError):
        ModelConfig.model_validate(network)


@given(st.fixed_dictionaries({name: st.integers(-1, 12) for name in SIZES} | CHOICES))
def test_both_configs_accept_the_same_networks(network: dict[str, Any]) -> None:
    network["dropout"] = 0.0
    try:
        config = GPTConfig(**network)
    except ValueError:
        with pytest.raises(ValidationError):
            ModelConfig.model_validate(network)
        return
    model_config = ModelConfig.model_validate(network)
    assert {field.name: getattr(model_config, field.name) for field in fields(config)} == asdict(config)
    assert (model_config.head_size, model_config.embedding_scale) == (config.head_size, config.embedding_scale)


def test_a_config_with_a_missing_field_is_refused() -> None:
    network = asdict(tiny_config())
    for name in network:
        with pytest.raises(ValidationError, match=name):
            ModelConfig.model_validate({key: value for key, value in network.items() if key != name})
