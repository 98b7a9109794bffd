"""Result rows, and the table built from them."""

import dataclasses
import json
import math
import random

import pytest

from tests.runtime.test_checksums import flipped
from xtransfer.distillation.objectives import OBJECTIVES
from xtransfer.errors import UserError
from xtransfer.evaluation.results import Summary, aggregate, mend, read_rows, whole_rows, write_rows
from xtransfer.runs.draws import SAMPLES, SEEDS

VALUES = {  # objective -> seed -> en, de, ja
    "monox_kd": {0: (0.82, 0.70, 0.66), 1: (0.80, 0.72, 0.60)},
    "vanilla": {0: (0.70, 0.60, 0.60), 1: (0.74, 0.66, 0.56)},
}


def make_rows(values=VALUES, languages=("en", "de", "ja"), **changes):
    return [
        {
            "task": "reviews",
            "objective": objective,
            "draw": "default",
            "seed": seed,
            "step": 100 + seed,
            "selection": "source_dev",
            "split": "test",
            "language": language,
            "metric": "accuracy",
            "value": value,
            "count": 1000,
        }
        | changes
        for objective, by_seed in values.items()
        for seed, row in by_seed.items()
        for language, value in zip(languages, row, strict=False)
    ]


def table(rows, **settings):
    return aggregate(rows, **{"source_languages": ("en",)} | settings)


def test_summary_by_hand():
    # mean (1 + 2 + 6)/3 = 3, deviations −2, −1, 3: sd = √(14/2) = 2.6457513
    summary = Summary({0: 1.0, 1: 2.0, 2: 6.0})
    assert summary.mean == 3
    assert summary.sd == pytest.approx(2.6457513110645907, rel=1e-12)
    assert Summary({5: 0.25}).mean == 0.25
    assert Summary({5: 0.25}).sd is None


def test_table_by_hand():
    result = table(make_rows())
    assert (result.task, result.source_languages, result.target_languages) == ("reviews", ("en",), ("de", "ja"))
    assert result.counts == {"en": 1000, "de": 1000, "ja": 1000}
    vanilla, kd = result.lines
    assert (vanilla.objective, kd.objective) == ("vanilla", "monox_kd")
    assert vanilla.seeds == kd.seeds == (0, 1)
    # German of monox_kd: 0.70, 0.72: mean 0.71, sd 0.02/√2
    assert kd.languages["de"].mean == pytest.approx(0.71)
    assert kd.languages["de"].sd == pytest.approx(0.01414213562)
    # Averages without English: vanilla 0.60 and 0.61, monox_kd 0.68 and 0.66
    assert vanilla.average.by_unit == pytest.approx({0: 0.60, 1: 0.61})
    assert kd.average.by_unit == pytest.approx({0: 0.68, 1: 0.66})
    # Gains of the same seed: 0.08 and 0.05: mean 0.065, sd 0.03/√2. Unpaired, the sd would differ.
    assert kd.gain.by_unit == pytest.approx({0: 0.08, 1: 0.05})
    assert kd.gain.sd == pytest.approx(0.02121320344)
    assert vanilla.gain is None


def test_rows_of_other_splits_metrics_and_protocols_are_ignored():
    others = make_rows(split="dev") + make_rows(metric="macro_f1") + make_rows(selection="last", step=7)
    others = [row | {"value": 0.0} for row in others]
    assert table(make_rows() + others) == table(make_rows())
    assert table(others, metric="macro_f1").lines[0].average.mean == 0


@pytest.mark.parametrize(("objective", "seed", "language"), [("monox_kd", 1, "ja"), ("vanilla", 0, "en")])
def test_a_missing_language_is_an_error_that_names_run_and_language(objective, seed, language):
    rows = [r for r in make_rows() if (r["objective"], r["seed"], r["language"]) != (objective, seed, language)]
    with pytest.raises(UserError, match=f"{objective} seed {seed} has no test accuracy in {language}"):
        table(rows)


def test_a_requested_language_that_no_run_has_is_an_error():
    with pytest.raises(UserError, match="has no test accuracy in fr"):
        table(make_rows(), target_languages=("de", "fr"))
    assert table(make_rows(), target_languages=("ja",)).lines[0].average.by_unit == {0: 0.60, 1: 0.56}


def test_the_gain_uses_common_seeds_only():
    values = {"vanilla": {0: VALUES["vanilla"][0]}, "monox_kd": VALUES["monox_kd"]}
    kd = table(make_rows(values)).lines[1]
    assert kd.gain.by_unit == pytest.approx({0: 0.08})
    assert kd.gain.sd is None
    values = {"vanilla": {9: VALUES["vanilla"][0]}, "monox_kd": VALUES["monox_kd"]}
    assert table(make_rows(values)).lines[1].gain is None
    assert table(make_rows({"monox_kd": VALUES["monox_kd"]})).lines[0].gain is None


def test_several_draws_are_the_units_and_seeds_their_parts():
    second = {"monox_kd": {0: (0.9, 0.80, 0.80)}, "vanilla": {0: (0.8, 0.70, 0.70), 1: (0.8, 0.74, 0.74)}}
    rows = make_rows() + make_rows(second, draw="sample-1-teacher-0")
    result = table(rows)
    vanilla, kd = result.lines
    assert result.draws == ("default", "sample-1-teacher-0") and result.axis == SAMPLES
    # Averages of vanilla: 0.60 and 0.61 in the default draw, 0.70 and 0.74 in the other.
    assert vanilla.average.by_unit == pytest.approx({"default": 0.605, "sample-1-teacher-0": 0.72})
    assert vanilla.average.sd == pytest.approx((0.72 - 0.605) / math.sqrt(2))
    # Gains are paired by draw and seed: 0.08 and 0.05 in the default draw, and 0.80 - 0.70 in the other.
    assert kd.gain.by_unit == pytest.approx({"default": 0.065, "sample-1-teacher-0": 0.1})
    assert [run.seed for run in kd.runs] == [0, 1, 0]
    assert table(make_rows()).axis == SEEDS
    with pytest.raises(UserError, match="monox_kd sample-1-teacher-0 seed 0 has no test accuracy in ja"):
        table(
            [r for r in rows if (r["objective"], r["draw"], r["language"]) != ("monox_kd", "sample-1-teacher-0", "ja")]
        )


def test_a_row_without_a_draw_is_of_the_default_draw(tmp_path):
    rows = make_rows()
    path = tmp_path / "results.jsonl"
    path.write_text("".join(json.dumps({k: v for k, v in row.items() if k != "draw"}) + "\n" for row in rows))
    assert read_rows(path) == rows


def test_the_teacher_needs_only_the_source_language_and_comes_first():
    rows = make_rows() + make_rows({"teacher": {0: (0.9,)}, "another": {0: (0.5, 0.5, 0.5)}})
    lines = table(rows).lines
    assert [line.objective for line in lines] == ["teacher", "vanilla", "monox_kd", "another"]
    assert lines[0].languages == {"en": Summary({0: 0.9})}
    assert lines[0].average is None and lines[0].gain is None


def test_repeated_rows_count_once_and_contradictions_are_refused():
    assert table(make_rows() * 2) == table(make_rows())
    with pytest.raises(UserError, match="vanilla seed 1 has two different results.*in ja"):
        table([*make_rows(), make_rows()[-1] | {"value": 0.5}])
    with pytest.raises(UserError, match="steps 101 and 102"):
        table([*make_rows(), make_rows()[-1] | {"step": 102}])
    with pytest.raises(UserError, match="999 examples in ja, other runs on 1000"):
        table([*make_rows()[:-1], make_rows()[-1] | {"count": 999}])
    with pytest.raises(UserError, match="news, reviews"):
        table(make_rows() + make_rows(task="news"))


def test_a_table_without_results_is_an_error():
    with pytest.raises(UserError, match="no results: accuracy on split dev, .*; there are no results yet"):
        table([], split="dev")
    with pytest.raises(UserError, match="no test results in any language but"):
        table([row for row in make_rows() if row["language"] == "en"])


def test_the_error_for_missing_results_lists_the_available_ones():
    rows = make_rows() + make_rows(selection="last", step=7) + make_rows(metric="majority_share", value=0.5)
    with pytest.raises(UserError) as caught:
        table(rows, selection="target_dev")
    assert str(caught.value) == (
        "no results: accuracy on split test, checkpoints selected by target_dev; "
        "available: metric accuracy; split test; selection last, source_dev"
    )


def test_the_majority_share_is_per_language_on_the_chosen_split():
    shares = make_rows({"vanilla": {0: (0.5, 0.6, 0.7)}}, metric="majority_share")
    other = make_rows({"vanilla": {0: (0.1, 0.1, 0.1)}}, metric="majority_share", split="dev")
    assert table(make_rows() + shares + other).majority == {"en": 0.5, "de": 0.6, "ja": 0.7}
    assert table(make_rows()).majority == {}


def write_results(tmp_path, content):
    path = tmp_path / "results.jsonl"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def lines(rows):
    return [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]


def test_rows_are_read_back_and_u2028_is_not_a_line_break(tmp_path):
    rows = make_rows(task="a\u2028b")
    assert read_rows(write_results(tmp_path, "".join(lines(rows)))) == rows
    assert read_rows(write_results(tmp_path, "")) == []


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "not strict JSON"),
        ("", "not strict JSON"),
        ("[]", "found list"),
        (lines(make_rows(value=float("nan")))[0], "NaN"),
        (lines(make_rows(value=float("-inf")))[0], "-Infinity"),
        (lines(make_rows())[0].replace("0.82", "1e999"), "not strict JSON: 1e999 is too large"),
        (lines(make_rows())[0].replace("0.82", "1" + "0" * 400), "expected 0 to 1"),
        (lines(make_rows(value=-0.1))[0], "value = -0.1, expected 0 to 1"),
        (lines(make_rows(metric="class_f1/good", value=1.1))[0], "value = 1.1, expected 0 to 1"),
        (lines(make_rows(metric="log_loss", value=-0.1))[0], "value = -0.1, expected 0 to inf"),
        (lines(make_rows(metric="matthews_correlation", value=-1.1))[0], "value = -1.1, expected -1 to 1"),
        ("[" * 100_000, "not strict JSON: nested too deeply"),
        (lines(make_rows())[0].replace("{", '{"seed": 0, ', 1), "twice"),
        (lines(make_rows(extra=1))[0], "extra"),
        (lines(make_rows(uses_target_text=False))[0], "uses_target_text = False, expected true, or no such key"),
        (lines(make_rows(seed="0"))[0], "seed = '0', expected int"),
        (lines(make_rows(seed=True))[0], "seed = True"),
        (lines(make_rows(value=None))[0], "value = None"),
        ('{"seed": 1}', "keys"),
        (lines(make_rows(metric="accuracx"))[0], "no metric 'accuracx'; did you mean 'accuracy'"),
        (lines(make_rows(selection="lasu"))[0], "no selection 'lasu'; did you mean 'last'"),
        (b"\xff", "not strict JSON"),
    ],
)
def test_malformed_rows_are_named_by_file_and_line(tmp_path, line, message):
    line = line if isinstance(line, bytes) else line.encode()
    content = lines(make_rows())[0].encode() + line.rstrip(b"\n") + b"\n"
    with pytest.raises(UserError, match=rf"results\.jsonl:2: .*{message}"):
        read_rows(write_results(tmp_path, content))


@pytest.mark.parametrize("selection", ["source_dev", "last", "average", "target_dev", "step", "none"])
@pytest.mark.parametrize("metric", ["majority_share", "ece_calibrated", "macro_f1_thresholded", "class_f1/a b"])
def test_every_name_that_is_written_is_read(tmp_path, selection, metric):
    rows = make_rows(selection=selection, metric=metric)
    write_rows(tmp_path / "results.jsonl", rows)
    assert read_rows(tmp_path / "results.jsonl") == rows


def test_any_flipped_bit_costs_the_rows_of_its_line_and_is_named(tmp_path, caplog):
    rows, path, draw = make_rows(), tmp_path / "results.jsonl", random.Random(0)
    write_rows(path, rows)
    content = path.read_bytes()
    for bit in draw.sample(range(8 * len(content)), 200):
        number = content[: bit // 8].count(b"\n") + 1
        path.write_bytes(flipped(content, bit))
        with pytest.raises(UserError, match=rf"results\.jsonl:{number}: .* run python -m xtransfer.evaluate, which"):
            read_rows(path)
        caplog.clear()
        whole = whole_rows(path)
        lost = 2 if content[bit // 8] == ord("\n") and number < len(rows) else 1  # the line is joined to the next one
        assert whole == [*rows[: number - 1], *rows[number - 1 + lost :]]
        assert f"results.jsonl:{number}: " in caplog.text and "so this row is left out" in caplog.text
        mend(path, OBJECTIVES)
        assert read_rows(path) == whole
    assert whole_rows(tmp_path / "absent.jsonl") == []


def test_marks_of_target_text_follow_the_objectives(tmp_path):
    hop = dataclasses.replace(OBJECTIVES["self_training"], name="hop", data="target")
    objectives, path = {**OBJECTIVES, "hop": hop}, tmp_path / "results.jsonl"
    for name, mark, expected in (
        ("hop", {}, {"uses_target_text": True}),  # as an older version writes it
        ("hop", {"uses_target_text": True}, {"uses_target_text": True}),
        ("vanilla", {"uses_target_text": True}, {}),
        ("teacher", {}, {}),
        ("gone", {"uses_target_text": True}, {"uses_target_text": True}),
    ):
        write_rows(path, make_rows({name: {0: (0.5,)}}, **mark))
        mend(path, objectives)
        assert read_rows(path) == make_rows({name: {0: (0.5,)}}, **expected)
    before = path.stat().st_mtime_ns
    mend(path, objectives)
    assert path.stat().st_mtime_ns == before


def test_a_plausible_other_value_is_named(tmp_path):
    write_rows(tmp_path / "results.jsonl", make_rows())
    content = (tmp_path / "results.jsonl").read_text().replace("0.82", "0.92")
    with pytest.raises(UserError, match=r"results\.jsonl:1: its content does not match its digest: run python -m"):
        read_rows(write_results(tmp_path, content))


def test_a_truncated_or_missing_file_is_an_error(tmp_path):
    with pytest.raises(UserError, match=r"results\.jsonl:12: the last line is cut off"):
        read_rows(write_results(tmp_path, "".join(lines(make_rows()))[:-3]))
    with pytest.raises(UserError, match=r"absent\.jsonl: No such file.*evaluate"):
        read_rows(tmp_path / "absent.jsonl")
