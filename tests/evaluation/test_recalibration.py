"""Temperatures and thresholds: values worked out by hand, degenerate dev splits, and the record of a run."""

import json
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from xtransfer.config import CalibrationConfig
from xtransfer.errors import UserError
from xtransfer.evaluation import recalibration
from xtransfer.evaluation.metrics import accuracy, log_loss, macro_f1
from xtransfer.evaluation.recalibration import UNCHANGED, Recalibration, fit_log_odds, fit_temperature
from xtransfer.runtime import checksums

CLASSES = ("bad", "good")
# Three of four are right. The log loss is lowest at a confidence of 3/4, which are odds of 3 and a logit of log 3.
CALIBRATED = np.array([[0.0, math.log(3)]] * 4)
THREE_RIGHT = np.array([1, 1, 1, 0])


@pytest.mark.parametrize("factor", [0.5, 1.0, 2.0, 7.25])
def test_the_temperature_undoes_a_factor(factor):
    assert fit_temperature(factor * CALIBRATED, THREE_RIGHT) == pytest.approx(factor, rel=1e-9)


def test_three_classes_by_hand():
    """With odds of 2 : 1 : 1, half of the examples are of the first class, and a quarter of each other one."""
    logits = np.tile([3 * math.log(2), 0.0, 0.0], (8, 1))
    assert fit_temperature(logits, np.array([0, 0, 0, 0, 1, 1, 2, 2])) == pytest.approx(3, rel=1e-9)


def test_adding_a_constant_to_an_example_changes_nothing():
    shifted = 2 * CALIBRATED + np.array([[100.0], [-50], [7], [0]])
    assert fit_temperature(shifted, THREE_RIGHT) == pytest.approx(2, rel=1e-9)


def test_degenerate_dev_splits_have_a_bounded_temperature(capsys):
    lowest, highest = recalibration.TEMPERATURES
    assert fit_temperature(CALIBRATED, np.ones(4, int)) == lowest  # all right, and of one class
    assert fit_temperature(CALIBRATED, np.zeros(4, int)) == highest  # all wrong
    assert fit_temperature(np.zeros((4, 2)), THREE_RIGHT) == 1
    assert fit_temperature(np.full((4, 2), 3.0), THREE_RIGHT) == 1
    settings = CalibrationConfig(temperature=True)
    recalibration.fit(settings, UNCHANGED, CALIBRATED, np.ones(4, int), "vanilla seed 0 step 40")
    assert "temperature of vanilla seed 0 step 40 is 0.05, which is a bound" in " ".join(
        capsys.readouterr().out.split()
    )


@given(st.lists(st.tuples(st.floats(-9, 9), st.floats(-9, 9), st.integers(0, 1)), min_size=1, max_size=12))
def test_no_other_temperature_has_a_lower_log_loss(examples):
    logits, labels = np.array([row[:2] for row in examples]), np.array([row[2] for row in examples])
    best = log_loss(logits / fit_temperature(logits, labels), labels)
    for temperature in np.geomspace(*recalibration.TEMPERATURES, 60):
        assert best <= log_loss(logits / temperature, labels) + 1e-9


def odds(*values):
    return np.array([[0.0, value] for value in values])


def test_the_threshold_by_hand():
    # Deciding at 0 predicts class 1 for all four. Between 1 and 3 lies the only point without an error.
    assert fit_log_odds(odds(1.0, 0.5, 3.0, 4.0), np.array([0, 0, 1, 1])) == 2.0
    assert fit_log_odds(odds(-4.0, -3.0, -2.0, -6.0), np.array([0, 1, 1, 0])) == -3.5


def test_among_equal_thresholds_the_nearest_to_no_change_wins_and_then_the_lower_one():
    assert fit_log_odds(odds(-1.0, 1.0), np.array([0, 1])) == 0
    assert fit_log_odds(odds(-1.0, 5.0), np.array([0, 1])) == 0  # and not the middle, 2
    # −2 and 2 have one error each and F1 of 2/3 and 4/5 for the two classes; 0 has two errors.
    assert fit_log_odds(odds(-3.0, -1.0, 1.0, 3.0), np.array([0, 1, 0, 1])) == -2
    assert fit_log_odds(odds(-2.0, 0.0, 2.0, 4.0), np.array([0, 1, 0, 1])) == -1  # nearer than 3


@given(st.lists(st.tuples(st.integers(-5, 5), st.integers(0, 1)), min_size=2, max_size=12))
def test_no_other_threshold_has_a_higher_macro_f1(examples):
    logits, labels = odds(*(float(row[0]) for row in examples)), np.array([row[1] for row in examples])
    if len(set(labels)) < 2:
        return
    best = macro_f1(Recalibration(log_odds=fit_log_odds(logits, labels)).shifted(logits), labels)
    for value in np.arange(-5.5, 5.5, 0.25):
        # At the ends every example has the same class, which the fit does not offer.
        if logits[:, 1].min() <= value < logits[:, 1].max():
            assert best >= macro_f1(Recalibration(log_odds=value).shifted(logits), labels) - 1e-12


def test_a_threshold_needs_two_classes_and_both_in_dev():
    settings = CalibrationConfig(threshold=True)
    recalibration.check(settings, CLASSES, [0, 1])
    recalibration.check(CalibrationConfig(temperature=True), (*CLASSES, "so-so"), [0, 0])
    with pytest.raises(UserError, match=r"calibration\.threshold needs a task with 2 classes, and this one has 3"):
        recalibration.check(settings, (*CLASSES, "so-so"), [0, 1])
    with pytest.raises(UserError, match="every dev example has the same label"):
        recalibration.check(settings, CLASSES, [1, 1])


def test_effects_by_hand():
    """Dividing by 2 gives a confidence of 3/4 and no calibration error; deciding at log 81 predicts class 0."""
    settings = CalibrationConfig(temperature=True, threshold=True)
    names = recalibration.effects_of(settings)
    fitted = Recalibration(temperature=2.0, log_odds=math.log(81))
    scores = {s.metric: s.value for s in recalibration.effects(fitted, names, 2 * CALIBRATED, THREE_RIGHT, CLASSES)}
    assert scores == {
        "log_loss_calibrated": pytest.approx(-(3 * math.log(3 / 4) + math.log(1 / 4)) / 4),
        "ece_calibrated": pytest.approx(0, abs=1e-12),
        "accuracy_thresholded": 0.25,
        "macro_f1_thresholded": pytest.approx(0.2),  # F1 of 2/5 and 0
    }
    assert recalibration.metrics_of(settings) == ("log_loss", "ece", "accuracy", "macro_f1")
    assert recalibration.effects_of(CalibrationConfig()) == ()


def test_a_folded_head_gives_the_scaled_and_shifted_logits():
    rng = np.random.default_rng(0)
    hidden, kernel, bias = rng.normal(size=(9, 4)), rng.normal(size=(4, 2)), rng.normal(size=2)
    fitted = Recalibration(temperature=1.75, log_odds=0.375)
    new_kernel, new_bias = fitted.folded(kernel.astype(np.float32), bias.astype(np.float32))
    assert new_kernel.dtype == new_bias.dtype == np.float32
    logits = hidden @ kernel + bias
    np.testing.assert_allclose(hidden @ new_kernel + new_bias, (logits - [0, 0.375]) / 1.75, atol=1e-6)
    assert fitted.threshold == pytest.approx(1 / (1 + math.exp(-0.375)))


def test_a_record_keeps_what_was_fitted_before(tmp_path):
    path = tmp_path / "calibration.json"
    assert recalibration.recorded(path, "40") == UNCHANGED
    recalibration.record(path, "40", Recalibration(temperature=1.5), 4)
    recalibration.record(path, "60-average", Recalibration(temperature=1.25), 4)
    labels, settings = THREE_RIGHT, CalibrationConfig(temperature=True, threshold=True)
    fitted = recalibration.fit(settings, recalibration.recorded(path, "40"), odds(0, 1, 2, -3), labels, "x")
    assert fitted == Recalibration(temperature=1.5, log_odds=-1.5)  # the temperature is not fitted again
    recalibration.record(path, "40", fitted, 4)
    assert recalibration.recorded(path, "40") == fitted
    assert recalibration.recorded(path, "60-average") == Recalibration(temperature=1.25)
    entry = {"temperature": 1.25, "log_odds": None, "threshold": None, "examples": 4}
    assert json.loads(path.read_text())["60-average"] == checksums.signed(entry)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "not valid JSON"),
        ('{"40": 2}', "40 = 2, expected temperature and log_odds"),
        ('{"40": {"temperature": "hot"}}', "expected temperature and log_odds as numbers or null"),
        ('{"40": {"temperature": 0}}', "temperature = 0, expected more than 0"),
    ],
)
def test_a_malformed_record_is_named(tmp_path, content, message):
    path = tmp_path / "calibration.json"
    path.write_text(content)
    with pytest.raises(UserError, match=f"calibration.json: .*{message}.*: run python -m xtransfer.evaluate to fit it"):
        recalibration.recorded(path, "40")


@pytest.mark.parametrize("damage", [lambda text: text.replace("1.5", "1.7"), lambda text: text[:-3], lambda text: "[]"])
def test_a_damaged_record_is_refused_and_fitted_again(tmp_path, caplog, damage):
    path = tmp_path / "calibration.json"
    recalibration.record(path, "40", Recalibration(temperature=1.5), 4)
    path.write_text(damage(path.read_text()))
    with pytest.raises(UserError, match=r"calibration.json: .*: run python -m xtransfer.evaluate to fit it again"):
        recalibration.recorded(path, "40")
    assert recalibration.usable(path, "40") == UNCHANGED
    assert "calibration.json: " in caplog.text and caplog.text.endswith(", so it is fitted again\n")
    recalibration.record(path, "40", Recalibration(temperature=1.5), 4)
    assert recalibration.recorded(path, "40") == Recalibration(temperature=1.5)


def test_a_threshold_moves_accuracy():
    logits, labels = odds(1.0, 0.5, 3.0, 4.0), np.array([0, 0, 1, 1])
    assert accuracy(logits, labels) == 0.5
    assert accuracy(Recalibration(log_odds=2.0).shifted(logits), labels) == 1
