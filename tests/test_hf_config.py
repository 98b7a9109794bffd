"""config.json: what is read, what is refused and how it is said; tokenizers of another model."""

import dataclasses
import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from xtransfer.errors import UserError
from xtransfer.models import hf_config
from xtransfer.models.encoder import EncoderConfig
from xtransfer.models.families import FAMILIES

FIXTURES = Path(__file__).parent / "fixtures"
CLASSIFIER = FIXTURES / "bert_classifier"


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    """A directory with a config.json that may be spoilt."""
    return copy_of("bert", tmp_path)


def copy_of(family: str, directory: Path) -> Path:
    shutil.copy(FIXTURES / f"{family}_classifier" / "config.json", directory)
    return directory


def edit(directory: Path, *without: str, **changes: Any) -> None:
    path = directory / "config.json"
    raw = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in raw.items() if key not in without}))


def test_every_setting_comes_from_the_file() -> None:
    assert hf_config.read_config(CLASSIFIER) == EncoderConfig(
        vocab_size=40,
        hidden_size=15,
        num_layers=2,
        num_heads=3,
        intermediate_size=20,
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


SMALL = {"vocab_size": 40, "hidden_size": 15, "num_layers": 2, "num_heads": 3, "intermediate_size": 20}
ROBERTA = {"type_vocab_size": 1, "head_input_dropout": True}
OF_A_FAMILY: dict[str, dict[str, Any]] = {
    "roberta": ROBERTA | {"hidden_act": "gelu_new", "layer_norm_eps": 1e-6, "pad_id": 2, "position_offset": 3},
    "xlm-roberta": ROBERTA
    | {"num_heads": 1, "classifier_dropout": 0.2, "layer_norm_eps": 1e-5, "pad_id": 1, "position_offset": 2},
    "camembert": ROBERTA | {"hidden_act": "silu", "layer_norm_eps": 1e-4, "pad_id": 1, "position_offset": 2},
    "distilbert": {
        "type_vocab_size": 0,
        "hidden_act": "relu",
        "head_act": "relu",
        "attention_output_dropout": False,
        "classifier_dropout": 0.2,
        "pad_id": 5,
    },
    "electra": {
        "embedding_size": 11,
        "hidden_act": "relu",
        "head_act": "gelu",
        "head_input_dropout": True,
        "layer_norm_eps": 1e-5,
    },
}


@pytest.mark.parametrize("family", OF_A_FAMILY)
def test_a_familys_settings_are_read_under_its_own_keys(family: str) -> None:
    settings = SMALL | {"max_positions": 24, "family": family} | OF_A_FAMILY[family]
    assert hf_config.read_config(FIXTURES / f"{family}_classifier") == EncoderConfig(**settings)


# The defaults of the classes of transformers, where a config.json leaves a key out.
DEFAULTS: dict[str, dict[str, Any]] = {
    **dict.fromkeys(("roberta", "xlm-roberta", "camembert"), {"pad_id": 1, "position_offset": 2, "type_vocab_size": 2}),
    "distilbert": {"pad_id": 0, "position_offset": 0, "type_vocab_size": 0, "classifier_dropout": 0.2},
    "electra": {"pad_id": 0, "position_offset": 0, "type_vocab_size": 2, "embedding_size": 128},
}


@pytest.mark.parametrize("family", DEFAULTS)
def test_a_familys_own_defaults(family: str, tmp_path: Path) -> None:
    copy_of(family, tmp_path)
    keys = {key for key, _ in FAMILIES[family].config_keys} - set(FAMILIES[family].required)
    edit(tmp_path, *keys)
    config = hf_config.read_config(tmp_path)
    assert {field: getattr(config, field) for field in DEFAULTS[family]} == DEFAULTS[family]
    common = (config.hidden_act, config.layer_norm_eps, config.hidden_dropout, config.attention_dropout)
    assert common == ("gelu", 1e-12, 0.1, 0.1)


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
        ({"model_type": "gpt2"}, "model_type 'gpt2' is not supported: one of bert, camembert, distilbert, electra, "),
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
        ({"num_attention_heads": 4}, "hidden_size 15 is not a multiple of its 4 attention heads"),
        ({"problem_type": "multi_label_classification"}, "problem_type is 'multi_label_classification': only 'single_"),
        ({"architectures": ["BertForTokenClassification"]}, "BertForTokenClassification, whose head does another task"),
        ({"architectures": ["BertForMultipleChoice"]}, "BertForMultipleChoice, whose head does another task"),
        ({"layer_norm_eps": float("nan")}, "layer_norm_eps is nan"),
        ({"layer_norm_eps": 0}, "layer_norm_eps is 0"),
        ({"hidden_dropout_prob": 1.0}, "hidden_dropout_prob is 1.0: it has to be a number from 0 to below 1"),
        ({"hidden_dropout_prob": None}, "hidden_dropout_prob is None"),
        ({"pad_token_id": -1}, "pad_token_id is -1: it has to be a token id"),
        ({"pad_token_id": 40}, "pad_token_id is 40, beyond vocab_size 40"),
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


@pytest.mark.parametrize(
    ("family", "changes", "message"),
    [
        ("roberta", {"pad_token_id": 23}, "positions begin after pad_token_id 23, beyond all 24"),
        ("roberta", {"pad_token_id": None}, "pad_token_id is None: it has to be a token id"),
        ("roberta", {"is_decoder": True}, "is_decoder is True: only False"),
        ("xlm-roberta", {"type_vocab_size": 0}, "type_vocab_size is 0: it has to be a positive integer"),
        ("electra", {"embedding_size": "11"}, "embedding_size is '11': it has to be a positive integer"),
        ("electra", {"position_embedding_type": "relative_key"}, "position_embedding_type is 'relative_key'"),
        ("distilbert", {"activation": "mish"}, "activation is 'mish': it has to be one of gelu, "),
        ("distilbert", {"seq_classif_dropout": None}, "seq_classif_dropout is None: it has to be a number"),
        ("distilbert", {"n_heads": 4}, "hidden_size 15 is not a multiple of its 4 attention heads"),
    ],
)
def test_a_familys_wrong_settings_are_refused(
    family: str, changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    copy_of(family, tmp_path)
    edit(tmp_path, **changes)
    with pytest.raises(UserError, match=message) as caught:
        hf_config.read_config(tmp_path)
    assert str(caught.value).startswith(f"{tmp_path}/config.json: ")


def test_a_missing_setting_has_the_familys_name_for_it(tmp_path: Path) -> None:
    edit(copy_of("distilbert", tmp_path), "dim", "n_layers")
    with pytest.raises(UserError, match="dim, n_layers missing"):
        hf_config.read_config(tmp_path)


@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_written_is_read_back(family: str, tmp_path: Path) -> None:
    config = hf_config.read_config(FIXTURES / f"{family}_classifier")
    leaves = frozenset({"head.kernel"})
    hf_config.write_config(tmp_path / "config.json", config, leaves, ("no", "yes"), "cls", {"eos_token_id": 3})
    assert hf_config.read_config(tmp_path) == config
    assert hf_config.read_labels(tmp_path) == ("no", "yes")
    raw = json.loads((tmp_path / "config.json").read_text())
    assert (raw["problem_type"], raw["eos_token_id"]) == ("single_label_classification", 3)
    assert (raw["id2label"], raw["label2id"]) == ({"0": "no", "1": "yes"}, {"no": 0, "yes": 1})
    original = json.loads((FIXTURES / f"{family}_classifier" / "config.json").read_text())
    assert (raw["architectures"], raw["model_type"]) == (original["architectures"], original["model_type"])
    assert {key: raw[key] for key, _ in FAMILIES[family].config_keys} == {
        key: original[key] for key, _ in FAMILIES[family].config_keys
    }


def test_what_none_stands_for_is_written_where_null_is_not_allowed(tmp_path: Path) -> None:
    for family, key, value in (("electra", "embedding_size", 15), ("distilbert", "seq_classif_dropout", 0.3)):
        config = hf_config.read_config(FIXTURES / f"{family}_classifier")
        config = dataclasses.replace(config, embedding_size=None, classifier_dropout=None, hidden_dropout=0.3)
        hf_config.write_config(tmp_path / "config.json", config, frozenset(), None, "cls")
        raw = json.loads((tmp_path / "config.json").read_text())
        assert raw[key] == value and "id2label" not in raw and "problem_type" not in raw


BERTS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
ROBERTAS = ("<s>", "<pad>", "</s>", "<unk>", "<mask>")


def bert_tokenizer(size: int = 40, special: Sequence[str] = BERTS, **options: Any) -> Any:
    from transformers import BertTokenizer

    words = [*special, *(f"w{i}" for i in range(size - len(special)))]
    return BertTokenizer(vocab={word: i for i, word in enumerate(words)}, name_or_path="some-tokenizer", **options)


def roberta_tokenizer(size: int = 40, special: Sequence[str] = ROBERTAS) -> Any:
    from transformers import RobertaTokenizer

    words = [*special, *(f"w{i}" for i in range(size - len(special)))]
    vocab = {word: i for i, word in enumerate(words)}
    return RobertaTokenizer(vocab=vocab, merges=[], name_or_path="some-tokenizer")


@pytest.mark.parametrize("size", [36, 40])
def test_a_models_own_tokenizer_is_accepted(size: int, directory: Path, tmp_path: Path) -> None:
    """Also one that is up to a tenth smaller: embeddings are rounded up."""
    edit(directory, type_vocab_size=2)
    hf_config.check_tokenizer(directory, bert_tokenizer(size))
    edit(copy_of("roberta", tmp_path), pad_token_id=1)
    hf_config.check_tokenizer(tmp_path, roberta_tokenizer(size))
    edit(copy_of("distilbert", tmp_path), pad_token_id=0)  # it has no token types, so a pair's are not looked at
    hf_config.check_tokenizer(tmp_path, bert_tokenizer(size))


@pytest.mark.parametrize(
    ("tokenizer", "changes", "message"),
    [
        (lambda: bert_tokenizer(41), {}, "token ids up to 40, but the model embeds 40"),
        (lambda: bert_tokenizer(35), {}, "35 tokens, but the model embeds 40"),
        (lambda: bert_tokenizer(special=BERTS[::-1]), {}, "pad id 4, but the model's is 0"),
        (lambda: roberta_tokenizer(), {}, "pad id 1, but the model's is 0"),
        (lambda: bert_tokenizer(bos_token="[CLS]"), {"bos_token_id": 0}, "bos id 2, but the model's is 0"),
        (lambda: bert_tokenizer(eos_token="[SEP]"), {"eos_token_id": [2, 4]}, r"eos id 3, but the model's is \[2, 4\]"),
        (lambda: bert_tokenizer(), {"type_vocab_size": 1}, "pairs have 2 token types, but the model's type_vocab_size"),
    ],
)
def test_the_tokenizer_of_another_model_is_refused(
    tokenizer: Callable[[], Any], changes: dict[str, Any], message: str, directory: Path
) -> None:
    edit(directory, **({"type_vocab_size": 2} | changes))
    with pytest.raises(UserError, match=f"^some-tokenizer: {message}") as caught:
        hf_config.check_tokenizer(directory, tokenizer())
    assert f"({directory}/config.json): another model's tokenizer?" in str(caught.value)


def test_a_tokenizer_without_a_special_token_at_the_front_is_refused(directory: Path) -> None:
    from tokenizers.processors import TemplateProcessing

    edit(directory, type_vocab_size=2)
    for template, tokens in (("$A", "$A $B:1"), ("$A [SEP]", "$A [SEP] $B:1 [SEP]:1")):
        tokenizer = bert_tokenizer()
        tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
            single=template, pair=tokens, special_tokens=[("[SEP]", 3)]
        )
        with pytest.raises(UserError, match="some-tokenizer: no special token stands first"):
            hf_config.check_tokenizer(directory, tokenizer)


def test_another_familys_tokenizer_is_accepted_where_config_names_its_class(directory: Path) -> None:
    """As multilingual-e5-small: bert with XLM-R's tokenizer, whose special ids its config.json does not know."""
    edit(directory, bos_token_id=5, eos_token_id=6)
    with pytest.raises(UserError, match="pad id 1, but the model's is 0"):
        hf_config.check_tokenizer(directory, roberta_tokenizer())
    edit(directory, tokenizer_class="XLMRobertaTokenizer")
    hf_config.check_tokenizer(directory, roberta_tokenizer())
    with pytest.raises(UserError, match="35 tokens, but the model embeds 40"):
        hf_config.check_tokenizer(directory, roberta_tokenizer(35))


def test_where_positions_follow_the_pad_id_it_has_to_be_the_tokenizers(tmp_path: Path) -> None:
    edit(copy_of("roberta", tmp_path), tokenizer_class="RobertaTokenizer")
    with pytest.raises(UserError, match="pad id 1, but the model's is 2"):
        hf_config.check_tokenizer(tmp_path, roberta_tokenizer())


def test_special_ids_are_those_that_the_tokenizer_has() -> None:
    assert hf_config.special_ids(bert_tokenizer()) == {"pad_token_id": 0, "cls_token_id": 2, "sep_token_id": 3}
    assert hf_config.special_ids(roberta_tokenizer()) == {
        **{"pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2},
        **{"cls_token_id": 0, "sep_token_id": 2},
    }
    assert hf_config.special_ids(None) == {}


def test_an_export_with_another_familys_tokenizer_accepts_it_again(directory: Path, tmp_path: Path) -> None:
    edit(directory, tokenizer_class="XLMRobertaTokenizer")
    config, tokenizer = hf_config.read_config(directory), roberta_tokenizer()
    exported = tmp_path / "exported"
    exported.mkdir()
    ids = hf_config.special_ids(tokenizer)
    hf_config.write_config(exported / "config.json", config, frozenset({"head.kernel"}), ("a", "b"), "cls", ids)
    hf_config.check_tokenizer(exported, tokenizer)


@pytest.mark.parametrize("name", ["mini-bert-en", "mini-bert-multilingual"])
def test_the_embedded_checkpoints_are_accepted_with_their_tokenizers(name: str) -> None:
    from transformers import AutoTokenizer

    directory = Path(hf_config.__file__).parents[1] / "checkpoints" / name
    hf_config.check_tokenizer(directory, AutoTokenizer.from_pretrained(str(directory), local_files_only=True))
