"""Predictions of workdirs as arrays of correctness, and the errors if they cannot be paired."""

import json

import numpy as np
import pytest

from tests.helpers.predicted import STEP, workdir
from xtransfer import storage
from xtransfer.errors import UserError
from xtransfer.evaluation.paired import Students, load

VANILLA = {0: {"en": [1, 1, 0], "de": [1, 0, 0]}, 1: {"en": [1, 0, 0], "de": [0, 0, 1]}}
MONOX = {0: {"en": [1, 1, 1], "de": [1, 1, 0]}, 1: {"en": [1, 0, 1], "de": [1, 1, 1]}}
BOTH = {"vanilla": VANILLA, "monox_kd": MONOX}


def pair(first, second=None, names=("monox_kd", "vanilla"), **settings):
    a, b = Students(first, names[0]), Students(second or first, names[1])
    return load(a, b, **{"split": "test", "selection": "source_dev"} | settings)


def predictions(run, objective="vanilla", seed=0, language="de"):
    return run.predictions(run.student(objective, seed), STEP, "test", language)


def move_to_draw(run, draw):
    """Make another draw of the default one."""
    source, target = run.root / "predictions" / "students", run.root / "predictions" / "draws" / draw / "students"
    target.parent.mkdir(parents=True)
    source.rename(target)
    edit(run.results, lambda rows: [row | {"draw": draw} for row in rows])


def edit(path, change):
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    storage.write_jsonl(path, change(lines))


def test_translations_share_their_items(tmp_path):
    loaded = pair(workdir(tmp_path / "run", BOTH, name="sib200"))
    assert loaded.shares_items and loaded.left_out == ()
    assert (loaded.a.languages, loaded.a.units, loaded.a.items) == (("en", "de"), (0, 1), ("0", "1", "2"))
    np.testing.assert_array_equal(loaded.a.correct, [[[1, 1, 1], [1, 1, 0]], [[1, 0, 1], [1, 1, 1]]])
    np.testing.assert_array_equal(loaded.b.correct, [[[1, 1, 0], [1, 0, 0]], [[1, 0, 0], [0, 0, 1]]])


def test_other_texts_do_not_share_items_with_the_same_number(tmp_path):
    loaded = pair(workdir(tmp_path / "run", BOTH))
    assert not loaded.shares_items
    assert loaded.a.items == ("en/0", "en/1", "en/2", "de/0", "de/1", "de/2")
    nan = np.nan
    np.testing.assert_array_equal(loaded.a.correct[0], [[1, 1, 1, nan, nan, nan], [nan, nan, nan, 1, 1, 0]])


@pytest.mark.parametrize(
    ("task", "expected"),
    [
        ({"name": "files", "path": "x"}, False),
        ({"name": "files", "id_column": "id"}, True),
        ({"name": "massive/intent"}, True),
        ({"name": "webis_cls/books"}, False),
    ],
)
def test_the_task_says_whether_items_are_shared(tmp_path, task, expected):
    assert pair(workdir(tmp_path / "run", BOTH, **task)).shares_items is expected


def test_a_language_may_lack_some_items(tmp_path):
    right = {name: {0: {"en": [1, 1, 0], "de": [1, 0]}} for name in BOTH}
    loaded = pair(workdir(tmp_path / "run", right, name="paws_x"))
    np.testing.assert_array_equal(loaded.a.correct, [[[1, 1, 0], [1, 0, np.nan]]])


def test_files_may_list_the_items_in_another_order(tmp_path):
    run = workdir(tmp_path / "run", BOTH, name="sib200")
    expected = pair(run).b.correct
    edit(predictions(run), lambda lines: lines[::-1])
    np.testing.assert_array_equal(pair(run).b.correct, expected)


def test_two_workdirs_are_paired_by_the_seeds_that_both_have(tmp_path):
    first = workdir(tmp_path / "a", {"monox_kd": MONOX}, name="sib200")
    second = workdir(tmp_path / "b", {"monox_kd": {1: VANILLA[1], 2: VANILLA[0]}}, name="sib200")
    loaded = pair(first, second, ("monox_kd", "monox_kd"))
    assert (loaded.a.units, loaded.left_out) == ((1,), (("default", 0), ("default", 2)))
    np.testing.assert_array_equal(loaded.b.correct, [[[1, 0, 0], [0, 0, 1]]])
    third = workdir(tmp_path / "c", {"monox_kd": {7: VANILLA[0]}}, name="sib200")
    with pytest.raises(
        UserError,
        match=r"no run in common: monox_kd in .*/a has labelled_seed 0, teacher_seed 0, seed 0, 1, and monox_kd in "
        r".*/c has labelled_seed 0, teacher_seed 0, seed 7",
    ):
        pair(first, third, ("monox_kd", "monox_kd"))


def test_draws_of_two_workdirs_are_paired_by_their_seeds_and_not_by_their_names(tmp_path):
    """The default draw of one workdir is sample 0, and the one of the other is sample 7."""
    first = workdir(tmp_path / "a", {"monox_kd": MONOX}, name="sib200", labelled=2)
    second = workdir(tmp_path / "b", {"monox_kd": VANILLA}, name="sib200", labelled=2, labelled_seed=7)
    names = ("monox_kd", "monox_kd")
    with pytest.raises(UserError, match=r"/a has labelled_seed 0, .*/b has labelled_seed 7, teacher_seed 0, seed 0, 1"):
        pair(first, second, names)
    # The default draw of the second is a further draw of this one, and the other way round.
    third = workdir(tmp_path / "c", {"monox_kd": MONOX}, name="sib200", labelled=2)
    move_to_draw(third, "sample-7-teacher-0")
    loaded = pair(third, second, names)
    assert loaded.a.runs == loaded.b.runs == (("sample-7-teacher-0", 0), ("sample-7-teacher-0", 1))
    assert loaded.left_out == ()
    np.testing.assert_array_equal(loaded.b.correct, pair(second, names=names).a.correct)
    assert pair(second, third, names).a.runs == (("default", 0), ("default", 1))


def test_a_sample_of_all_examples_has_no_seed(tmp_path):
    first = workdir(tmp_path / "a", {"monox_kd": MONOX}, name="sib200")
    second = workdir(tmp_path / "b", {"monox_kd": VANILLA}, name="sib200", labelled_seed=7)
    assert pair(first, second, ("monox_kd", "monox_kd")).left_out == ()


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (
            ("monox_kd", "vanila"),
            r"results\.jsonl: no test results of 'vanila', .* by source_dev; did you mean 'vanilla'",
        ),
        (("monox_kd", "xyz"), r"no test results of 'xyz', .*; there are monox_kd, vanilla$"),
        (("teacher", "vanilla"), "teacher: it knows the source language only"),
    ],
)
def test_an_objective_without_results_is_refused(tmp_path, names, message):
    with pytest.raises(UserError, match=message):
        pair(workdir(tmp_path / "run", BOTH), names=names)


def test_a_protocol_or_split_without_results_is_refused(tmp_path):
    run = workdir(tmp_path / "run", BOTH)
    with pytest.raises(UserError, match="no test results of 'monox_kd', checkpoints selected by last$"):
        pair(run, selection="last")
    with pytest.raises(UserError, match="no dev results of 'monox_kd'"):
        pair(run, split="dev")


def test_two_results_of_one_seed_are_refused(tmp_path):
    run = workdir(tmp_path / "run", BOTH)
    edit(run.results, lambda rows: [*rows, rows[-1] | {"step": 80}])
    with pytest.raises(UserError, match="monox_kd seed 1 has two different results: steps 40 and 80"):
        pair(run)


def drop_last(lines):
    return lines[:-1]


def rename_last(lines):
    return [*lines[:-1], lines[-1] | {"id": lines[-1]["id"] + "x"}]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (drop_last, r"vanilla/seed-0/40/test-de\.jsonl lacks item 2, which .*monox_kd/seed-0/40/test-de\.jsonl has"),
        (rename_last, r"vanilla/seed-0/40/test-de\.jsonl lacks item 2, which "),
        (lambda lines: [*lines, lines[-1] | {"id": "sib200/test/de/9"}], r"monox_kd/.* lacks item 9, which .*vanilla/"),
        (lambda lines: [lines[0] | {"label": "good"}, *lines[1:]], "item 0 has the label 'good', and 'bad' in "),
        (lambda lines: [*lines, lines[0]], r"test-de\.jsonl:4: id 'sib200/test/de/0' occurs twice: remove"),
        (lambda lines: [{"id": "sib200/test/fr/0"} | lines[1] | {"id": "sib200/test/fr/0"}], "does not start with sib"),
        (lambda lines: [*lines[:2], {"id": "x"}], r"test-de\.jsonl:3: expected an object with the texts id, label"),
        (lambda lines: [lines[0] | {"prediction": 1}], r"test-de\.jsonl:1: expected an object"),
    ],
)
def test_other_items_and_malformed_rows_are_refused(tmp_path, change, message):
    run = workdir(tmp_path / "run", BOTH, name="sib200")
    edit(predictions(run), change)
    with pytest.raises(UserError, match=message) as caught:
        pair(run)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("content", "message"), [(b"", r"de\.jsonl:1: not strict JSON"), (b'{"id": NaN}\n', "NaN"), (b"\xff\n", "strict")]
)
def test_a_damaged_file_is_named_with_its_line(tmp_path, content, message):
    run = workdir(tmp_path / "run", BOTH)
    predictions(run).write_bytes(content)
    with pytest.raises(UserError, match=message):
        pair(run)


def test_a_missing_file_is_named_with_what_to_do(tmp_path):
    run = workdir(tmp_path / "run", BOTH)
    predictions(run, seed=1).unlink()
    with pytest.raises(UserError, match=r"seed-1/40/test-de\.jsonl: No such file.*run python -m xtransfer\.evaluate"):
        pair(run)


def test_workdirs_of_other_languages_are_refused(tmp_path):
    first = workdir(tmp_path / "a", BOTH)
    french = {name: {0: {"en": [1], "fr": [1]}} for name in BOTH}
    second = workdir(tmp_path / "b", french)
    with pytest.raises(UserError, match="target_languages is de in one and fr in the other"):
        pair(first, second)
    alone = workdir(tmp_path / "c", {name: {0: {"en": [1]}} for name in BOTH})
    with pytest.raises(UserError, match="no target language"):
        pair(alone)
