"""Text for pretraining: how a text is split into halves, and which text a task has."""

import pytest

from tests.helpers import tiny
from xtransfer.config import TaskConfig
from xtransfer.data import registry
from xtransfer.data.corpora.minireviews import prepared
from xtransfer.pretrain.text import halves, pairs, texts


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("One. Two two. Three three three three.", ("One. Two two.", "Three three three three.")),
        ("短い文です。もう少し長い文が続きます。終わり。", ("短い文です。", "もう少し長い文が続きます。終わり。")),
        ("no sentence end at all", ("no sentence", "end at all")),
        ("漢字だけの文", ("漢字だ", "けの文")),
        ('She said "well." Then she left.', ('She said "well."', "Then she left.")),
    ],
)
def test_halves(text, expected):
    assert halves(text) == expected


def test_other_tasks_have_unlabelled_text_and_no_pairs(tmp_path):
    data = tiny.write_task(tmp_path)
    (data / "en" / "unlabelled.tsv").write_text("text\nthe film\nis good\n")
    task = TaskConfig(name="files", data_dir=str(data), source_language="en")
    assert texts(task, ["en"]) == {"en": ["the film", "is good"]}
    assert pairs(task, ["en", "de"]) == {}


def test_groups_and_texts_keep_the_order_of_the_data(monkeypatch, tmp_path):
    """Pretraining samples by position, so another order would give other checkpoints."""
    rows = {
        ("fr-pretraining", "pretraining"): [("music", "un"), ("books", "deux"), ("music", "trois")],
        ("en-pretraining", "pretraining"): [("dvd", "one"), ("books", "two")],
    }
    splits = {key: [{"domain": d, "text": t} for d, t in examples] for key, examples in rows.items()}
    splits |= {("en-fr", "parallel"): [{"text": "one", "text_pair": "un"}, {"text": "two", "text_pair": "deux"}]}
    calls = []
    monkeypatch.setattr(prepared, "prepare", lambda name, directory: calls.append((name, directory)))
    monkeypatch.setattr(prepared, "read", lambda name, split, directory: splits[name, split])
    task = TaskConfig(cache_dir=str(tmp_path))
    assert list(texts(task, ["fr", "en"]).items()) == [
        ("fr/music", ["un", "trois"]),
        ("fr/books", ["deux"]),
        ("en/dvd", ["one"]),
        ("en/books", ["two"]),
    ]
    assert pairs(task, ["fr", "en"]) == {"fr-en": [("un", "one"), ("deux", "two")]}
    assert pairs(task, ["fr"]) == {}
    assert calls == [(name, tmp_path) for name in ("fr-pretraining", "en-pretraining", "en-fr")]


def test_any_registered_task_can_have_text(monkeypatch):
    """Pretraining knows no task by its name."""

    def factory(config):
        return registry.Task(
            name="another",
            labels=("a", "b"),
            source_language="en",
            target_languages=(),
            load=lambda split, language: [],
            fingerprint=lambda: "",
            synthetic=False,
            pretraining=lambda language: {f"{language}/x": ["text"], f"{language}/y": []},
            parallel=lambda first, second: [(first, second)] if second == "fr" else [],
        )

    monkeypatch.setitem(registry.TASKS, "another", factory)
    task = TaskConfig(name="another")
    assert texts(task, ["de"]) == {"de/x": ["text"], "de/y": []}
    assert pairs(task, ["en", "de", "fr"]) == {"en-fr": [("en", "fr")], "de-fr": [("de", "fr")]}
