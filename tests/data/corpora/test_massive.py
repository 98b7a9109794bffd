"""MASSIVE has one file per locale with all partitions, and names its intents and scenarios."""

import io
import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.helpers import archive_writers
from xtransfer.config import TaskConfig
from xtransfer.data.corpora import loader, massive
from xtransfer.data.corpora.corpus import CorpusRow
from xtransfer.data.task import Example
from xtransfer.errors import UserError

INTENT, SCENARIO = massive.CORPORA
Line = tuple[str, str, str, str]  # id, partition, intent, utterance


def jsonl(locale: str, *lines: Line) -> str:
    """Return lines as in the release. Lines of en-US have no judgments."""
    rows = []
    for number, partition, intent, text in lines:
        scenario = intent.partition("_")[0]
        row: dict = {"id": number, "locale": locale, "partition": partition, "scenario": scenario, "intent": intent}
        row |= {"utt": text, "annot_utt": text, "worker_id": "1"}
        if locale != "en-US":
            row |= {"slot_method": [], "judgments": [{"worker_id": "32", "intent_score": 1, "slots_score": 0}]}
        rows.append(json.dumps(row, ensure_ascii=False) + "\n")
    return "".join(rows)


ENGLISH = jsonl(
    "en-US",
    ("1", "train", "alarm_set", "wake me at six"),
    ("2", "dev", "play_music", "play something calm"),
    ("4", "test", "alarm_query", "when do i get up"),
    ("3", "train", "iot_hue_lightoff", "lights off"),
)
JAPANESE = jsonl(
    "ja-JP",
    ("1", "train", "alarm_set", "六時に起こして"),
    ("2", "dev", "play_music", "静かな曲をかけて"),
    ("4", "test", "alarm_query", "何時に起きるの\u2028ですか"),
)


def parse(content: str | bytes, split: str = "train", label: str = "intent", locale: str = "en-US") -> list[CorpusRow]:
    return list(
        massive.parse(io.BytesIO(archive_writers.encoded(content)), "1.0/data/en-US.jsonl", locale, split, label)
    )


def test_each_split_contains_its_partition():
    assert parse(ENGLISH) == [
        CorpusRow("1", "wake me at six", None, "alarm_set", "1.0/data/en-US.jsonl:1"),
        CorpusRow("3", "lights off", None, "iot_hue_lightoff", "1.0/data/en-US.jsonl:4"),
    ]
    assert [row.label for row in parse(ENGLISH, "test", "scenario")] == ["alarm"]


utterances = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)


@given(st.lists(st.tuples(utterances, st.sampled_from(massive.SPLITS), st.sampled_from(massive.INTENTS), utterances)))
def test_every_utterance_is_read_once_and_in_its_split(lines):
    content = jsonl("en-US", *lines)
    for split in massive.SPLITS:
        in_split = [(number, intent, text) for number, partition, intent, text in lines if partition == split]
        assert [(row.id, row.label, row.text) for row in parse(content, split, "intent")] == in_split
        scenarios = [(number, intent.partition("_")[0], text) for number, intent, text in in_split]
        assert [(row.id, row.label, row.text) for row in parse(content, split, "scenario")] == scenarios


def with_edited_row(**changes: object) -> str:
    """Return ENGLISH with a copy of its first row at the end, changed as given. A value of None deletes the key."""
    row = json.loads(ENGLISH.split("\n")[0]) | changes
    return ENGLISH + json.dumps({key: value for key, value in row.items() if value is not None}) + "\n"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (with_edited_row(locale="de-DE"), "en-US.jsonl:5: locale 'de-DE' in the file of en-US"),
        (with_edited_row(partition="MMNLU-22"), "en-US.jsonl:5: partition 'MMNLU-22' is not one of train, dev, test"),
        (with_edited_row(utt=None), "en-US.jsonl:5: no column 'utt'"),
        (with_edited_row(utt=5), "en-US.jsonl:5: column 'utt' is a number, expected text"),
        (with_edited_row(intent=None), "en-US.jsonl:5: no column 'intent'"),
        (ENGLISH + '{"id": "1", "id": "2"}\n', "en-US.jsonl:5: malformed JSON: the key 'id' occurs twice"),
        (ENGLISH + "\n", "en-US.jsonl:5: malformed JSON"),
        (ENGLISH[:-5], "en-US.jsonl:4: malformed JSON"),
    ],
)
def test_errors_for_malformed_files_name_the_line(content, message):
    with pytest.raises(UserError) as caught:
        parse(content, "dev")
    assert message in str(caught.value)


@pytest.mark.parametrize("kind", archive_writers.WRITERS)
def test_the_tasks_load_from_an_archive_or_folder(tmp_path: Path, kind: str):
    contents = {"1.0/LICENSE": "x", "1.0/data/en-US.jsonl": ENGLISH, "1.0/data/ja-JP.jsonl": JAPANESE}
    source = archive_writers.WRITERS[kind](tmp_path / "data", contents)
    settings = {"data_dir": str(source), "cache_dir": str(tmp_path / "cache"), "source_language": "en-US"}
    settings |= {"target_languages": ("ja-JP",)}
    task = loader.task(INTENT, TaskConfig(name="massive/intent", **settings))
    label = massive.INTENTS.index("alarm_query")
    assert task.load("test", "ja-JP") == [
        Example("massive/intent/test/ja-JP/4", "何時に起きるの\u2028ですか", None, label, "ja-JP")
    ]
    assert [len(task.load(split, "en-US")) for split in massive.SPLITS] == [2, 1, 1]
    task = loader.task(SCENARIO, TaskConfig(name="massive/scenario", **settings))
    assert [task.labels[e.label] for e in task.load("train", "en-US")] == ["alarm", "iot"]


def test_an_unknown_intent_is_an_error_with_a_suggestion(tmp_path: Path):
    archive_writers.write_folder(tmp_path / "data", {"en-US.jsonl": with_edited_row(id="9", intent="alarm_sett")})
    config = TaskConfig("massive/intent", str(tmp_path / "data"), str(tmp_path / "cache"), "en-US")
    with pytest.raises(UserError, match=r"en-US\.jsonl:5: label 'alarm_sett' is not one of .*did you mean 'alarm_set'"):
        loader.task(INTENT, config).load("train", "en-US")


def test_the_corpus_declares_its_languages_and_labels():
    assert [len(set(names)) for names in (massive.LANGUAGES, massive.INTENTS, massive.SCENARIOS)] == [51, 60, 18]
    assert list(massive.INTENTS) == sorted(massive.INTENTS) and list(massive.LANGUAGES) == sorted(massive.LANGUAGES)
    with pytest.raises(
        UserError, match="task.source_language 'en': set it to 'en-US'; massive/intent has train in en-US, af-ZA"
    ):
        loader.task(INTENT, TaskConfig(name="massive/intent"))


def test_a_locale_of_another_release_is_named():
    settings = TaskConfig(name="massive/intent", source_language="en-US", target_languages=("ca-ES",))
    with pytest.raises(UserError, match="massive/intent has no 'ca-ES', which only MASSIVE 1.1 has: read that as"):
        loader.task(INTENT, settings)
