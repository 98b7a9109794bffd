"""MASSIVE 1.0: requests to a voice assistant, translated into 51 locales, parallel by their ids.

FitzGerald et al., "MASSIVE: A 1M-Example Multilingual Natural Language Understanding Dataset with 51
Typologically-Diverse Languages", ACL 2023. Two tasks: the 60 intents, and the 18 scenarios that they belong to.
Each locale has 11,514, 2,033, and 2,974 utterances; some intents are rare. Version 1.1, with ca-ES, is not read.
"""

import functools
from collections.abc import Iterator
from typing import BinaryIO

from xtransfer.data.corpora import archives
from xtransfer.data.corpora.corpus import Corpus, CorpusRow, Download, Sources
from xtransfer.data.formats import lines, tables
from xtransfer.errors import DataError

_LANGUAGES = """
af-ZA am-ET ar-SA az-AZ bn-BD cy-GB da-DK de-DE el-GR en-US es-ES fa-IR fi-FI fr-FR he-IL hi-IN hu-HU hy-AM
id-ID is-IS it-IT ja-JP jv-ID ka-GE km-KH kn-IN ko-KR lv-LV ml-IN mn-MN ms-MY my-MM nb-NO nl-NL pl-PL pt-PT
ro-RO ru-RU sl-SL sq-AL sv-SE sw-KE ta-IN te-IN th-TH tl-PH tr-TR ur-PK vi-VN zh-CN zh-TW
"""
_INTENTS = """
alarm_query alarm_remove alarm_set audio_volume_down audio_volume_mute audio_volume_other audio_volume_up
calendar_query calendar_remove calendar_set cooking_query cooking_recipe datetime_convert datetime_query
email_addcontact email_query email_querycontact email_sendemail general_greet general_joke general_quirky
iot_cleaning iot_coffee iot_hue_lightchange iot_hue_lightdim iot_hue_lightoff iot_hue_lighton iot_hue_lightup
iot_wemo_off iot_wemo_on lists_createoradd lists_query lists_remove music_dislikeness music_likeness music_query
music_settings news_query play_audiobook play_game play_music play_podcasts play_radio qa_currency qa_definition
qa_factoid qa_maths qa_stock recommendation_events recommendation_locations recommendation_movies social_post
social_query takeaway_order takeaway_query transport_query transport_taxi transport_ticket transport_traffic
weather_query
"""
LANGUAGES = tuple(_LANGUAGES.split())
INTENTS = tuple(_INTENTS.split())
SCENARIOS = tuple(dict.fromkeys(intent.partition("_")[0] for intent in INTENTS))
SPLITS = ("train", "dev", "test")
ARCHIVE = Download(
    url="https://amazon-massive-nlu-dataset.s3.amazonaws.com/amazon-massive-dataset-1.0.tar.gz",
    filename="amazon-massive-dataset-1.0.tar.gz",
    sha256="7df623fd2d300a4d235d6ee5bd396c9a28258d3a0ccb29abdb054506eba153f8",
    size=39500415,
)

_MEMBER_LIMIT = 256 << 20
_TOTAL_LIMIT = 4 << 30


def parse(stream: BinaryIO, name: str, locale: str, split: str, label: str) -> Iterator[CorpusRow]:
    """Yield the utterances of a split from a locale's file.

    Args:
      stream: JSON lines, each with id, locale, partition, utt, and the label.
      name: the name of the file, for errors.
      locale: the locale of the file.
      split: the partition to read; the file holds all of them.
      label: "intent" or "scenario".

    Raises:
      UserError: a malformed row in any partition; the message starts with `name`:line.
    """
    for line, values in lines.rows(stream, name, ".jsonl"):
        where = f"{name}:{line}"
        partition = tables.string_of(values, "partition", where)
        if partition not in SPLITS:
            raise DataError(f"{where}: partition {partition!r} is not one of {', '.join(SPLITS)}")
        actual = tables.string_of(values, "locale", where)
        if actual != locale:
            raise DataError(f"{where}: locale {actual!r} in the file of {locale}")
        id_, class_name = (tables.string_of(values, key, where) for key in ("id", label))
        text = tables.text_of(values, "utt", where)
        if partition == split:
            yield CorpusRow(id=id_, text=text, text_pair=None, label=class_name, where=where)


def _rows(label: str, sources: Sources, language: str, split: str) -> Iterator[CorpusRow]:
    source = sources.path(ARCHIVE.filename)
    ending = f"{language}.jsonl"
    with archives.open_member(source, ending, member_limit=_MEMBER_LIMIT, total_limit=_TOTAL_LIMIT) as (name, stream):
        yield from parse(stream, name, language, split, label)


def _corpus(label: str, labels: tuple[str, ...]) -> Corpus:
    return Corpus(
        name=f"massive/{label}",
        version="1.0.0",
        labels=labels,
        source_language="en-US",
        languages=LANGUAGES,
        splits=lambda language: SPLITS,
        downloads=lambda language: (ARCHIVE,),
        members=lambda language: (f"{language}.jsonl",),
        rows=functools.partial(_rows, label),
        homepage="https://github.com/alexa/massive",
        citation="FitzGerald et al., MASSIVE, ACL 2023, arXiv 2204.08582",
        licence="CC BY 4.0",
        is_parallel=True,
        elsewhere=(("ca-ES", "MASSIVE 1.1"),),
    )


CORPORA = (_corpus("intent", INTENTS), _corpus("scenario", SCENARIOS))
