"""Translations: a file in each format, what it refuses, and those that a task has of its own."""

import dataclasses
import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from xtransfer.config import TaskConfig
from xtransfer.data import blank, parallel
from xtransfer.data.corpora.minireviews import generator
from xtransfer.data.registry import load_task
from xtransfer.data.sampling import sampled_pairs
from xtransfer.data.task import Example, Pairs, Task
from xtransfer.errors import UserError

ROWS = [
    {"text": "a fine film", "translation": "ein feiner Film", "language": "de"},
    {"text": "a bad film", "translation": "un mauvais film", "language": "fr"},
    {"text": "good", "translation": "gut", "language": "de"},
]


def any_task(sources=("en",), targets=("de", "fr"), *, has_pairs=False, **functions) -> Task:
    """Return a task without any files."""
    second = "another" if has_pairs else None
    return Task(
        name="any",
        labels=("bad", "good"),
        source_language=sources[0],
        target_languages=targets,
        load=lambda split, language: [Example(f"any/{split}/{language}/0", "text", second, 0, language)],
        fingerprint=lambda: "data",
        synthetic=False,
        pretraining=lambda language: {},
        parallel=functions.get("parallel", lambda first, second: []),
        other_sources=sources[1:],
    )


def read(path, task=None, sources=("en",), **settings):
    """Return (id, text) of the original and of the translation of each pair, by language."""
    task, config = task or any_task(), TaskConfig(parallel_file=str(path), **settings)
    loaded = parallel.with_file(task, config, sources)
    result = {}
    for language in task.target_languages:
        pairs = parallel.pairs(loaded, language)
        assert all(translation.language == language for translation in pairs.translations)
        assert all(example.classes is None for example in (*pairs.originals, *pairs.translations))
        both = zip(pairs.originals, pairs.translations, strict=True)
        result[language] = [(original.id, original.text, translation.text) for original, translation in both]
    return result


def written(path, rows=tuple(ROWS)):
    """Write rows in the format of the ending, and return the path."""
    separator = {".tsv": "\t", ".csv": ","}.get(path.suffix)
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(list(rows)), path)
    elif path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    else:
        lines = [separator.join(rows[0]), *(separator.join(row.values()) for row in rows)]
        path.write_text("\n".join(lines) + "\n")
    return path


@pytest.mark.parametrize("ending", ["tsv", "csv", "jsonl", "parquet"])
def test_a_file_is_read_by_the_language_of_the_translation(tmp_path, ending):
    assert read(written(tmp_path / f"pairs.{ending}")) == {
        "de": [("any/parallel/en/0", "a fine film", "ein feiner Film"), ("any/parallel/en/2", "good", "gut")],
        "fr": [("any/parallel/en/1", "a bad film", "un mauvais film")],
    }


_TEXT = st.text(max_size=8)
_SOME_TEXT = _TEXT.filter(lambda text: not blank.is_empty(text))


@given(st.lists(st.tuples(_SOME_TEXT, _SOME_TEXT, st.sampled_from(["de", "fr"])), min_size=1, max_size=6))
def test_every_pair_comes_back_in_order(tmp_path_factory, rows):
    ends = [("x", "y", "de"), ("x", "y", "fr")]  # each language has a pair
    path = tmp_path_factory.mktemp("pairs") / "pairs.jsonl"
    keys = ("text", "translation", "language")
    path.write_text("".join(json.dumps(dict(zip(keys, row, strict=True))) + "\n" for row in [*rows, *ends]))
    expected = {"de": [], "fr": []}
    for number, (text, translation, language) in enumerate([*rows, *ends]):
        expected[language].append((f"any/parallel/en/{number}", text, translation))
    assert read(path) == expected


@given(st.lists(st.tuples(_TEXT, _TEXT), max_size=6))
def test_a_pair_without_one_of_its_texts_is_skipped_as_a_whole(tmp_path_factory, rows):
    path = tmp_path_factory.mktemp("pairs") / "pairs.jsonl"
    rows = [*rows, ("x", "y")]
    path.write_text(
        "".join(json.dumps({"text": text, "translation": other, "language": "de"}) + "\n" for text, other in rows)
    )
    kept = [
        (f"any/parallel/en/{number}", text, other)
        for number, (text, other) in enumerate(rows)
        if not blank.is_empty(text) and not blank.is_empty(other)
    ]
    assert read(path, any_task(targets=("de",)), empty_text="skip") == {"de": kept}


def test_the_number_of_skipped_pairs_is_logged_once(tmp_path, caplog):
    empty = {"text": "", "translation": "", "language": "de"}
    rows = [*ROWS, empty, empty | {"text": "x"}, empty | {"translation": "x"}]
    assert len(read(written(tmp_path / "pairs.jsonl", rows), empty_text="skip")["de"]) == 2
    assert [record.getMessage().partition(": ")[2] for record in caplog.records] == [
        "3 pairs with an empty text were skipped"
    ]


def test_a_task_on_pairs_of_texts_reads_four_texts(tmp_path):
    rows = [row | {"text_pair": f"{row['text']} 2", "translation_pair": f"{row['translation']} 2"} for row in ROWS]
    config = TaskConfig(parallel_file=str(written(tmp_path / "pairs.tsv", rows)))
    pairs = parallel.pairs(parallel.with_file(any_task(has_pairs=True), config, ("en",)), "fr")
    original, translation = pairs.originals[0], pairs.translations[0]
    assert (original.text, original.text_pair) == ("a bad film", "a bad film 2")
    assert (translation.text, translation.text_pair) == ("un mauvais film", "un mauvais film 2")
    with pytest.raises(UserError, match=r"pairs\.csv:2: no column 'text_pair' among 'text', 'translation', 'language'"):
        read(written(tmp_path / "pairs.csv"), any_task(has_pairs=True))


def test_several_source_languages_need_the_one_of_each_original(tmp_path):
    sources = ("en", "es")
    rows = [row | {"text_language": language} for row, language in zip(ROWS, ("en", "es", "es"), strict=True)]
    path = written(tmp_path / "pairs.jsonl", rows)
    ids = {language: [id_ for id_, _, _ in pairs] for language, pairs in read(path, any_task(sources), sources).items()}
    assert ids == {"de": ["any/parallel/en/0", "any/parallel/es/2"], "fr": ["any/parallel/es/1"]}
    with pytest.raises(UserError, match=r"pairs\.csv:2: no column 'text_language' among"):
        read(written(tmp_path / "pairs.csv"), any_task(sources), sources)
    rows[1]["text_language"] = "pt"
    with pytest.raises(UserError, match=r"jsonl:2: column 'text_language' is 'pt', which is no source language \(en, "):
        read(written(path, rows), any_task(sources), sources)


def test_names_of_languages_that_look_alike_may_be_merged(tmp_path):
    path = written(tmp_path / "pairs.jsonl", [ROWS[0] | {"language": "DE "}])
    with pytest.raises(UserError, match=r"pairs\.jsonl:1: column 'language' is 'DE ', which is no target language"):
        read(path, any_task(targets=("de",)))
    assert len(read(path, any_task(targets=("de",)), merge_names=True)["de"]) == 1


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"language": "es"}, r":4: column 'language' is 'es', which is no target language \(de, fr\): correct it, or"),
        ({"translation": " "}, r":4: column 'translation' is empty; fill it in, or set task\.empty_text to 'skip'"),
        ({"text": ""}, r":4: column 'text' is empty"),
        ({"translation": None}, r":4: column 'translation' is empty"),
        ({"translation": 3}, r":4: column 'translation' is a number, expected text"),
        ({"language": ""}, r":4: column 'language' is empty"),
    ],
)
def test_a_malformed_row_is_named(tmp_path, row, message):
    path = written(tmp_path / "pairs.jsonl", [*ROWS, ROWS[0] | row])
    with pytest.raises(UserError, match=message) as caught:
        read(path)
    assert "\n" not in str(caught.value) and str(caught.value).startswith(str(path))


@pytest.mark.parametrize("missing", ["text", "translation", "language"])
def test_a_missing_column_is_named(tmp_path, missing):
    rows = [{key: value for key, value in row.items() if key != missing} for row in ROWS]
    with pytest.raises(UserError, match=rf"pairs\.tsv:2: no column '{missing}' among"):
        read(written(tmp_path / "pairs.tsv", rows))
    with pytest.raises(UserError, match=rf"pairs\.parquet.*no column '{missing}'"):
        read(written(tmp_path / "pairs.parquet", rows))


def test_a_missing_file_and_a_language_without_pairs_are_named(tmp_path):
    with pytest.raises(UserError, match=r"task\.parallel_file .*pairs\.tsv: no such file"):
        read(tmp_path / "pairs.tsv")
    path = written(tmp_path / "pairs.tsv", ROWS[:1])
    with pytest.raises(
        UserError, match=r"pairs\.tsv: no row with text whose column 'language' is 'fr': add some, or leave fr out"
    ):
        read(path)
    with pytest.raises(UserError, match=r"task 'any' has no translations from en into 'de': name a file of them in ta"):
        parallel.pairs(any_task(), "de")


def test_the_fingerprint_covers_the_file(tmp_path):
    path = written(tmp_path / "pairs.tsv")
    config = TaskConfig(parallel_file=str(path))
    first = parallel.with_file(any_task(), config, ("en",)).fingerprint()
    assert first == parallel.with_file(any_task(), config, ("en",)).fingerprint() != "data"
    skipping = dataclasses.replace(config, empty_text="skip")
    assert parallel.with_file(any_task(), skipping, ("en",)).fingerprint() != first
    written(path, ROWS[:2])
    assert parallel.with_file(any_task(), config, ("en",)).fingerprint() != first


def test_a_task_may_have_translations_of_its_own():
    def own(first, second):
        return [(f"{first} 0", f"{second} 0"), (f"{first} 1", f"{second} 1")]

    pairs = parallel.pairs(any_task(("en", "es"), parallel=own), "de")
    both = zip(pairs.originals, pairs.translations, strict=True)
    assert [(original.id, other.id, original.text, other.text) for original, other in both] == [
        ("any/parallel/en/en-de-0", "any/parallel/de/en-de-0", "en 0", "de 0"),
        ("any/parallel/en/en-de-1", "any/parallel/de/en-de-1", "en 1", "de 1"),
        ("any/parallel/es/es-de-0", "any/parallel/de/es-de-0", "es 0", "de 0"),
        ("any/parallel/es/es-de-1", "any/parallel/de/es-de-1", "es 1", "de 1"),
    ]


def test_the_synthetic_reviews_have_translations_in_both_directions(tmp_path, monkeypatch):
    monkeypatch.setattr(generator.parallel, "__defaults__", (20,))
    expected = list(generator.parallel("de-fr", 20))
    loaded = load_task(TaskConfig(source_language="fr", target_languages=("de",), cache_dir=str(tmp_path)))
    pairs = parallel.pairs(loaded, "de")
    both = zip(pairs.translations, pairs.originals, strict=True)
    assert [(translation.text, original.text) for translation, original in both] == expected
    assert {original.language for original in pairs.originals} == {"fr"}


def test_samples_are_nested_and_keep_their_order():
    pairs = Pairs(*([Example(f"{name}{i}", "text", None, -1, name) for i in range(9)] for name in ("en", "de")))
    small, large, everything = (sampled_pairs(pairs, n, 5, "de") for n in (3, 6, 0))
    numbers = [[example.id[2:] for example in sample.originals] for sample in (small, large, everything)]
    assert numbers == [[example.id[2:] for example in sample.translations] for sample in (small, large, everything)]
    assert list(map(len, numbers)) == [3, 6, 9] and set(numbers[0]) < set(numbers[1])
    assert all(sample == sorted(sample) for sample in numbers)
    with pytest.raises(UserError, match=r"task\.parallel 10 is more than available in de: 9; 0 takes all"):
        sampled_pairs(pairs, 10, 5, "de")
