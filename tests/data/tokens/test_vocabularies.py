"""Every form of vocabulary on the hub gives the ids of transformers 4, and files that cannot work are named."""

import json
import logging
import shutil
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.fixtures.record import FIXTURES
from xtransfer.data.tokens import vocabularies
from xtransfer.data.tokens.tokenizer import load_tokenizer, tokenize
from xtransfer.errors import UserError

FOLDER = FIXTURES / "tokenizers"  # made by tests/fixtures/record_tokenizers.py
RECORDED = json.loads((FOLDER / "cases.json").read_text(encoding="utf-8"))
CASES = {case["name"]: case for case in RECORDED["cases"]}


def write_case(directory: Path, name: str, rename: str = "") -> Path:
    """Write a recorded case's directory, with another name for its only vocabulary file if one is given."""
    case = CASES[name]
    (directory / "config.json").write_text(json.dumps(case["config"]))
    if case["tokenizer_config"] is not None:
        (directory / "tokenizer_config.json").write_text(json.dumps(case["tokenizer_config"]))
    for target, source in case["files"].items():
        shutil.copy(FOLDER / source, directory / (rename or target))
    return directory


def token_ids(tokenizer: Any, texts: list[str], pairs: list[str] | None = None) -> list[list[int]]:
    tokens = tokenize(tokenizer, texts, pairs, 512)
    return [tokens.item(i)[0].tolist() for i in range(len(texts))]


def assert_recorded_ids(tokenizer: Any, name: str) -> None:
    actual = token_ids(tokenizer, RECORDED["texts"])
    for text, ids, expected in zip(RECORDED["texts"], actual, CASES[name]["ids"], strict=True):
        assert ids == expected, text
    first, second = RECORDED["pair"]
    assert token_ids(tokenizer, [first], [second]) == [CASES[name]["pair"]]


@pytest.mark.parametrize("name", CASES)
def test_converted_vocabularies_give_the_ids_of_transformers_4(name: str, tmp_path: Path) -> None:
    assert_recorded_ids(load_tokenizer(write_case(tmp_path, name)), name)


@pytest.mark.parametrize("name", CASES)
def test_their_tokenizer_json_gives_the_same_ids(name: str, tmp_path: Path) -> None:
    """As saved by transformers 4: the normalizer, pre-tokenizer, and post-processor are in the file."""
    backend = load_tokenizer(write_case(tmp_path, name)).backend_tokenizer
    for file in vocabularies.vocabulary_files(tmp_path):
        file.unlink()
    backend.no_padding()
    backend.no_truncation()
    backend.save(str(tmp_path / "tokenizer.json"))
    assert_recorded_ids(load_tokenizer(tmp_path), name)


@pytest.mark.parametrize(
    ("name", "settings", "expected"),
    [
        ("bert-cased", {"do_lower_case": True}, "bert"),
        ("bert", {"do_lower_case": False}, "bert-cased"),
        ("bert-cased", {}, "bert"),  # transformers lower-cases by default, and we warn
        ("roberta", {"add_prefix_space": True}, "roberta-prefix"),
        ("roberta-prefix", {"add_prefix_space": False}, "roberta"),
    ],
)
def test_two_settings_win_over_tokenizer_json(
    name: str, settings: dict[str, bool], expected: str, tmp_path: Path
) -> None:
    backend = load_tokenizer(write_case(tmp_path, name)).backend_tokenizer
    for file in vocabularies.vocabulary_files(tmp_path):
        file.unlink()
    backend.no_truncation()
    backend.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    assert_recorded_ids(load_tokenizer(tmp_path), expected)


@pytest.mark.parametrize("name", ["xlm-roberta", "camembert", "deberta-v2"])
@pytest.mark.parametrize("file", ["spiece.model", "tokenizer.model", "spm.model", "sentencepiece.bpe.model"])
def test_name_of_a_sentencepiece_model_does_not_matter(name: str, file: str, tmp_path: Path) -> None:
    assert_recorded_ids(load_tokenizer(write_case(tmp_path, name, rename=file)), name)


# The ids that these models add before, by position, and after the pieces of SentencePiece, and the shift of the rest.
LAYOUTS = {
    "xlm-roberta": ("fairseq.model", 0, 2, 1, 3),
    "camembert": ("fairseq.model", 5, 6, 4, 3),
    "deberta-v2": ("deberta.model", 1, 2, 0, 3),
}


@pytest.fixture(scope="module", params=LAYOUTS)
def with_reference(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Return a tokenizer, the SentencePiece library's processor of its model, and its layout."""
    from sentencepiece import SentencePieceProcessor

    file, *layout = LAYOUTS[request.param]
    tokenizer = load_tokenizer(write_case(tmp_path_factory.mktemp("spm"), request.param))
    return tokenizer, SentencePieceProcessor(model_file=str(FOLDER / file)), layout


# Accents follow letters: the tokenizers library normalises whole graphemes, and drops an accent that follows a space.
UNITS = [*"the god bkäüéçàZIS,.!  \t\n\u00a0\u3000ﬁｆ本はとても😀", "a\u0308", "u\u0308", "c\u0327"]


@given(text=st.lists(st.sampled_from(UNITS), max_size=24).map("".join))
def test_ids_equal_those_of_sentencepiece(with_reference: Any, text: str) -> None:
    tokenizer, reference, (first, last, shift, unknown) = with_reference
    pieces = [unknown if i == reference.unk_id() else i + shift for i in reference.encode(text)]
    assert token_ids(tokenizer, [text]) == [[first, *pieces, last]]


def test_model_without_a_class_for_it_says_what_to_add(tmp_path: Path) -> None:
    """BERT with a SentencePiece model needs to know whose it is."""
    write_case(tmp_path, "bert-with-xlm-roberta")
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(UserError, match=f"^{tmp_path}: .*name the right tokenizer_class in tokenizer_config") as caught:
        load_tokenizer(tmp_path)
    assert "sentencepiece.bpe.model cannot be converted: add tokenizer.json" in str(caught.value)
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "XLMRobertaTokenizer"}')
    assert_recorded_ids(load_tokenizer(tmp_path), "xlm-roberta")


@pytest.mark.parametrize("model_type", ["modernbert", "eurobert"])
def test_families_without_a_converter_need_tokenizer_json(model_type: str, tmp_path: Path) -> None:
    write_case(tmp_path, "roberta")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type}))
    with pytest.raises(UserError, match=r"vocab\.json, merges\.txt cannot be converted: add tokenizer\.json"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize(("present", "missing"), [("vocab.json", "merges.txt"), ("merges.txt", "vocab.json")])
def test_half_of_a_bpe_names_the_other_half(present: str, missing: str, tmp_path: Path) -> None:
    write_case(tmp_path, "roberta")
    (tmp_path / missing).unlink()
    with pytest.raises(UserError, match=f"^{tmp_path}: {present} without {missing}: add it$"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize("name", ["xlm-roberta", "deberta-v2"])
@pytest.mark.parametrize("damage", [b"", b"\xff\xfe" * 50, b"<html>404</html>", 900], ids=repr)
def test_damaged_sentencepiece_model_is_named(name: str, damage: bytes | int, tmp_path: Path) -> None:
    write_case(tmp_path, name)
    [model] = tmp_path.glob("*.model")
    model.write_bytes(model.read_bytes()[:damage] if isinstance(damage, int) else damage)
    with pytest.raises(UserError, match=f"^{model}: not a whole SentencePiece model: download it again$"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize("name", ["tokenizer_config.json", "special_tokens_map.json"])
@pytest.mark.parametrize("content", ["", "{", "[]", "\0"])
def test_damaged_settings_are_named(name: str, content: str, tmp_path: Path) -> None:
    write_case(tmp_path, "bert-cased")
    (tmp_path / name).write_text(content)
    with pytest.raises(UserError, match=f"^{tmp_path / name}: (not valid|expected a) JSON .*: download it again$"):
        load_tokenizer(tmp_path)


def test_tokenizer_json_of_another_kind_than_its_class_is_refused(tmp_path: Path) -> None:
    """transformers 5 would build a byte-level tokenizer from BERT's words, and split every word into unknown bytes."""
    backend = load_tokenizer(write_case(tmp_path, "bert")).backend_tokenizer
    (tmp_path / "vocab.txt").unlink()
    backend.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "config.json").write_text('{"model_type": "roberta"}')
    with pytest.raises(UserError, match=r"tokenizer\.json: holds a WordPiece model, but RobertaTokenizer is for BPE"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "BertTokenizer"}')
    assert_recorded_ids(load_tokenizer(tmp_path), "bert")


@pytest.mark.parametrize("tokenizer_class", ["RobertaTokenizer", "PreTrainedTokenizerFast", "GemmaTokenizer"])
def test_post_processor_of_tokenizer_json_is_used_whatever_the_class(tokenizer_class: str, tmp_path: Path) -> None:
    from tokenizers.processors import TemplateProcessing

    backend = load_tokenizer(write_case(tmp_path, "roberta")).backend_tokenizer
    backend.post_processor = TemplateProcessing(single="</s> $A", special_tokens=[("</s>", 2)])
    for file in vocabularies.vocabulary_files(tmp_path):
        file.unlink()
    backend.save(str(tmp_path / "tokenizer.json"))
    settings = {"bos_token": "<s>", "eos_token": "</s>", "add_bos_token": True, "add_eos_token": True}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings | {"tokenizer_class": tokenizer_class}))
    assert token_ids(load_tokenizer(tmp_path), [""]) == [[2]]


@pytest.mark.parametrize("file", ["tokenizer.json", "sentencepiece.bpe.model", "vocab.txt"])
def test_lfs_pointer_is_named(file: str, tmp_path: Path) -> None:
    write_case(tmp_path, "xlm-roberta")
    (tmp_path / file).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    with pytest.raises(UserError, match=f"^{tmp_path / file}: a Git LFS pointer, not the file itself: run `git lfs pu"):
        load_tokenizer(tmp_path)


def test_lfs_pointer_beside_tokenizer_json_does_not_matter(tmp_path: Path) -> None:
    load_tokenizer(write_case(tmp_path, "xlm-roberta")).backend_tokenizer.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "sentencepiece.bpe.model").write_text("version https://git-lfs.github.com/spec/v1\n")
    assert_recorded_ids(load_tokenizer(tmp_path), "xlm-roberta")


@pytest.mark.parametrize(("value", "expected"), [("32.0", 32), ('"32"', 32), ("1e30", int(1e30)), ("512", 512)])
def test_max_length_becomes_an_integer(value: str, expected: int, tmp_path: Path) -> None:
    write_case(tmp_path, "bert-cased")
    (tmp_path / "tokenizer_config.json").write_text(f'{{"do_lower_case": false, "model_max_length": {value}}}')
    tokenizer = load_tokenizer(tmp_path)
    assert type(tokenizer.model_max_length) is int and tokenizer.model_max_length == expected
    assert min(64, tokenizer.model_max_length) == min(64, expected)


@pytest.mark.parametrize("value", ['"long"', "32.5", "0", "-1", "true", "[32]", "Infinity", "NaN"])
def test_max_length_that_is_no_positive_integer_is_refused(value: str, tmp_path: Path) -> None:
    write_case(tmp_path, "bert-cased")
    (tmp_path / "tokenizer_config.json").write_text(f'{{"do_lower_case": false, "model_max_length": {value}}}')
    with pytest.raises(UserError, match=f"^{tmp_path}/tokenizer_config.json: ") as caught:
        load_tokenizer(tmp_path)
    assert "model_max_length is" in str(caught.value) or "not valid JSON" in str(caught.value)


def test_lower_casing_by_default_warns_with_the_share_of_unused_pieces(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "The", "Book", "the", "##B", "##b", "b", "k", "##k"]
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    (tmp_path / "vocab.txt").write_text("\n".join(words))
    with caplog.at_level(logging.WARNING):
        load_tokenizer(tmp_path)
        [message] = caplog.messages
        assert message.startswith(f"{tmp_path}: text is lower-cased, but 38% of the vocabulary has capitals")  # 3 of 8
        assert message.endswith('write {"do_lower_case": false} into tokenizer_config.json')
        for settings in ('{"do_lower_case": false}', '{"do_lower_case": true}'):  # the author chose
            (tmp_path / "tokenizer_config.json").write_text(settings)
            load_tokenizer(tmp_path)
        (tmp_path / "tokenizer_config.json").unlink()
        (tmp_path / "vocab.txt").write_text("\n".join(word for word in words if word == word.lower() or "[" in word))
        load_tokenizer(tmp_path).backend_tokenizer.save(str(tmp_path / "tokenizer.json"))
        content = json.loads((tmp_path / "tokenizer.json").read_text())
        content["model"]["vocab"] |= {"The": 10, "Book": 11}
        (tmp_path / "tokenizer.json").write_text(json.dumps(content))
        (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
        load_tokenizer(tmp_path)  # its author wrote the lower-casing into tokenizer.json
    assert len(caplog.messages) == 1


def saved_files(tokenizer: Any, directory: Path) -> dict[str, bytes]:
    tokenizer.save_pretrained(directory)
    return {path.name: path.read_bytes() for path in directory.iterdir()}


@pytest.mark.parametrize("model_type", ["bert", "xlm-roberta"])
@pytest.mark.parametrize("name", ["Bert", "XLMRoberta"])
@pytest.mark.parametrize("ending", ["", "Fast"])
def test_a_class_is_loaded_as_by_autotokenizer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, model_type: str, name: str, ending: str
) -> None:
    source = tmp_path / "source"
    source.mkdir()
    load_tokenizer(write_case(source, {"Bert": "bert", "XLMRoberta": "xlm-roberta"}[name])).save_pretrained(source)
    (source / "config.json").write_text(json.dumps({"model_type": model_type}))
    settings = json.loads((source / "tokenizer_config.json").read_text())
    (source / "tokenizer_config.json").write_text(
        json.dumps(settings | {"tokenizer_class": f"{name}Tokenizer{ending}"})
    )
    assert vocabularies.class_name(source, vocabularies.vocabulary_files(source)) == f"{name}Tokenizer"
    ours = load_tokenizer(source)
    monkeypatch.setattr(vocabularies, "class_name", lambda directory, files: "AutoTokenizer")
    theirs = load_tokenizer(source)
    assert type(ours) is type(theirs) and ours.init_kwargs == theirs.init_kwargs
    assert saved_files(ours, tmp_path / "ours") == saved_files(theirs, tmp_path / "theirs")


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("tokenizer_config.json", {"tokenizer_class": "RobertaTokenizer"}),
        ("tokenizer_config.json", {"tokenizer_class": "BertTokenizer", "auto_map": {"AutoTokenizer": ["a.B", None]}}),
        ("tokenizer_config.json", {}),
        ("config.json", {"model_type": "deberta-v2"}),  # whose class replaces a wrong one in the file
        ("config.json", {}),
        ("config.json", []),
        ("tokenizer.json", None),
    ],
)
def test_autotokenizer_chooses_every_other_class(tmp_path: Path, file: str, content: Any) -> None:
    files = {"tokenizer_config.json": {"tokenizer_class": "BertTokenizer"}, "config.json": {"model_type": "bert"}}
    for name, value in (files | {"tokenizer.json": {}, "vocab.txt": {}} | {file: content}).items():
        if value is not None:
            (tmp_path / name).write_text(json.dumps(value))
    assert vocabularies.class_name(tmp_path, vocabularies.vocabulary_files(tmp_path)) == "AutoTokenizer"
