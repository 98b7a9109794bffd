"""Settings that every architecture has, whatever fields it adds."""

import dataclasses

import pytest

from xtransfer.models.architectures import ARCHITECTURES

SIZES = {"vocab_size": 9, "hidden_size": 4, "num_layers": 1, "num_heads": 2, "intermediate_size": 4}
OF_THE_HEAD = {"classifier_dropout", "pooler_dropout"}


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_one_dropout_rate_serves_all_sites_of_the_encoder(name: str) -> None:
    config = ARCHITECTURES[name].config_class(**SIZES, max_positions=8)
    rates = {field.name for field in dataclasses.fields(config) if field.name.endswith("_dropout")}
    changed = config.with_dropout(0.25)
    sites = {rate for rate in rates - OF_THE_HEAD if isinstance(getattr(config, rate), float)}
    assert {getattr(changed, rate) for rate in sites} == {0.25}
    assert dataclasses.replace(changed, **{rate: getattr(config, rate) for rate in sites}) == config
