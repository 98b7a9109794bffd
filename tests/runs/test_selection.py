"""The checkpoint that each protocol selects."""

import math

import pytest

from xtransfer.errors import UserError
from xtransfer.runs.selection import PROTOCOLS, DevScores, choose, weights_name

SOURCE = {10: 0.7, 30: 0.8, 20: 0.8, 40: 0.6}
# The best German step is 30, the best Japanese one 10, and neither is the best in the source language.
TARGETS = {"de": {10: 0.5, 20: 0.625, 30: 0.875, 40: 0.75}, "ja": {10: 0.9, 20: 0.375, 30: 0.5, 40: 0.9}}


def test_source_dev_selects_the_earliest_of_the_best_steps():
    assert choose(DevScores(SOURCE)) == {"source_dev": 20, "last": 40}
    assert choose(DevScores(dict(reversed(SOURCE.items())))) == {"source_dev": 20, "last": 40}
    assert choose(DevScores({7: 0.0})) == {"source_dev": 7, "last": 7}


def test_the_oracle_selects_the_best_step_of_each_language_and_the_earliest_among_equals():
    scores = DevScores(SOURCE, TARGETS)
    assert choose(scores, "de")["target_dev"] == 30
    assert choose(scores, "ja")["target_dev"] == 10
    assert choose(scores, "en")["target_dev"] == 20  # the source language's own dev split


def test_the_oracle_is_labelled_and_needs_a_language_and_its_scores():
    assert not PROTOCOLS["target_dev"].zero_shot and PROTOCOLS["target_dev"].per_language
    assert "oracle, not zero-shot" in PROTOCOLS["target_dev"].description
    assert all(PROTOCOLS[name].zero_shot for name in ("source_dev", "last", "average"))
    assert "target_dev" not in choose(DevScores(SOURCE, TARGETS))
    assert "target_dev" not in choose(DevScores(SOURCE), "de")


def test_target_languages_never_affect_the_zero_shot_protocols():
    chosen = choose(DevScores(SOURCE, TARGETS, [30, 40]), "de")
    del chosen["target_dev"]
    assert chosen == choose(DevScores(SOURCE, averaged=[30, 40])) == {"source_dev": 20, "last": 40, "average": 40}


def test_the_average_is_the_one_of_the_last_checkpoint():
    assert choose(DevScores(SOURCE, averaged=[40]))["average"] == 40
    assert "average" not in choose(DevScores(SOURCE, averaged=[30]))
    assert [weights_name(40, PROTOCOLS[name].item) for name in ("last", "average")] == ["40", "40-average"]


def test_the_oracle_requires_every_step():
    targets = {"de": dict.fromkeys(SOURCE, 0.5), "ja": {10: 0.5, 20: 0.5, 40: 0.5}}
    with pytest.raises(UserError, match="step 30 has no dev result in ja"):
        choose(DevScores(SOURCE, targets))


def test_missing_dev_results_are_refused():
    with pytest.raises(UserError, match="no dev result in the source language"):
        choose(DevScores({}))


def test_nan_is_refused():
    with pytest.raises(UserError, match="step 30: .*the source language is NaN"):
        choose(DevScores(SOURCE | {30: math.nan}))
    with pytest.raises(UserError, match="step 10: .*de is NaN"):
        choose(DevScores(SOURCE, {"de": dict.fromkeys(SOURCE, math.nan)}))
