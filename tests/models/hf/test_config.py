"""config.json: settings, defaults, one-line errors, and writing."""

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from xtransfer.errors import UserError
from xtransfer.models.encoder import EncoderConfig
from xtransfer.models.hf import config as hf_config
from xtransfer.models.hf.families import FAMILIES

FIXTURES = Path(__file__).parents[2] / "fixtures"
CLASSIFIER = FIXTURES / "bert_classifier"


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    """Return a directory with a config.json that a test may damage."""
    return copy_config("bert", tmp_path)


def copy_config(family: str, directory: Path) -> Path:
    shutil.copy(FIXTURES / f"{family}_classifier" / "config.json", directory)
    return directory


def edit(directory: Path, *removed: str, **changes: Any) -> None:
    path = directory / "config.json"
    raw = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in raw.items() if key not in removed}))


def test_every_setting_is_read_from_the_file() -> None:
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
ROBERTA = {"type_vocab_size": 1, "head_input_dropout": True, "masked_lm_act": "gelu"}
FAMILY_SETTINGS: dict[str, dict[str, Any]] = {
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
        "masked_lm_act": "gelu",
        "head_input_dropout": True,
        "layer_norm_eps": 1e-5,
    },
}


@pytest.mark.parametrize("family", FAMILY_SETTINGS)
def test_settings_are_read_under_the_familys_keys(family: str) -> None:
    settings = SMALL | {"max_positions": 24, "family": family} | FAMILY_SETTINGS[family]
    assert hf_config.read_config(FIXTURES / f"{family}_classifier") == EncoderConfig(**settings)


# The defaults of the `transformers` classes for keys that a config.json omits.
DEFAULTS: dict[str, dict[str, Any]] = {
    **dict.fromkeys(("roberta", "xlm-roberta", "camembert"), {"pad_id": 1, "position_offset": 2, "type_vocab_size": 2}),
    "distilbert": {"pad_id": 0, "position_offset": 0, "type_vocab_size": 0, "classifier_dropout": 0.2},
    "electra": {"pad_id": 0, "position_offset": 0, "type_vocab_size": 2, "embedding_size": 128},
}


@pytest.mark.parametrize("family", DEFAULTS)
def test_missing_keys_get_the_familys_defaults(family: str, tmp_path: Path) -> None:
    copy_config(family, tmp_path)
    keys = {key for key, _ in FAMILIES[family].config_keys} - set(FAMILIES[family].required)
    edit(tmp_path, *keys)
    config = hf_config.read_config(tmp_path)
    assert {field: getattr(config, field) for field in DEFAULTS[family]} == DEFAULTS[family]
    common = (config.hidden_act, config.layer_norm_eps, config.hidden_dropout, config.attention_dropout)
    assert common == ("gelu", 1e-12, 0.1, 0.1)


def test_missing_keys_get_berts_defaults(directory: Path) -> None:
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
        ({"model_type": "gpt2"}, "model_type 'gpt2' is not supported: one of bert, camembert, deberta-v2, "),
        ({"model_type": ["bert"]}, r"model_type \['bert'\] is not supported: one of bert"),
        (
            {"model_type": "own", "auto_map": {"AutoModel": "evil.Model"}},
            "model_type 'own' is not supported: one of bert",
        ),
        ({"position_embedding_type": "alibi"}, "position_embedding_type is 'alibi': only 'absolute'"),
        ({"is_decoder": True}, "is_decoder is True: only False"),
        ({"hidden_act": "mish"}, "hidden_act is 'mish', expected one of gelu, "),
        ({"hidden_act": ["gelu"]}, "hidden_act is "),
        ({"hidden_size": "36"}, "hidden_size is '36', expected a positive integer"),
        ({"hidden_size": 36.0}, "hidden_size is 36.0, expected a positive integer"),
        ({"vocab_size": True}, "vocab_size is True, expected a positive integer"),
        ({"num_hidden_layers": 0}, "num_hidden_layers is 0, expected a positive integer"),
        ({"num_attention_heads": 4}, "hidden_size 15 is not a multiple of its 4 attention heads"),
        ({"problem_type": "regression"}, "problem_type is 'regression': only 'single_label_classification' and 'multi"),
        (
            {"architectures": ["BertForTokenClassification"]},
            "BertForTokenClassification, whose head is for another",
        ),
        ({"architectures": ["BertForMultipleChoice"]}, "BertForMultipleChoice, whose head is for another task"),
        ({"layer_norm_eps": 0}, "layer_norm_eps is 0"),
        ({"hidden_dropout_prob": 1.0}, "hidden_dropout_prob is 1.0, expected a number from 0 to below 1"),
        ({"hidden_dropout_prob": None}, "hidden_dropout_prob is None"),
        ({"pad_token_id": -1}, "pad_token_id is -1, expected a token id"),
        ({"pad_token_id": 40}, "pad_token_id is 40, beyond vocab_size 40"),
    ],
)
def test_models_that_cannot_run_as_trained_are_refused(directory: Path, changes: dict[str, Any], message: str) -> None:
    edit(directory, **changes)
    with pytest.raises(UserError, match=message) as caught:
        hf_config.read_config(directory)
    assert str(caught.value).startswith(f"{directory}/config.json: ")


def test_code_of_a_checkpoint_is_ignored_with_one_log_line(directory: Path, caplog: pytest.LogCaptureFixture) -> None:
    edit(directory, auto_map={"AutoModel": "evil.Model"})
    assert hf_config.read_config(directory) == hf_config.read_config(CLASSIFIER)
    hf_config.read_config(directory)
    reason = "auto_map names code of the checkpoint, which is never run: it is read as a plain bert"
    assert caplog.messages == [f"{directory}/config.json: {reason}"]


def test_missing_setting_is_named(directory: Path) -> None:
    edit(directory, "hidden_size", "num_hidden_layers")
    with pytest.raises(UserError, match="hidden_size, num_hidden_layers missing"):
        hf_config.read_config(directory)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"model_type": "be', r"not valid JSON \(Unterminated string .*\): download it again"),
        (b"", "not valid JSON"),
        (b'{"model_type": "\xff"}', "not valid JSON"),
        (b"[" * 100_000, r"not valid JSON \(nested too deeply\)"),
        (b'{"vocab_size": 40, "vocab_size": 41}', r"not valid JSON \(the key 'vocab_size' occurs twice\)"),
        (b'{"layer_norm_eps": NaN}', r"not valid JSON \(NaN is not a JSON number\)"),
        (b'["bert"]', "expected a JSON object, found list: download it again"),
    ],
)
def test_broken_file_is_named(directory: Path, content: bytes, message: str) -> None:
    (directory / "config.json").write_bytes(content)
    with pytest.raises(UserError, match=rf"config\.json: {message}"):
        hf_config.read_config(directory)


def test_directory_without_a_config_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"config\.json: no such file: not a Hugging Face model directory"):
        hf_config.read_config(tmp_path)


def test_adapter_is_told_from_a_model(tmp_path: Path) -> None:
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        (tmp_path / name).write_text("{}")
    with pytest.raises(
        UserError, match=f"^{tmp_path}: a PEFT adapter .*, not a whole model: merge it .* merge_and_unl"
    ):
        hf_config.read_config(tmp_path)
    copy_config("bert", tmp_path)  # a merged model may lie beside the adapter
    hf_config.read_config(tmp_path)


@pytest.mark.parametrize(
    "table",
    [
        ["a", "b"],
        {"0": "a", "2": "b"},
        {"0": "a", "1": "a"},
        {"0": "1", "1": 1},
        {"0": "a", "1": [1]},
        {"0": "a", "01": "b"},
    ],
)
def test_labels_must_be_numbered_and_distinct(directory: Path, table: Any) -> None:
    edit(directory, id2label=table)
    with pytest.raises(UserError, match=r"config\.json: id2label must"):
        hf_config.read_labels(directory)


def test_numeric_labels_become_strings(directory: Path) -> None:
    edit(directory, id2label={"0": 1, "1": -2, "2": "3"})
    assert hf_config.read_labels(directory) == ("1", "-2", "3")
    assert hf_config.class_names(directory, 3) == ("1", "-2", "3")
    edit(directory, "id2label")
    assert hf_config.class_names(directory, 2) == ("LABEL_0", "LABEL_1")


def test_unreadable_config_is_a_one_line_error(tmp_path: Path) -> None:
    (tmp_path / "config.json").mkdir()
    with pytest.raises(UserError, match=r"config\.json: cannot be read: Is a directory"):
        hf_config.read_config(tmp_path)


def test_untied_decoder_is_refused_only_for_pretraining(directory: Path) -> None:
    edit(directory, tie_word_embeddings=False)
    assert hf_config.read_config(directory) == hf_config.read_config(CLASSIFIER)
    with pytest.raises(UserError, match=r"config\.json: tie_word_embeddings is False: only True is supported"):
        hf_config.check_pretraining(directory)


@pytest.mark.parametrize(
    ("family", "changes", "message"),
    [
        ("roberta", {"pad_token_id": 23}, "positions start after pad_token_id 23, beyond the 24"),
        ("roberta", {"pad_token_id": None}, "pad_token_id is None, expected a token id"),
        ("roberta", {"is_decoder": True}, "is_decoder is True: only False"),
        ("xlm-roberta", {"type_vocab_size": 0}, "type_vocab_size is 0, expected a positive integer"),
        ("electra", {"embedding_size": "11"}, "embedding_size is '11', expected a positive integer"),
        ("electra", {"position_embedding_type": "relative_key"}, "position_embedding_type is 'relative_key'"),
        ("distilbert", {"activation": "mish"}, "activation is 'mish', expected one of gelu, "),
        ("distilbert", {"seq_classif_dropout": None}, "seq_classif_dropout is None, expected a number"),
        ("distilbert", {"n_heads": 4}, "hidden_size 15 is not a multiple of its 4 attention heads"),
    ],
)
def test_wrong_settings_are_refused_in_every_family(
    family: str, changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    copy_config(family, tmp_path)
    edit(tmp_path, **changes)
    with pytest.raises(UserError, match=message) as caught:
        hf_config.read_config(tmp_path)
    assert str(caught.value).startswith(f"{tmp_path}/config.json: ")


def test_missing_setting_is_named_by_the_familys_key(tmp_path: Path) -> None:
    edit(copy_config("distilbert", tmp_path), "dim", "n_layers")
    with pytest.raises(UserError, match="dim, n_layers missing"):
        hf_config.read_config(tmp_path)


@pytest.mark.parametrize("family", FAMILIES)
def test_written_config_is_read_back(family: str, tmp_path: Path) -> None:
    config = hf_config.read_config(FIXTURES / f"{family}_classifier")
    leaves = frozenset({"head.kernel"})
    hf_config.write_config(tmp_path / "config.json", config, leaves, ("no", "yes"), "cls", {"eos_token_id": 3})
    table = FAMILIES[family]
    assert hf_config.read_config(tmp_path) == dataclasses.replace(config, family=table.saved_as or family)
    assert hf_config.read_labels(tmp_path) == ("no", "yes")
    raw = json.loads((tmp_path / "config.json").read_text())
    assert (raw["problem_type"], raw["eos_token_id"]) == ("single_label_classification", 3)
    assert (raw["id2label"], raw["label2id"]) == ({"0": "no", "1": "yes"}, {"no": 0, "yes": 1})
    original = json.loads((FIXTURES / f"{family}_classifier" / "config.json").read_text())
    assert (raw["architectures"], raw["model_type"]) == (original["architectures"], table.saved_as or family)
    raw, original = FAMILIES[table.saved_as or family].read(raw), table.read(original)
    known = {key for key, _ in table.config_keys} & original.keys()
    assert {key: raw[key] for key in known} == {key: original[key] for key in known}
    assert {key for key, _ in table.config_keys} <= raw.keys()


def test_none_is_resolved_for_keys_that_do_not_allow_null(tmp_path: Path) -> None:
    for family, key, value in (("electra", "embedding_size", 15), ("distilbert", "seq_classif_dropout", 0.3)):
        config = hf_config.read_config(FIXTURES / f"{family}_classifier")
        config = dataclasses.replace(config, embedding_size=None, classifier_dropout=None, hidden_dropout=0.3)
        hf_config.write_config(tmp_path / "config.json", config, frozenset(), None, "cls")
        raw = json.loads((tmp_path / "config.json").read_text())
        assert raw[key] == value and "id2label" not in raw and "problem_type" not in raw


def test_contradictory_label_tables_are_refused(tmp_path):
    """Refuse label2id only if it has the same names in another order: other names are unused leftovers."""
    path = tmp_path / "config.json"
    raw = {"id2label": {"0": "bad", "1": "good"}}
    for label2id, accepted in (({"bad": 0, "good": 1}, True), ({"LABEL_0": 0}, True), ({"bad": 1, "good": 0}, False)):
        path.write_text(json.dumps(raw | {"label2id": label2id}))
        if accepted:
            assert hf_config.read_labels(tmp_path) == ("bad", "good")
        else:
            with pytest.raises(UserError, match="id2label and label2id list the classes in different orders"):
                hf_config.read_labels(tmp_path)


def test_num_labels_must_be_the_number_of_outputs(directory: Path):
    edit(directory, num_labels=3, id2label={"0": "a", "1": "b", "2": "c"})
    assert hf_config.class_names(directory, 3) == ("a", "b", "c")
    edit(directory, num_labels=2)
    with pytest.raises(UserError, match=r"config\.json: num_labels is 2, but the head in the weights has 3 outputs"):
        hf_config.class_names(directory, 3)
