"""config.json: what is read, what is refused and how it is said; tokenizers of another model."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from xtransfer.errors import UserError
from xtransfer.models import hf_config
from xtransfer.models.encoder import EncoderConfig

CLASSIFIER = Path(__file__).parent / "fixtures" / "bert_classifier"


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    """A directory with a config.json that may be spoilt."""
    shutil.copy(CLASSIFIER / "config.json", tmp_path)
    return tmp_path


def edit(directory: Path, *without: str, **changes: Any) -> None:
    path = directory / "config.json"
    raw = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in raw.items() if key not in without}))


def test_every_setting_comes_from_the_file() -> None:
    assert hf_config.read_config(CLASSIFIER) == EncoderConfig(
        vocab_size=48,
        hidden_size=36,
        num_layers=2,
        num_heads=3,
        intermediate_size=44,
        max_positions=24,
        type_vocab_size=1,
        layer_norm_eps=1e-7,
        hidden_act="gelu_new",
        hidden_dropout=0.1,
        attention_dropout=0.1,
        classifier_dropout=0.3,
        pad_id=0,
        position_offset=0,
        family="bert",
    )
    assert hf_config.read_labels(CLASSIFIER) == ("negative", "neutral", "positive")


def test_defaults_are_those_of_the_family(directory: Path) -> None:
    optional = ("type_vocab_size", "layer_norm_eps", "hidden_act", "hidden_dropout_prob", "classifier_dropout")
    edit(
        directory,
        *optional,
        "attention_probs_dropout_prob",
        "pad_token_id",
        "id2label",
        position_embedding_type="absolute",
    )
    config = hf_config.read_config(directory)
    assert (config.type_vocab_size, config.layer_norm_eps, config.hidden_act, config.pad_id) == (2, 1e-12, "gelu", 0)
    assert (config.hidden_dropout, config.attention_dropout, config.classifier_dropout) == (0.1, 0.1, None)
    assert hf_config.read_labels(directory) is None
    assert hf_config.read_pooling(directory) == "cls"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "gpt2"}, "model_type 'gpt2' is not supported: one of bert"),
        ({"model_type": ["bert"]}, r"model_type \['bert'\] is not supported: one of bert"),
        ({"auto_map": {"AutoModel": "evil.Model"}}, "auto_map asks for remote code, which is never run"),
        ({"position_embedding_type": "alibi"}, "position_embedding_type is 'alibi': only 'absolute'"),
        ({"is_decoder": True}, "is_decoder is True: only False"),
        ({"tie_word_embeddings": False}, "tie_word_embeddings is False: only True"),
        ({"hidden_act": "mish"}, "hidden_act is 'mish': it has to be one of gelu, "),
        ({"hidden_act": ["gelu"]}, "hidden_act is "),
        ({"hidden_size": "36"}, "hidden_size is '36': it has to be a positive integer"),
        ({"hidden_size": 36.0}, "hidden_size is 36.0: it has to be a positive integer"),
        ({"vocab_size": True}, "vocab_size is True: it has to be a positive integer"),
        ({"num_hidden_layers": 0}, "num_hidden_layers is 0: it has to be a positive integer"),
        ({"num_attention_heads": 5}, "hidden_size 36 is not a multiple of num_attention_heads 5"),
        ({"layer_norm_eps": float("nan")}, "layer_norm_eps is nan"),
        ({"layer_norm_eps": 0}, "layer_norm_eps is 0"),
        ({"hidden_dropout_prob": 1.0}, "hidden_dropout_prob is 1.0: it has to be a number from 0 to below 1"),
        ({"hidden_dropout_prob": None}, "hidden_dropout_prob is None"),
        ({"pad_token_id": -1}, "pad_token_id is -1: it has to be a token id"),
        ({"pad_token_id": 48}, "pad_token_id is 48, beyond vocab_size 48"),
    ],
)
def test_what_cannot_be_run_as_it_was_trained_is_refused(
    directory: Path, changes: dict[str, Any], message: str
) -> None:
    edit(directory, **changes)
    with pytest.raises(UserError, match=message) as caught:
        hf_config.read_config(directory)
    assert str(caught.value).startswith(f"{directory}/config.json: ")


def test_a_missing_setting_is_named(directory: Path) -> None:
    edit(directory, "hidden_size", "num_hidden_layers")
    with pytest.raises(UserError, match="hidden_size, num_hidden_layers missing"):
        hf_config.read_config(directory)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"model_type": "be', "not whole JSON"),
        (b"", "not whole JSON"),
        (b'{"model_type": "\xff"}', "not whole JSON"),
        (b"[" * 100_000, "not whole JSON"),
        (b'["bert"]', "has to be a JSON object"),
    ],
)
def test_a_broken_file_is_named(directory: Path, content: bytes, message: str) -> None:
    (directory / "config.json").write_bytes(content)
    with pytest.raises(UserError, match=rf"config\.json: {message}"):
        hf_config.read_config(directory)


def test_a_directory_without_a_config_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"config\.json: no such file: not a Hugging Face model directory"):
        hf_config.read_config(tmp_path)


@pytest.mark.parametrize(
    "table", [["a", "b"], {"0": "a", "2": "b"}, {"0": "a", "1": "a"}, {"0": "a", "1": 1}, {"0": "a", "01": "b"}]
)
def test_labels_have_to_be_numbered_and_distinct(directory: Path, table: Any) -> None:
    edit(directory, id2label=table)
    with pytest.raises(UserError, match=r"config\.json: id2label has to"):
        hf_config.read_labels(directory)


class Tokenizer:
    """As much of a tokenizer as is looked at."""

    name_or_path = "some-tokenizer"

    def __init__(self, largest: int, pad: int | None):
        self.pad_token_id = pad
        self._largest = largest

    def get_vocab(self) -> dict[str, int]:
        return {"a": 0, "b": self._largest}


@pytest.mark.parametrize(
    ("largest", "pad", "message"),
    [
        (48, 0, "token ids up to 48, but the model embeds 48"),
        (47, 1, "pad id 1, but the model's is 0"),
        (47, None, "pad id None, but the model's is 0"),
    ],
)
def test_the_tokenizer_of_another_model_is_refused(largest: int, pad: int | None, message: str) -> None:
    config = hf_config.read_config(CLASSIFIER)
    hf_config.check_tokenizer(config, Tokenizer(47, 0))
    hf_config.check_tokenizer(config, Tokenizer(30, 0))
    with pytest.raises(UserError, match=f"some-tokenizer: {message}"):
        hf_config.check_tokenizer(config, Tokenizer(largest, pad))
