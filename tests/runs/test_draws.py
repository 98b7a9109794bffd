"""Draws: their pairs, their names, and the settings that are refused."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from xtransfer.config import parse
from xtransfer.errors import UserError
from xtransfer.runs.draws import (
    OVERLAPPING,
    SAMPLES,
    SEEDS,
    TEACHERS,
    UNLABELLED_SAMPLES,
    axis,
    draws_of,
    name_in,
    named,
    order,
)
from xtransfer.runs.workdir import Workdir, as_record, check_config_unchanged, record


def config(samples=(), teachers=(), **task):
    task = {"labelled": 8, "labelled_seed": 3, "labelled_seeds": samples} | task
    return parse({"task": task, "teacher_seed": 5, "teacher_seeds": teachers})


def pairs(settings):
    return [(draw.labelled_seed, draw.teacher_seed) for draw in draws_of(settings)]


def test_samples_and_teachers_are_paired():
    assert pairs(config()) == [(3, 5)]
    assert pairs(config(samples=(3, 4))) == [(3, 5), (4, 5)]
    assert pairs(config(teachers=(6, 7))) == [(3, 6), (3, 7)]
    assert pairs(config(samples=(1, 2), teachers=(9, 8))) == [(1, 9), (2, 8)]


def test_only_the_default_draw_is_at_the_top():
    names = [draw.name for draw in draws_of(config(samples=(3, 4)))]
    assert names == ["default", "sample-4-teacher-5"]
    default, other = (Workdir(Path("w")).at(name) for name in names)
    assert default.teacher == Path("w/teacher")
    assert other.teacher == Path("w/draws/sample-4-teacher-5/teacher")
    assert other.student("vanilla", 0) == Path("w/draws/sample-4-teacher-5/students/vanilla/seed-0")
    assert other.results == default.results == Path("w/results.jsonl")
    assert other.predictions(other.teacher, 7, "test", "en") == Path(
        "w/predictions/draws/sample-4-teacher-5/teacher/7/test-en.jsonl"
    )


seeds = st.integers(0, 2**32 - 1)


@given(st.lists(st.tuples(seeds, seeds), min_size=1, max_size=5, unique=True))
def test_a_name_leads_back_to_its_draw_and_to_no_other(drawn):
    settings = config(samples=tuple(a for a, _ in drawn), teachers=tuple(b for _, b in drawn))
    draws = draws_of(settings)
    assert len({draw.name for draw in draws}) == len(drawn)
    for draw in draws:
        assert named(settings, draw.name) == draw
        assert pairs(draw.apply(settings)) == [(draw.labelled_seed, draw.teacher_seed)]


@given(st.tuples(seeds, seeds), st.tuples(seeds, seeds))
def test_a_draw_has_a_name_in_every_experiment(own, other):
    """The name leads to the same two seeds, also if the draw is the default one of another experiment."""
    theirs, mine = (
        parse({"task": {"labelled": 8, "labelled_seed": sample}, "teacher_seed": teacher})
        for sample, teacher in (other, own)
    )
    (draw,) = draws_of(theirs)
    found = named(mine, name_in(mine, draw))
    assert (found.labelled_seed, found.teacher_seed) == other


@pytest.mark.parametrize(
    "name", ["", "sample-1", "sample-01-teacher-0", "../x", "sample-3-teacher-5", "sample-1-teacher-2/"]
)
def test_other_names_are_no_draws(name):
    assert named(config(), name) is None


def test_draws_are_ordered_by_their_numbers():
    names = ["sample-10-teacher-0", "default", "sample-2-teacher-1", "sample-2-teacher-0"]
    assert sorted(names, key=order) == ["default", names[3], names[2], names[0]]


def test_the_axis_is_what_differs():
    def of(settings):
        return axis(settings, [draw.name for draw in draws_of(settings)])

    assert of(config()) == of(config(samples=(9,))) == SEEDS
    assert of(config(samples=(3, 4))) == of(config(samples=(3, 4), teachers=(0, 1))) == SAMPLES
    assert of(config(teachers=(0, 1))) == TEACHERS
    unlabelled = config(samples=(3, 4), teachers=(5, 6), labelled=0, unlabelled=9)
    assert of(unlabelled) == UNLABELLED_SAMPLES
    # Without a sample of labels and text, only the teachers differ, whatever the seeds are.
    assert of(config(samples=(3, 4), teachers=(5, 6), labelled=0)) == TEACHERS
    # Rows of two starts may have draws that are not independent.
    assert axis(config(), ["default", "sample-3-teacher-6", "sample-4-teacher-5"]) == OVERLAPPING
    assert axis(unlabelled, ["default", "sample-4-teacher-5"]) == OVERLAPPING
    assert SAMPLES.over(5) == "5 labelled samples, each with its own teacher"
    assert SEEDS.over(2) == "2 seeds; one labelled sample and one teacher"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"samples": (0, 1), "teachers": (0,)}, "have 2 and 1 items: they are paired"),
        ({"samples": (1, 1)}, r"labelled_seeds \(1, 1\) and teacher_seeds \(\) name a pair"),
        ({"teachers": (2, 2)}, "name a pair"),
        ({"samples": (1, 1), "teachers": (2, 2)}, "name a pair"),
        ({"samples": (0, 1), "labelled": 0}, "every sample holds all examples"),
        ({"samples": (0, 1), "labelled": 0, "unlabelled": 9}, r"teacher_seeds is \(\), but with task\.labelled 0"),
        (
            {"samples": (0, 1), "labelled": 0, "unlabelled": 9, "teachers": (4, 4)},
            "teachers with the same seed are one",
        ),
        (
            {"samples": (0, 1), "labelled": 0, "unlabelled": 9, "unlabelled_from": "none"},
            "every sample holds all examples",
        ),
        ({"samples": (0, 0, 1), "teachers": (0, 1, 0)}, r"labelled_seeds \(0, 0, 1\) repeats some samples"),
        ({"samples": (-1,)}, r"task\.labelled_seeds\[0\] is -1"),
        ({"teachers": (2**32,)}, r"teacher_seeds\[0\] is 4294967296"),
    ],
)
def test_draws_that_cannot_be_are_refused(settings, message):
    with pytest.raises(UserError, match=message):
        config(**settings)


def test_one_sample_may_have_several_teachers():
    assert pairs(config(samples=(1, 1), teachers=(0, 1))) == [(1, 0), (1, 1)]
    assert pairs(config(teachers=(0, 1), labelled=0)) == [(3, 0), (3, 1)]


def test_draws_may_be_added_later_and_the_default_one_may_not_change(tmp_path):
    record(Workdir(tmp_path).config, as_record(config()))
    check_config_unchanged(Workdir(tmp_path), config(samples=(3, 4), teachers=(5, 6)))
    with pytest.raises(UserError, match=r"task\.labelled_seed: 3 → 4"):
        check_config_unchanged(Workdir(tmp_path), config(labelled_seed=4))
