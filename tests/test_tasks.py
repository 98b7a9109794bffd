"""Tasks: the registry, the user's own files, and the draws of labelled and unlabelled examples."""

import logging
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from xtransfer.config import TaskConfig
from xtransfer.data import tasks
from xtransfer.data.builders import minireviews
from xtransfer.data.tasks import Example, Task
from xtransfer.errors import UserError

Config = Callable[..., TaskConfig]


def examples(*counts: int) -> list[Example]:
    """So many examples of each class, the classes mixed."""
    labels = [label for label, count in enumerate(counts) for _ in range(count)]
    order = sorted(range(len(labels)), key=lambda i: (i * 7919) % 104729)
    return [Example(f"t/train/en/{i}", f"text {i}", None, labels[i], "en") for i in order]


def write(root: Path, language: str, split: str, *rows: str, header: str = "text\tlabel") -> None:
    folder = root / language
    folder.mkdir(exist_ok=True)
    (folder / f"{split}.tsv").write_text("\n".join([header, *rows]) + "\n")


@pytest.fixture
def config(tmp_path: Path) -> Config:
    """Files of a source language `en`, with unlabelled text, and of `de` and `fr`."""
    for split in ("train", "dev", "test"):
        write(tmp_path, "en", split, "nice\tgood", "poor\tbad", "great\tgood")
    write(tmp_path, "en", "unlabelled", "so so", "never mind", header="text")
    for language in ("de", "fr"):
        write(tmp_path, language, "test", "gut\tgood", "schlecht\tbad")

    def make(**changes) -> TaskConfig:
        return replace(TaskConfig(name="files", data_dir=str(tmp_path), source_language="en"), **changes)

    return make


@given(st.lists(st.integers(8, 20), min_size=1, max_size=5), st.integers(1, 40), st.integers(1, 40), st.integers(0, 5))
def test_labelled_subsets_are_balanced_nested_and_deterministic(counts, n, m, seed):
    n, m = sorted((min(n, 8 * len(counts)), min(m, 8 * len(counts))))
    everything = examples(*counts)
    few, many = (tasks.labelled_subset(everything, k, seed) for k in (n, m))
    assert len({example.id for example in many}) == m and set(many) <= set(everything)
    per_class = [Counter(example.label for example in many)[label] for label in range(len(counts))]
    assert max(per_class) - min(per_class) <= 1
    assert many[:n] == few
    assert tasks.labelled_subset(everything, m, seed) == many


def test_labelled_subsets_of_two_seeds_differ():
    everything = examples(50, 50)
    first, second = (tasks.labelled_subset(everything, 20, seed) for seed in (0, 1))
    assert set(first) != set(second)


def test_zero_labelled_means_all_of_them():
    assert tasks.labelled_subset(examples(3, 9), 0, 0) == examples(3, 9)


def test_more_labelled_than_there_are_is_an_error():
    everything = examples(4, 9)
    assert Counter(example.label for example in tasks.labelled_subset(everything, 8, 0)) == {0: 4, 1: 4}
    with pytest.raises(UserError, match="task.labelled 10, .* than there is: bad 4, good 9"):
        tasks.labelled_subset(everything, 10, 0, ("bad", "good"))
    with pytest.raises(UserError, match="than there is: 0 4, 1 9"):
        tasks.labelled_subset(everything, 10, 0)
    with pytest.raises(UserError, match="than there is: bad 4, good 9, mixed 0"):
        tasks.labelled_subset(everything, 3, 0, ("bad", "good", "mixed"))
    with pytest.raises(UserError, match="than there is: nothing"):
        tasks.labelled_subset([], 1, 0)
    with pytest.raises(ValueError, match="without a label"):
        tasks.labelled_subset(tasks.without_labels(everything), 1, 0)


def in_memory(train: list[Example], unlabelled: list[Example]) -> Task:
    splits = {"train": train, "unlabelled": unlabelled}
    return Task(
        name="t",
        labels=("bad", "good"),
        source_language="en",
        target_languages=(),
        load=lambda split, language: splits[split],
        fingerprint=lambda: "",
        synthetic=True,
        pretraining=lambda language: {},
        parallel=lambda first, second: [],
    )


@given(st.integers(0, 12), st.integers(0, 12), st.integers(0, 5))
def test_unlabelled_examples_are_chosen_by_seed_and_never_labelled(n, m, seed):
    n, m = sorted((n, m))
    train = examples(10, 10)
    labelled = train[:8]
    task = in_memory(train, examples(15))
    few, many = (tasks.unlabelled_examples(task, "train_rest", k, seed, labelled) for k in (n or 1, m or 1))
    assert len(many) == (m or 1) and set(few) <= set(many)
    assert all(example.label == -1 for example in many)
    assert not {example.id for example in many} & {example.id for example in labelled}
    assert tasks.unlabelled_examples(task, "train_rest", m or 1, seed, labelled) == many
    rest = tasks.unlabelled_examples(task, "train_rest", 0, seed, labelled)
    assert rest == tasks.without_labels(train[8:])
    assert tasks.unlabelled_examples(task, "split", 0, seed, []) == tasks.without_labels(examples(15))
    assert tasks.unlabelled_examples(task, "none", 0, seed, []) == []


def test_unlabelled_examples_beyond_what_there_is():
    task = in_memory(examples(3, 3), examples(5))
    with pytest.raises(UserError, match="task.unlabelled 6 is more than there is: 5; 0 takes all"):
        tasks.unlabelled_examples(task, "split", 6, 0, [])
    with pytest.raises(ValueError, match="unlabelled kind 'rest'"):
        tasks.unlabelled_examples(task, "rest", 0, 0, [])
    assert {e.id for e in tasks.unlabelled_examples(task, "split", 3, 0, [])} != {
        e.id for e in tasks.unlabelled_examples(task, "split", 3, 1, [])
    }


def test_files_task(config: Config):
    task = tasks.get_task(config())
    assert task == replace(
        task, name="files", labels=("bad", "good"), source_language="en", target_languages=("de", "fr")
    )
    assert task.load("train", "en") == [
        Example("files/train/en/0", "nice", None, 1, "en"),
        Example("files/train/en/1", "poor", None, 0, "en"),
        Example("files/train/en/2", "great", None, 1, "en"),
    ]
    assert [e.label for e in task.load("unlabelled", "en")] == [-1, -1]
    assert [e.id for e in task.load("test", "de")] == ["files/test/de/0", "files/test/de/1"]
    assert not task.synthetic


def test_files_task_reads_the_named_columns(config: Config, tmp_path: Path):
    for language in ("en", "de"):
        for split in ("train", "dev", "test"):
            write(tmp_path, language, split, "a7\tone\ttwo\tyes", "a8\tx\ty\tno", header="uid\tp\th\tgold")
    names = {"text_column": "p", "pair_column": "h", "label_column": "gold", "id_column": "uid"}
    task = tasks.get_task(config(target_languages=("de",), labels=("yes", "no"), **names))
    assert task.target_languages == ("de",)
    assert task.load("dev", "de")[0] == Example("files/dev/de/a7", "one", "two", 0, "de")


def test_files_by_pattern(config: Config, tmp_path: Path):
    for language in ("en", "pt-BR"):
        for split in ("train", "dev", "test"):
            (tmp_path / f"[x]-{language}.{split}.{language}.csv").write_text("text,label\na,u\nb,v\n")
    task = tasks.get_task(config(path="./[x]-{language}.{split}.{language}.csv"))
    assert task.target_languages == ("pt-BR",) and len(task.load("test", "pt-BR")) == 2


def test_files_that_are_missing(config: Config, tmp_path: Path):
    with pytest.raises(UserError, match="task.target_languages: no data of 'ger'; there is de, en, fr"):
        tasks.get_task(config(target_languages=("ger",)))
    with pytest.raises(UserError, match="task.source_language: no data of 'eng'; .*did you mean 'en'"):
        tasks.get_task(config(source_language="eng"))
    with pytest.raises(UserError, match=r"en/unlabelled\.tsv: no such file; .*'train_rest'"):
        (tmp_path / "en" / "unlabelled.tsv").unlink()
        tasks.get_task(config()).load("unlabelled", "en")
    with pytest.raises(
        UserError, match=r"/de/dev\.tsv: no such file; task\.path says that split 'dev' of 'de' is there"
    ):
        tasks.get_task(config()).load("dev", "de")
    with pytest.raises(UserError, match=r"en/dev\.tsv: no such file; .* split 'dev' of 'en'"):
        (tmp_path / "en" / "dev.tsv").unlink()
        tasks.get_task(config())
    with pytest.raises(UserError, match="no file of split 'test' is so named below"):
        tasks.get_task(config(path="{language}-{split}.tsv"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"name": "minireview"}, "task.name 'minireview' is not one of minireviews, files; did you mean 'minireviews'"),
        ({"data_dir": ""}, "task.data_dir is empty"),
        ({"data_dir": "/nowhere/at/all"}, "task.data_dir /nowhere/at/all: no such directory"),
        ({"path": "{language}.tsv"}, "expected {language} and {split}"),
        ({"path": "{lang}/{split}.tsv"}, "expected {language} and {split}"),
        ({"path": "/data/{language}/{split}.tsv"}, "expected a path below task.data_dir"),
        ({"path": "../{language}/{split}.tsv"}, "expected a path below task.data_dir"),
        ({"target_languages": ("de", "en")}, "each once, and not the source language en"),
        ({"target_languages": ("de", "de")}, "each once"),
        ({"labels": ("good",)}, "task.labels 'good': expected two or more different names"),
        ({"labels": ("good", "bad", "good")}, "expected two or more different names"),
        ({"label_column": "lable"}, "no column 'lable' among 'text', 'label'; did you mean 'label'"),
    ],
)
def test_bad_settings(config: Config, changes: dict, message: str):
    with pytest.raises(UserError) as caught:
        tasks.get_task(config(**changes))
    assert message in str(caught.value)


def test_unknown_labels_name_the_line_and_the_allowed_ones(config: Config, tmp_path: Path):
    write(tmp_path, "de", "test", "gut\tgood", "schlecht\tbadd")
    with pytest.raises(UserError, match=r"de/test\.tsv:3: label 'badd' is not one of bad, good; did you mean 'bad'"):
        tasks.get_task(config()).load("test", "de")
    with pytest.raises(UserError, match=r"en/train\.tsv:3: label 'bad' is not one of good, awful"):
        tasks.get_task(config(labels=("good", "awful"))).load("train", "en")


def test_requests_beyond_the_task(config: Config):
    task = tasks.get_task(config(target_languages=("de",)))
    with pytest.raises(UserError, match="no language 'fr' here; there is en, de"):
        task.load("test", "fr")
    with pytest.raises(ValueError, match="split 'validation' is not one of"):
        task.load("validation", "en")


def test_skipped_rows_are_counted(config: Config, tmp_path: Path, caplog):
    write(tmp_path, "de", "test", "gut\tgood", " \tbad", "\tbad")
    with pytest.raises(UserError, match=r"de/test\.tsv:3: column 'text' is empty"):
        tasks.get_task(config()).load("test", "de")
    with caplog.at_level(logging.WARNING):
        assert len(tasks.get_task(config(empty_text="skip")).load("test", "de")) == 1
    assert "2 rows without text were skipped" in caplog.text and "test.tsv" in caplog.text


def test_files_fingerprint_is_of_bytes_and_columns(config: Config, tmp_path: Path):
    def fingerprint(**changes) -> str:
        return tasks.get_task(config(**changes)).fingerprint()

    before = fingerprint()
    assert fingerprint() == before and fingerprint(labels=("bad", "good")) == before
    assert len({before, fingerprint(labels=("good", "bad")), fingerprint(target_languages=("de",))}) == 3
    write(tmp_path, "de", "dev", "gut\tgood")
    with_dev = fingerprint()
    (tmp_path / "en" / "unlabelled.tsv").write_text("text\nanother\n")
    assert len({before, with_dev, fingerprint()}) == 3
    write(tmp_path, "es", "dev", "bien\tgood")
    assert fingerprint(target_languages=("de", "fr")) == fingerprint(), "es has no test file, so it is no target"


@pytest.fixture
def builder(monkeypatch: pytest.MonkeyPatch) -> list[tuple]:
    """Stands for the builder; returns its calls."""
    calls: list[tuple] = []
    rows = [{"id": "7", "text": "fine", "label": 1, "domain": "dvd"}, {"id": "8", "text": "dull", "label": 0}]
    monkeypatch.setattr(minireviews, "prepare", lambda *call: calls.append(("prepare", *call)))
    monkeypatch.setattr(minireviews, "read", lambda *call: calls.append(("read", *call)) or rows)
    monkeypatch.setattr(minireviews, "fingerprint", lambda: "v1")
    return calls


def test_minireviews(builder: list[tuple], tmp_path: Path):
    task = tasks.get_task(TaskConfig(cache_dir=str(tmp_path)))
    assert (task.name, task.labels, task.source_language) == ("minireviews", ("negative", "positive"), "en")
    assert task.target_languages == ("de", "fr", "ja") and task.fingerprint() == "v1"
    assert task.synthetic
    assert task.load("test", "ja")[0] == Example("minireviews/test/ja/7", "fine", None, 1, "ja")
    assert builder == [("prepare", "ja", tmp_path), ("read", "ja", "test", tmp_path)]
    assert [e.label for e in task.load("unlabelled", "en")] == [-1, -1]


def test_minireviews_in_other_languages(builder: list[tuple]):
    task = tasks.get_task(TaskConfig(source_language="de", target_languages=("ja",)))
    assert (task.source_language, task.target_languages) == ("de", ("ja",))
    with pytest.raises(UserError, match="no language 'fr' here"):
        task.load("test", "fr")
    with pytest.raises(UserError, match="task.target_languages: no data of 'jp'; there is en, de, fr, ja"):
        tasks.get_task(TaskConfig(target_languages=("jp",)))
    assert builder == []


def test_an_unwritable_cache_is_named(tmp_path: Path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=f"{tmp_path}/file"):
        tasks.get_task(TaskConfig(cache_dir=str(tmp_path / "file"))).load("train", "en")
