"""Text for pretraining: where a text is cut, and what a task gives."""

import pytest

from tests import tiny
from xtransfer.config import TaskConfig
from xtransfer.data import corpora


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
