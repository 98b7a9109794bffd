"""Text for pretraining: where a text is cut, and what a task gives."""

import pytest

from tests.helpers import tiny
from xtransfer.config import TaskConfig
from xtransfer.data import registry
from xtransfer.data.corpora import minireviews
from xtransfer.pretrain import text as corpora


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("One. Two two. Three three three three.", ("One. Two two.", "Three three three three.")),
        ("短い文です。もう少し長い文が続きます。終わり。", ("短い文です。", "もう少し長い文が続きます。終わり。")),
        ("no sentence end at all", ("no sentence", "end at all")),
        ("漢字だけの文", ("漢字だ", "けの文")),
        ('She said "well." Then she left.', ('She said "well."', "Then she left.")),
    ],
)
def test_halves(text, wanted):
    assert corpora.halves(text) == wanted


def test_other_tasks_give_their_unlabelled_text_and_no_pairs(tmp_path):
    data = tiny.write_task(tmp_path)
    (data / "en" / "unlabelled.tsv").write_text("text\nthe film\nis good\n")
    task = TaskConfig(name="files", data_dir=str(data), source_language="en")
    assert corpora.texts(task, ["en"]) == {"en": ["the film", "is good"]}
    assert corpora.pairs(task, ["en", "de"]) == {}


def test_groups_and_texts_stand_in_the_order_of_the_data(monkeypatch, tmp_path):
    """Pretraining draws by position, so another order would be other checkpoints."""
    rows = {
        ("fr-pretraining", "pretraining"): [("music", "un"), ("books", "deux"), ("music", "trois")],
        ("en-pretraining", "pretraining"): [("dvd", "one"), ("books", "two")],
    }
    domains = {key: [{"domain": d, "text": t} for d, t in found] for key, found in rows.items()}
    pairs = {("fr-en", "parallel"): [{"text": "un", "text_pair": "one"}, {"text": "deux", "text_pair": "two"}]}
    prepared = []
    monkeypatch.setattr(minireviews, "prepare", lambda name, directory: prepared.append((name, directory)))
    monkeypatch.setattr(minireviews, "read", lambda name, split, directory: (domains | pairs)[name, split])
    task = TaskConfig(cache_dir=str(tmp_path))
    assert list(corpora.texts(task, ["fr", "en"]).items()) == [
        ("fr/music", ["un", "trois"]),
        ("fr/books", ["deux"]),
        ("en/dvd", ["one"]),
        ("en/books", ["two"]),
    ]
    assert corpora.pairs(task, ["fr", "en"]) == {"fr-en": [("un", "one"), ("deux", "two")]}
    assert corpora.pairs(task, ["fr"]) == {}
    assert prepared == [(name, tmp_path) for name in ("fr-pretraining", "en-pretraining", "fr-en")]


def test_any_task_of_the_registry_can_give_text(monkeypatch):
    """No module but the task's own knows its name."""

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
    assert corpora.texts(task, ["de"]) == {"de/x": ["text"], "de/y": []}
    assert corpora.pairs(task, ["en", "de", "fr"]) == {"en-fr": [("en", "fr")], "de-fr": [("de", "fr")]}
