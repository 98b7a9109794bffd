"""The task `files` reads the files of a user as configured, and its errors name the file, line, and setting."""

import logging
import os
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from xtransfer.config import TaskConfig
from xtransfer.data import user_files
from xtransfer.data.task import Example
from xtransfer.errors import UserError

Config = Callable[..., TaskConfig]


def write_split(root: Path, language: str, split: str, *rows: str, header: str = "text\tlabel") -> None:
    folder = root / language
    folder.mkdir(exist_ok=True)
    (folder / f"{split}.tsv").write_text("\n".join([header, *rows]) + "\n")


@pytest.fixture
def config(tmp_path: Path) -> Config:
    """Write files for en, with unlabelled text, and for de and fr. Return a function that makes the config."""
    for split in ("train", "dev", "test"):
        write_split(tmp_path, "en", split, "nice\tgood", "poor\tbad", "great\tgood")
    write_split(tmp_path, "en", "unlabelled", "so so", "never mind", header="text")
    for language in ("de", "fr"):
        write_split(tmp_path, language, "test", "gut\tgood", "schlecht\tbad")

    def make(**changes) -> TaskConfig:
        return replace(TaskConfig(name="files", data_dir=str(tmp_path), source_language="en"), **changes)

    return make


def test_the_task_has_the_labels_languages_and_examples_of_the_files(config: Config):
    task = user_files.task(config())
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


def test_the_task_reads_the_configured_columns(config: Config, tmp_path: Path):
    for language in ("en", "de"):
        for split in ("train", "dev", "test"):
            write_split(tmp_path, language, split, "a7\tone\ttwo\tyes", "a8\tx\ty\tno", header="uid\tp\th\tgold")
    columns = {"text_column": "p", "pair_column": "h", "label_column": "gold", "id_column": "uid"}
    task = user_files.task(config(target_languages=("de",), labels=("yes", "no"), **columns))
    assert task.target_languages == ("de",)
    assert task.load("dev", "de")[0] == Example("files/dev/de/a7", "one", "two", 0, "de")


def test_the_path_pattern_may_contain_brackets_and_repeat_a_field(config: Config, tmp_path: Path):
    for language in ("en", "pt-BR"):
        for split in ("train", "dev", "test"):
            (tmp_path / f"[x]-{language}.{split}.{language}.csv").write_text("text,label\na,u\nb,v\n")
    task = user_files.task(config(path="./[x]-{language}.{split}.{language}.csv"))
    assert task.target_languages == ("pt-BR",) and len(task.load("test", "pt-BR")) == 2


def test_missing_files_and_languages_are_named(config: Config, tmp_path: Path):
    with pytest.raises(UserError, match="task.target_languages: no data in 'ger'; there are de, en, fr"):
        user_files.task(config(target_languages=("ger",)))
    with pytest.raises(UserError, match="task.source_language: no data in 'eng'; .*did you mean 'en'"):
        user_files.task(config(source_language="eng"))
    with pytest.raises(UserError, match=r"en/unlabelled\.tsv: no such file; .*'train_rest'"):
        (tmp_path / "en" / "unlabelled.tsv").unlink()
        user_files.task(config()).load("unlabelled", "en")
    with pytest.raises(UserError, match=r"/de/dev\.tsv: no such file; task\.path expects split 'dev' of 'de' there"):
        user_files.task(config()).load("dev", "de")
    with pytest.raises(UserError, match=r"en/train\.tsv: no such file; .* split 'train' of 'en'"):
        (tmp_path / "en" / "train.tsv").unlink()
        user_files.task(config())
    with pytest.raises(UserError, match="there is no such file for split 'test' below"):
        user_files.task(config(path="{language}-{split}.tsv"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data_dir": ""}, "task.data_dir is empty"),
        ({"data_dir": "/nowhere/at/all"}, "task.data_dir /nowhere/at/all: no such directory"),
        ({"path": "{language}.tsv"}, "expected {language} and {split}"),
        ({"path": "{split}.tsv"}, "if one file has all languages, name the column in task.language_column"),
        ({"language_column": "lang"}, "expected {split} in it and no other {}, because the languages are in task.lang"),
        ({"language_column": "lang", "path": "all.tsv"}, "expected {split} in it and no other {}"),
        ({"path": "{lang}/{split}.tsv"}, "expected {language} and {split}"),
        ({"path": "/data/{language}/{split}.tsv"}, "expected a path below task.data_dir"),
        ({"path": "../{language}/{split}.tsv"}, "expected a path below task.data_dir"),
        ({"target_languages": ("de", "en")}, "name each language once, and not the source language en"),
        ({"target_languages": ("de", "de")}, "name each language once"),
        ({"labels": ("good",)}, "task.labels 'good': expected two or more different names"),
        ({"labels": ("good", "bad", "good")}, "expected two or more different names"),
        ({"label_column": "lable"}, "no column 'lable' among 'text', 'label'; did you mean 'label'"),
    ],
)
def test_invalid_settings_are_errors(config: Config, changes: dict, message: str):
    with pytest.raises(UserError) as caught:
        user_files.task(config(**changes))
    assert message in str(caught.value)


def test_the_error_for_an_unknown_label_names_the_line_and_the_known_labels(config: Config, tmp_path: Path):
    write_split(tmp_path, "de", "test", "gut\tgood", "schlecht\tbadd")
    with pytest.raises(UserError, match=r"de/test\.tsv:3: label 'badd' is not one of bad, good; did you mean 'bad'"):
        user_files.task(config()).load("test", "de")
    with pytest.raises(UserError, match=r"en/train\.tsv:3: label 'bad' is not one of good, awful"):
        user_files.task(config(labels=("good", "awful"))).load("train", "en")


def test_loading_an_unknown_language_or_split_is_an_error(config: Config):
    task = user_files.task(config(target_languages=("de",)))
    with pytest.raises(UserError, match="was set up without language 'fr'; it has en, de"):
        task.load("test", "fr")
    with pytest.raises(ValueError, match="split 'validation' is not one of"):
        task.load("validation", "en")


def test_skipped_rows_are_counted(config: Config, tmp_path: Path, caplog):
    write_split(tmp_path, "de", "test", "gut\tgood", " \tbad", "\tbad", "\ufeff\u2060\tbad")
    with pytest.raises(UserError, match=r"de/test\.tsv:3: column 'text' is empty"):
        user_files.task(config()).load("test", "de")
    with caplog.at_level(logging.WARNING):
        assert len(user_files.task(config(empty_text="skip")).load("test", "de")) == 1
    assert "3 rows without text were skipped" in caplog.text and "test.tsv" in caplog.text


def test_the_fingerprint_covers_the_files_and_the_settings(config: Config, tmp_path: Path):
    def fingerprint(**changes) -> str:
        return user_files.task(config(**changes)).fingerprint()

    before = fingerprint()
    assert fingerprint() == before and fingerprint(labels=("bad", "good")) == before
    assert len({before, fingerprint(labels=("good", "bad")), fingerprint(target_languages=("de",))}) == 3
    write_split(tmp_path, "de", "dev", "gut\tgood")
    with_dev = fingerprint()
    (tmp_path / "en" / "unlabelled.tsv").write_text("text\nanother\n")
    assert len({before, with_dev, fingerprint()}) == 3
    assert fingerprint(target_languages=("de", "fr")) == fingerprint()


def test_dev_is_held_out_of_train_if_there_is_no_dev_file(config: Config, tmp_path: Path, caplog):
    write_split(tmp_path, "en", "train", *(f"text {i}\t{('good', 'bad')[i % 2]}" for i in range(40)))
    with_dev = user_files.task(config()).fingerprint()
    (tmp_path / "en" / "dev.tsv").unlink()
    with caplog.at_level(logging.WARNING):
        task = user_files.task(config())
    assert "no dev file for en: holding out a tenth of train" in caplog.text
    train, dev = task.load("train", "en"), task.load("dev", "en")
    assert Counter(e.label for e in dev) == {0: 2, 1: 2} and len(train) == 36
    assert {e.text for e in train} | {e.text for e in dev} == {f"text {i}" for i in range(40)}
    assert {e.id.split("/")[1] for e in dev} == {"dev"}
    larger = user_files.task(config(held_out_dev=10))
    assert len(larger.load("dev", "en")) == 10 and len(larger.load("train", "en")) == 30
    assert len({with_dev, task.fingerprint(), larger.fingerprint()}) == 3
    assert {e.text for e in user_files.task(config(held_out_seed=1)).load("dev", "en")} != {e.text for e in dev}
    assert len(user_files.task(config()).load("test", "de")) == 2


def task_with_unlabelled_file(config: TaskConfig):
    return user_files.with_unlabelled_file(user_files.task(config), config)


@pytest.mark.parametrize(
    ("name", "content"), [("u.tsv", "text\nnew\nmore\n"), ("u.csv", "text\nnew\nmore\n"), ("u.jsonl", "")]
)
def test_unlabelled_text_is_read_from_a_file(config: Config, tmp_path: Path, name: str, content: str):
    (tmp_path / name).write_text(content or '{"text": "new"}\n{"text": "more", "label": "whatever"}\n')
    settings = config(unlabelled_from="file", unlabelled_file=str(tmp_path / name))
    task = task_with_unlabelled_file(settings)
    assert task.load("unlabelled", "en") == [
        Example("files/unlabelled/en/0", "new", None, -1, "en"),
        Example("files/unlabelled/en/1", "more", None, -1, "en"),
    ]
    assert task.load("train", "en") == user_files.task(settings).load("train", "en")
    before = task.fingerprint()
    assert before != user_files.task(settings).fingerprint()
    (tmp_path / name).write_text(content or '{"text": "new"}\n')
    assert (task_with_unlabelled_file(settings).fingerprint() == before) == bool(content)


def test_an_unlabelled_file_that_does_not_match_the_task_is_an_error(config: Config, tmp_path: Path):
    settings = config(unlabelled_from="file", unlabelled_file=str(tmp_path / "u.tsv"))
    with pytest.raises(UserError, match=r"task.unlabelled_file .*u\.tsv: no such file"):
        task_with_unlabelled_file(settings)
    (tmp_path / "u.tsv").write_text("body\nnew\n")
    with pytest.raises(UserError, match=r"u\.tsv:2: no column 'text' among 'body'"):
        task_with_unlabelled_file(settings).load("unlabelled", "en")
    (tmp_path / "u.tsv").write_text("text\tother\na\tb\n")
    for language in ("en", "de", "fr"):
        for split in ("train", "dev", "test"):
            write_split(tmp_path, language, split, "a\tb\tgood", "c\td\tbad", header="text\tother\tlabel")
    pairs = replace(settings, pair_column="other")
    assert task_with_unlabelled_file(pairs).load("unlabelled", "en") == [
        Example("files/unlabelled/en/0", "a", "b", -1, "en")
    ]
    for task_settings, file_settings, advice in (
        (pairs, settings, "name the column"),
        (settings, pairs, "leave it empty"),
    ):
        task = user_files.with_unlabelled_file(user_files.task(task_settings), file_settings)
        with pytest.raises(UserError, match=f"task.pair_column .*u.tsv is read: .*{advice}"):
            task.load("unlabelled", "en")


def test_a_language_without_a_test_file_is_an_error(config: Config, tmp_path: Path):
    write_split(tmp_path, "es", "dev", "bien\tgood")
    with pytest.raises(UserError) as caught:
        user_files.task(config())
    assert str(caught.value).startswith(
        f"{tmp_path}/es/dev.tsv: 'es' has dev, but no test: add it to {tmp_path}/es/test.tsv, or list the "
        "languages that you mean in task.target_languages"
    )
    assert user_files.task(config(target_languages=("de", "fr"))).target_languages == ("de", "fr")
    with pytest.raises(UserError, match=r"es/dev\.tsv: 'es' has dev, but no test: add it to .*/es/test\.tsv"):
        user_files.task(config(target_languages=("de", "es")))
    (tmp_path / "es" / "dev.tsv").unlink()
    (tmp_path / "en" / "test.tsv").unlink()
    with pytest.raises(UserError, match=r"en/train\.tsv: 'en' has train, but no test: add it to .*/en/test\.tsv"):
        user_files.task(config(target_languages=("de",)))


@pytest.mark.parametrize(
    ("counts", "rare"),
    [
        ({"bad": 2, "god": 1, "good": 2}, "'god'"),
        ({"bad": 150, "god": 2, "good": 200, "goood": 1}, "'god', 'goood'"),
        ({"bad": 150, "god": 3, "good": 200}, ""),
        ({"bad": 2, "good": 2}, ""),
    ],
)
def test_a_rare_class_gives_a_warning(config: Config, tmp_path: Path, caplog, counts: dict[str, int], rare: str):
    write_split(tmp_path, "en", "train", *(f"text\t{name}" for name, count in counts.items() for _ in range(count)))
    with caplog.at_level(logging.WARNING):
        assert user_files.task(config()).labels == tuple(counts)
    class_counts = ", ".join(f"{name} {count}" for name, count in counts.items())
    warning = f"train.tsv: is {rare} misspelt? Without task.labels, the classes are: {class_counts}"
    assert [m.rpartition("/")[2] for m in caplog.messages] == ([warning] if rare else [])
    caplog.clear()
    user_files.task(config(labels=tuple(counts)))
    assert caplog.messages == []


def test_a_label_that_does_not_occur_in_train_is_an_error(config: Config, tmp_path: Path):
    write_split(tmp_path, "en", "dev", "a\tgood", "b\tgod")
    with pytest.raises(UserError, match=r"en/dev\.tsv:3: label 'god' is not one of bad, good; did you mean 'good'"):
        user_files.task(config()).load("dev", "en")


def test_a_class_without_training_examples_is_an_error(config: Config, tmp_path: Path):
    task = user_files.task(config(labels=("good", "so-so", "bad", "dull")))
    with pytest.raises(UserError, match=r"en/train\.tsv: no example of 'so-so', 'dull' in task\.labels; add some, or"):
        task.load("train", "en")
    assert len(task.load("test", "de")) == 2


def test_a_held_out_dev_split_leaves_every_class_in_train(config: Config, tmp_path: Path):
    rows = [*(f"text {i}\ta" for i in range(100)), *(f"text\tclass {i}" for i in range(20))]
    write_split(tmp_path, "en", "train", *rows)
    (tmp_path / "en" / "dev.tsv").unlink()
    task = user_files.task(config())
    assert Counter(e.label for e in task.load("train", "en")) == {0: 88, **dict.fromkeys(range(1, 21), 1)}
    assert Counter(e.label for e in task.load("dev", "en")) == {0: 12}


def test_impossible_paths_and_columns_are_one_line_errors(tmp_path):
    with pytest.raises(UserError, match="task.data_dir ~nosuchuser/d: no such directory"):
        user_files.task(TaskConfig(name="files", data_dir="~nosuchuser/d"))
    with pytest.raises(UserError, match="task.label_column is empty: name the column of the labels"):
        user_files.task(TaskConfig(name="files", data_dir=str(tmp_path), label_column=""))
    folder = os.fsencode(tmp_path) + b"/\xff\xfe"
    os.makedirs(folder)
    with open(folder + b"/test.tsv", "w") as file:
        file.write("text\tlabel\na\tb\n")
    with pytest.raises(UserError, match="the name of a language: .* cannot be printed: rename it"):
        user_files.task(TaskConfig(name="files", data_dir=str(tmp_path)))


def test_hidden_folders_are_not_languages(config: Config, tmp_path: Path):
    write_split(tmp_path, ".ipynb_checkpoints", "test", "x\tgood")
    assert user_files.task(config()).target_languages == ("de", "fr")
    with pytest.raises(UserError, match="no data in '.ipynb_checkpoints'"):
        user_files.task(config(target_languages=(".ipynb_checkpoints",)))


def test_a_task_without_a_target_language_is_an_error(config: Config, tmp_path: Path):
    for language in ("de", "fr"):
        (tmp_path / language / "test.tsv").unlink()
    with pytest.raises(UserError, match="task.target_languages: there is no language but en, so nothing to transfer"):
        user_files.task(config())


LOOK_ALIKES = [("good", "good "), ("caf\u00e9", "cafe\u0301"), ("Yes", "yes")]


@pytest.mark.parametrize(("first", "second"), LOOK_ALIKES)
def test_labels_that_look_alike_are_an_error_unless_they_are_merged(config: Config, tmp_path: Path, first, second):
    write_split(tmp_path, "en", "train", f"a\t{first}", f"b\t{first}", "c\tzzz", f"d\t{second}")
    with pytest.raises(UserError) as caught:
        user_files.task(config())
    message = str(caught.value)
    assert "train.tsv:5: labels: " in message and "set task.merge_names to True" in message
    for name in (first, second):
        assert " ".join(f"U+{ord(character):04X}" for character in name) in message
    for split in ("dev", "test"):
        write_split(tmp_path, "en", split, f"a\t{second}", "c\tzzz")
    task = user_files.task(config(merge_names=True, target_languages=("de",)))
    assert task.labels == (first, "zzz")
    assert [example.label for example in task.load("train", "en")] == [0, 0, 1, 0]
    assert [example.label for example in task.load("test", "en")] == [0, 1]
    with pytest.raises(UserError, match="task.labels: .* look alike: name each class once"):
        user_files.task(config(labels=(first, second)))


def test_a_label_that_looks_like_a_known_one_shows_the_code_points(config: Config, tmp_path: Path):
    write_split(tmp_path, "de", "test", "gut\tGood", "schlecht\tbad")
    with pytest.raises(UserError, match=r"de/test\.tsv:2: label 'Good' is not one of .*'good' \(U\+0067 .*U\+0047 "):
        user_files.task(config()).load("test", "de")


def test_folders_of_languages_that_look_alike_are_an_error(config: Config, tmp_path: Path):
    write_split(tmp_path, "DE", "test", "gut\tgood")
    for merge in (False, True):
        with pytest.raises(UserError, match=r"'DE' \(U\+0044 U\+0045\) .*'de' .* look alike: rename one of them"):
            user_files.task(config(merge_names=merge))


def test_integer_labels_are_ordered_by_their_numbers(config: Config, tmp_path: Path):
    for split in ("train", "dev"):
        write_split(tmp_path, "en", split, *(f"text {i}\t{i}" for i in (*range(12), -1)))
    assert user_files.task(config()).labels == ("-1", *map(str, range(12)))
    write_split(tmp_path, "en", "train", *(f"text {i}\t{i}" for i in (2, 10, "x")))
    assert user_files.task(config()).labels == ("10", "2", "x")


def test_an_id_with_a_line_separator_is_an_error(config: Config, tmp_path: Path):
    for language in ("en", "de", "fr"):
        for split in ("train", "dev", "test"):
            write_split(tmp_path, language, split, "1\ta\tgood", "2\u2028\tb\tbad", header="id\ttext\tlabel")
    with pytest.raises(UserError, match=r"en/train\.tsv:3: column 'id' is '2\\u2028', which has a line separator"):
        user_files.task(config(id_column="id"))


@pytest.mark.parametrize(("name", "character"), [("semicolon", ";"), ("tab", "\t"), ("bar", "|")])
def test_another_delimiter_is_named_and_can_be_set(config: Config, tmp_path: Path, name: str, character: str):
    for language in ("en", "de", "fr"):
        for split in ("train", "dev", "test"):
            rows = [f"text{character}label", f'"Yes, a{character}b"{character}good', f"no{character}bad"]
            (tmp_path / language / f"{split}.csv").write_text("\n".join(rows) + "\n")
    expected = f"train.csv:1: the columns are separated by {character!r} ({name}), not by ',': save the file with ',', "
    with pytest.raises(UserError) as caught:
        user_files.task(config(path="{language}/{split}.csv"))
    assert f"{expected}or set task.delimiter to {name!r}" in str(caught.value)
    task = user_files.task(config(path="{language}/{split}.csv", delimiter=name))
    assert [example.text for example in task.load("test", "de")] == [f"Yes, a{character}b", "no"]
    assert task.fingerprint()
    with pytest.raises(UserError, match=r"task.delimiter is '.*', but .* is neither"):
        user_files.task(config(path="{language}/{split}.jsonl", delimiter=name))


def test_a_quoted_tsv_is_named(config: Config, tmp_path: Path):
    write_split(tmp_path, "en", "train", '"a"\t"good"', '"b"\t"bad"', header='"text"\t"label"')
    with pytest.raises(UserError, match=r"train.tsv:1: the columns are in quotes.* as \.csv and set .*to 'tab'"):
        user_files.task(config())
