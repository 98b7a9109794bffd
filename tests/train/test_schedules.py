"""Learning rate schedules computed by hand."""

import numpy as np
import pytest

from xtransfer.config import SCHEDULES, ModelConfig, PretrainConfig, parse
from xtransfer.errors import UserError
from xtransfer.train.schedules import learning_rates, schedule


def rates(kind, *counts, warmup_fraction=0.2, steps=10):
    rate = schedule(kind, peak=1.0, steps=steps, warmup_fraction=warmup_fraction)
    return [round(float(rate(count)), 6) for count in counts]


def test_linear_schedule():
    assert rates("linear", 0, 1, 2, 6, 10) == [0.0, 0.5, 1.0, 0.5, 0.0]


def test_cosine_schedule():
    assert rates("cosine", 0, 1, 2, 4, 6, 8, 10) == [0.0, 0.5, 1.0, 0.853553, 0.5, 0.146447, 0.0]


def test_constant_schedule():
    assert rates("constant", 0, 1, 2, 6, 10) == [0.0, 0.5, 1.0, 1.0, 1.0]


def test_inverse_square_root_schedule():
    assert rates("inverse_sqrt", 0, 1, 2, 8, 18, steps=10) == [0.0, 0.5, 1.0, 0.5, 0.333333]


@pytest.mark.parametrize("kind", SCHEDULES)
def test_no_warmup_starts_at_the_peak(kind):
    assert rates(kind, 0, warmup_fraction=0.0) == [1.0]


@pytest.mark.parametrize("kind", SCHEDULES)
def test_every_schedule_is_finite_after_a_single_step_of_warmup_alone(kind):
    assert rates(kind, 0, warmup_fraction=1.0, steps=1) == [0.0]
    assert all(0 <= rate <= 1 for rate in rates(kind, 1, 2, warmup_fraction=1.0, steps=1))


def test_without_warmup_the_inverse_square_root_counts_from_one():
    assert rates("inverse_sqrt", 0, 3, warmup_fraction=0.0) == [1.0, 0.5]


def test_an_unknown_schedule_is_refused():
    with pytest.raises(ValueError, match="'step'"):
        schedule("step", peak=1.0, steps=10, warmup_fraction=0.0)
    with pytest.raises(UserError, match=r"student\.schedule is 'step': choose one of constant, linear, cosine"):
        parse({"student": {"schedule": "step"}})


@pytest.mark.parametrize("schema", [ModelConfig, PretrainConfig])
def test_the_settings_choose_the_rate_of_every_step(schema):
    settings = schema(schedule="linear", learning_rate=0.5, steps=10, warmup_fraction=0.2)
    rates = learning_rates(settings)
    assert rates.dtype == np.float32
    np.testing.assert_allclose(rates, [0, 0.25, *(0.5 * np.arange(8, 0, -1) / 8)], rtol=1e-6)
    constant = learning_rates(schema(schedule="constant", learning_rate=0.25, steps=3, warmup_fraction=0.0))
    np.testing.assert_array_equal(constant, np.float32([0.25] * 3))


@pytest.mark.parametrize("schema", [ModelConfig, PretrainConfig])
@pytest.mark.parametrize(("key", "value"), [("adam_b1", 1.0), ("adam_b2", -0.1), ("adam_eps", 0.0)])
def test_impossible_rates_of_adam_are_refused(schema, key, value):
    with pytest.raises(UserError, match=rf"config key {key} is {value}: it must be between"):
        parse({key: value}, schema)
