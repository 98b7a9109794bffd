"""The checkpoint that each protocol selects."""

import math

import pytest

from xtransfer.errors import UserError
from xtransfer.runs.selection import PROTOCOLS, choose

SOURCE = {10: 0.7, 30: 0.8, 20: 0.8, 40: 0.6}


def test_source_dev_selects_the_earliest_of_the_best_steps():
    assert choose(SOURCE) == {"source_dev": 20, "last": 40}
    assert choose(dict(reversed(SOURCE.items()))) == {"source_dev": 20, "last": 40}
    assert choose({7: 0.0}) == {"source_dev": 7, "last": 7}


def test_the_oracle_averages_the_target_languages_and_is_not_zero_shot():
    # Averages 0.7, 0.625, 0.75, 0.7: neither the best German step nor the best Japanese one.
    target = {"de": {10: 0.5, 20: 0.875, 30: 0.75, 40: 0.7}, "ja": {10: 0.9, 20: 0.375, 30: 0.75, 40: 0.7}}
    assert choose(SOURCE, target) == {"source_dev": 20, "last": 40, "target_dev_oracle": 30}
    assert not PROTOCOLS["target_dev_oracle"].zero_shot
    assert "not zero-shot" in PROTOCOLS["target_dev_oracle"].description
    assert PROTOCOLS["source_dev"].zero_shot and PROTOCOLS["last"].zero_shot


def test_oracle_ties_go_to_the_earliest_step():
    assert choose(SOURCE, {"de": dict.fromkeys((40, 30, 20, 10), 0.5)})["target_dev_oracle"] == 10


def test_target_languages_never_affect_the_zero_shot_protocols():
    target = {"de": {10: 1.0, 20: 0.0, 30: 0.0, 40: 0.0}}
    chosen = choose(SOURCE, target)
    assert {name: chosen[name] for name in ("source_dev", "last")} == choose(SOURCE)


def test_the_oracle_requires_every_target_language():
    target = {"de": dict.fromkeys(SOURCE, 0.5), "ja": {10: 0.5, 20: 0.5, 40: 0.5}}
    with pytest.raises(UserError, match="step 30 has no dev result in ja"):
        choose(SOURCE, target)


def test_missing_dev_results_are_refused():
    with pytest.raises(UserError, match="no dev result in the source language"):
        choose({})


def test_nan_is_refused():
    with pytest.raises(UserError, match="step 30: .*the source language is NaN"):
        choose(SOURCE | {30: math.nan})
    with pytest.raises(UserError, match="step 10: .*de is NaN"):
        choose(SOURCE, {"de": dict.fromkeys(SOURCE, math.nan)})
