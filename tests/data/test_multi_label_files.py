"""Label sets in files of every format, and the errors of malformed ones."""

import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from xtransfer.config import ExperimentConfig, TaskConfig, parse
from xtransfer.data.formats.tables import LabelSets, _names
from xtransfer.data.registry import load_task
from xtransfer.errors import UserError

ROWS = [("one", ["b", "a"]), ("two", []), ("three", ["b"]), ("four", ["a"])]
JOINED = ["b|a", "", "b", " a "]


def write(directory, ending, rows=ROWS, joined=JOINED):
    for language in ("en", "de"):
        (directory / language).mkdir(parents=True, exist_ok=True)
        for split in ("train", "dev", "test"):
            path = directory / language / f"{split}.{ending}"
            if ending == "parquet":
                sets = pa.array([labels for _, labels in rows], pa.list_(pa.string()))
                pq.write_table(pa.table({"text": [text for text, _ in rows], "label": sets}), path)
            elif ending == "jsonl":
                path.write_text("".join(json.dumps({"text": text, "label": labels}) + "\n" for text, labels in rows))
            else:
                tab = "\t" if ending == "tsv" else ","
                lines = [f"{text}{tab}{cell}\n" for (text, _), cell in zip(rows, joined, strict=True)]
                path.write_text("".join([f"text{tab}label\n", *lines]))
    return directory


def config(directory, ending, **changes):
    separator = "bar" if ending in ("tsv", "csv") else ""
    values = {"name": "files", "data_dir": str(directory), "path": f"{{language}}/{{split}}.{ending}"}
    return TaskConfig(**{**values, "multi_label": True, "label_separator": separator, **changes})


@pytest.mark.parametrize("ending", ["tsv", "csv", "jsonl", "parquet"])
def test_label_sets_are_the_same_in_every_format(tmp_path, ending):
    task = load_task(config(write(tmp_path, ending), ending))
    assert task.labels == ("a", "b") and task.multi_label
    examples = task.load("test", "de")
    assert [(x.label, x.label_set) for x in examples] == [(-1, (0, 1)), (-1, ()), (-1, (1,)), (-1, (0,))]
    assert task.gold(examples).tolist() == [[1, 1], [0, 0], [0, 1], [1, 0]]


def test_a_named_separator_also_divides_strings_in_jsonl_and_lists_stay_valid(tmp_path):
    rows = [("one", "b;a"), ("two", ""), ("three", ["b"]), ("four", ["a"])]
    task = load_task(config(write(tmp_path, "jsonl", rows), "jsonl", label_separator="semicolon"))
    assert [x.label_set for x in task.load("train", "en")] == [(0, 1), (), (1,), (0,)]


def test_the_form_of_labels_is_a_part_of_the_datas_fingerprint(tmp_path):
    write(tmp_path, "jsonl", [("one", "b;a"), ("two", "b"), ("three", "b;a")])
    single = TaskConfig(name="files", data_dir=str(tmp_path), path="{language}/{split}.jsonl")
    several = config(tmp_path, "jsonl", label_separator="semicolon")
    assert load_task(single).labels == ("b", "b;a")
    assert load_task(single).fingerprint() != load_task(several).fingerprint()


@pytest.mark.parametrize(
    ("cell", "message"),
    [
        (["c"], r"de/test.jsonl:2: label 'c' is not one of a, b"),
        (
            "a",
            r"de/test.jsonl:2: column 'label' is text, expected a list of labels; name what separates them in task.l",
        ),
        (None, r"de/test.jsonl:2: column 'label' is null, expected a list of labels"),
        (["a", "a"], r"de/test.jsonl:2: column 'label' has the label 'a' twice"),
        (["a", " "], r"de/test.jsonl:2: column 'label' is empty"),
        (["a", {}], r"de/test.jsonl:2: column 'label' is an object"),
        (["A"], r"de/test.jsonl:2: label 'A' is not one of a, b; did you mean 'a'"),
    ],
)
def test_a_malformed_set_names_its_file_and_line(tmp_path, cell, message):
    write(tmp_path, "jsonl")
    (tmp_path / "de" / "test.jsonl").write_text(
        json.dumps({"text": "x", "label": []}) + "\n" + json.dumps({"text": "y", "label": cell}) + "\n"
    )
    with pytest.raises(UserError, match=message) as caught:
        load_task(config(tmp_path, "jsonl")).load("test", "de")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("cell", ["a||b", "|a", "a| |b"])
def test_an_empty_name_between_separators_is_an_error(tmp_path, cell):
    write(tmp_path, "tsv")
    (tmp_path / "de" / "test.tsv").write_text(f"text\tlabel\nx\t{cell}\n")
    with pytest.raises(UserError, match=r"test.tsv:2: .* there is no label between two separators"):
        load_task(config(tmp_path, "tsv")).load("test", "de")


def test_a_class_without_an_example_in_train_is_refused(tmp_path):
    task = load_task(config(write(tmp_path, "jsonl"), "jsonl", labels=("a", "b", "c")))
    with pytest.raises(UserError, match="no example of 'c' in task.labels"):
        task.load("train", "en")


def test_without_dev_one_is_held_out_and_keeps_every_class_in_train(tmp_path):
    write(tmp_path, "jsonl", [*ROWS, ("five", ["c"])])
    (tmp_path / "en" / "dev.jsonl").unlink()
    task = load_task(config(tmp_path, "jsonl", held_out_dev=2))
    train, dev = task.load("train", "en"), task.load("dev", "en")
    assert len(dev) == 2 and {label for x in train for label in x.classes} == {0, 1, 2}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"task": {"label_separator": "bar"}},
            "label_separator is 'bar', but a text has one label unless task.multi_l",
        ),
        (
            {"task": {"multi_label": True}, "metrics": ("macro_f1",)},
            "metrics is .*add 'micro_f1', which other commands",
        ),
        ({"transfer": {"fitted_thresholds": True}}, "transfer.fitted_thresholds is True, but only a multi-label task"),
    ],
)
def test_settings_of_the_other_kind_of_task_are_refused(changes, message):
    with pytest.raises(UserError, match=message):
        parse(changes)


def test_the_metrics_of_a_multi_label_task_have_other_defaults():
    several = parse({"task": {"multi_label": True}})
    assert several.metrics == ("micro_f1", "macro_f1", "subset_accuracy")
    assert several.selection_metric == several.headline_metric == "micro_f1"
    assert parse({}) == ExperimentConfig() and parse({}).headline_metric == "accuracy"
    chosen = parse({"task": {"multi_label": True}, "metrics": ("micro_f1",), "selection_metric": "macro_f1"})
    assert (chosen.metrics, chosen.selection_metric) == (("micro_f1",), "macro_f1")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"name": "minireviews"}, "task.multi_label is True, but every text of 'minireviews' has exactly one label"),
        ({"label_separator": ""}, "task.label_separator is empty: name what separates the labels"),
    ],
)
def test_a_task_that_cannot_have_label_sets_is_refused(tmp_path, changes, message):
    with pytest.raises(UserError, match=message):
        load_task(config(write(tmp_path, "tsv"), "tsv", **changes))


NAMES = st.lists(st.text("abc xyz", min_size=1).map(str.strip).filter(bool), unique=True)


@settings(max_examples=100, deadline=None)
@given(NAMES)
def test_names_survive_a_separator(names):
    read = _names({"label": " ; ".join(names)}, "label", "here", LabelSets(";"))
    assert read == tuple(names) == _names({"label": names}, "label", "here", LabelSets())
