"""Whether a tokenizer belongs to a model: matching pairs, warnings, and refusals."""

import json
import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from tests.models.hf.test_config import copy_config, edit
from xtransfer.data.tokens import tokenizer as tokenization
from xtransfer.errors import UserError
from xtransfer.models.hf import config as hf_config
from xtransfer.models.hf import tokenizer as hf_tokenizer


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    """Return a directory with a config.json that a test may change; the model has one token type."""
    return copy_config("bert", tmp_path)


BERT_SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
ROBERTA_SPECIAL = ("<s>", "<pad>", "</s>", "<unk>", "<mask>")


def bert_tokenizer(size: int = 40, special: Sequence[str] = BERT_SPECIAL, **options: Any) -> Any:
    from transformers import BertTokenizer

    words = [*special, *(f"w{i}" for i in range(size - len(special)))]
    return BertTokenizer(vocab={word: i for i, word in enumerate(words)}, name_or_path="some-tokenizer", **options)


def roberta_tokenizer(size: int = 40, special: Sequence[str] = ROBERTA_SPECIAL) -> Any:
    from transformers import RobertaTokenizer

    words = [*special, *(f"w{i}" for i in range(size - len(special)))]
    vocab = {word: i for i, word in enumerate(words)}
    return RobertaTokenizer(vocab=vocab, merges=[], name_or_path="some-tokenizer")


def three_type_tokenizer() -> Any:
    """Return a tokenizer whose texts have token type 2, so that the model needs three types."""
    from tokenizers.processors import TemplateProcessing

    tokenizer = bert_tokenizer()
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="[CLS]:0 $A:2", pair="[CLS]:0 $A:2 $B:2", special_tokens=[("[CLS]", 2)]
    )
    return tokenizer


@pytest.mark.parametrize("size", [36, 40])
def test_models_own_tokenizer_is_accepted(
    size: int, directory: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A vocabulary up to a tenth smaller is accepted too, because embeddings are rounded up."""
    edit(directory, type_vocab_size=2)
    hf_tokenizer.check_tokenizer(directory, bert_tokenizer(size))
    edit(copy_config("roberta", tmp_path), pad_token_id=1)
    hf_tokenizer.check_tokenizer(tmp_path, roberta_tokenizer(size))
    edit(copy_config("distilbert", tmp_path), pad_token_id=0)  # without token types, pairs are not checked
    hf_tokenizer.check_tokenizer(tmp_path, bert_tokenizer(size))
    assert not caplog.records


@pytest.mark.parametrize(
    ("tokenizer", "changes", "message"),
    [
        (lambda: bert_tokenizer(41), {}, "token ids up to 40, but the model embeds 40"),
        (lambda: bert_tokenizer(19), {}, "19 tokens, but the model embeds 40"),
        (lambda: roberta_tokenizer(), {"eos_token_id": 3}, "eos id 2, but the model's is 3"),
        (lambda: bert_tokenizer(bos_token="[CLS]"), {"bos_token_id": 0}, "bos id 2, but the model's is 0"),
        (lambda: bert_tokenizer(eos_token="[SEP]"), {"eos_token_id": [2, 4]}, r"eos id 3, but the model's is \[2, 4\]"),
        (lambda: three_type_tokenizer(), {}, "3 token types, but the model's type_vocab_size is 2"),
    ],
)
def test_another_models_tokenizer_is_refused(
    tokenizer: Callable[[], Any], changes: dict[str, Any], message: str, directory: Path
) -> None:
    edit(directory, **({"type_vocab_size": 2} | changes))
    with pytest.raises(UserError, match=f"^some-tokenizer: {message}") as caught:
        hf_tokenizer.check_tokenizer(directory, tokenizer())
    assert f"({directory}/config.json): another model's tokenizer?" in str(caught.value)


def test_tokenizer_without_a_leading_special_token_is_refused(directory: Path) -> None:
    from tokenizers.processors import TemplateProcessing

    edit(directory, type_vocab_size=2)
    for single, pair in (("$A", "$A $B:1"), ("$A [SEP]", "$A [SEP] $B:1 [SEP]:1")):
        tokenizer = bert_tokenizer()
        tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
            single=single, pair=pair, special_tokens=[("[SEP]", 3)]
        )
        with pytest.raises(UserError, match="some-tokenizer: no special token at the front"):
            hf_tokenizer.check_tokenizer(directory, tokenizer)


def llama_like(template: dict[str, Any], **names: str) -> Any:
    """Return a byte-level tokenizer with 40 tokens and a post-processor of several steps, as EuroBERT's."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    words = [*template["special"], *(f"w{i}" for i in range(39 - len(template["special"]))), "a"]
    backend = Tokenizer(models.BPE({word: i for i, word in enumerate(words)}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    special = [(token, i) for i, token in enumerate(template["special"])]
    steps = [processors.TemplateProcessing(single=template["single"], pair=template["pair"], special_tokens=special)]
    backend.post_processor = processors.Sequence([processors.ByteLevel(trim_offsets=False), *steps])
    return PreTrainedTokenizerFast(tokenizer_object=backend, name_or_path="some-tokenizer", **names)


LAYOUTS = {
    "mmBERT: <bos> is not the cls_token": (
        {"special": ["<pad>", "<eos>", "<bos>"], "single": "<bos> $A", "pair": "<bos> $A <bos>:1 $B:1"},
        {"pad_token": "<pad>", "bos_token": "<bos>", "eos_token": "<eos>", "cls_token": "<eos>"},
        [[2], [2, 39, 2, 39]],
    ),
    "mmBERT with <eos>": (
        {"special": ["<pad>", "<eos>", "<bos>"], "single": "<bos> $A <eos>", "pair": "<bos> $A <eos> $B:1 <eos>:1"},
        {"pad_token": "<pad>", "bos_token": "<bos>", "eos_token": "<eos>"},
        [[2, 1], [2, 39, 1, 39, 1]],
    ),
    "EuroBERT": (
        {"special": ["<|begin_of_text|>", "<|end_of_text|>"], "single": "<|begin_of_text|> $A", "pair": "$A $B:1"},
        {"bos_token": "<|begin_of_text|>", "eos_token": "<|end_of_text|>", "pad_token": "<|end_of_text|>"},
        [[0], [39, 39]],
    ),
    "EuroBERT with an end": (
        {
            "special": ["<|begin_of_text|>", "<|end_of_text|>"],
            "single": "<|begin_of_text|> $A <|end_of_text|>",
            "pair": "<|begin_of_text|> $A <|end_of_text|> $B:1 <|end_of_text|>:1",
        },
        {"bos_token": "<|begin_of_text|>", "eos_token": "<|end_of_text|>", "pad_token": "<|end_of_text|>"},
        [[0, 1], [0, 39, 1, 39, 1]],
    ),
    "ModernBERT, DeBERTa": (
        {
            "special": ["[PAD]", "[CLS]", "[SEP]"],
            "single": "[CLS] $A [SEP]",
            "pair": "[CLS] $A [SEP] $B:1 [SEP]:1",
        },
        {"pad_token": "[PAD]", "cls_token": "[CLS]", "sep_token": "[SEP]"},
        [[1, 2], [1, 39, 2, 39, 2]],
    ),
    "XLM-R: two separators in pairs": (
        {"special": ["<s>", "<pad>", "</s>"], "single": "<s> $A </s>", "pair": "<s> $A </s> </s> $B </s>"},
        {"bos_token": "<s>", "pad_token": "<pad>", "eos_token": "</s>", "cls_token": "<s>", "sep_token": "</s>"},
        [[0, 2], [0, 39, 2, 2, 39, 2]],
    ),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_any_special_token_at_the_front_is_accepted(name: str, directory: Path) -> None:
    """The first token of an example is pooled; its id and what follows the text do not matter."""
    template, names, (empty, pair) = LAYOUTS[name]
    edit(directory, type_vocab_size=2)
    tokenizer = llama_like(template, **names)
    hf_tokenizer.check_tokenizer(directory, tokenizer)
    assert tokenization.tokenize(tokenizer, [""], None, 8).item(0)[0].tolist() == empty
    assert tokenization.tokenize(tokenizer, ["a"], ["a"], 8).item(0)[0].tolist() == pair


@pytest.mark.parametrize("single", ["$A", "$A <eos>", "$A <bos>"])
def test_mean_pooling_needs_no_special_token_at_the_front(single: str, directory: Path) -> None:
    special = ["<pad>", "<eos>", "<bos>"]
    tokenizer = llama_like(
        {"special": special, "single": single, "pair": "$A $B"}, pad_token="<pad>", eos_token="<eos>"
    )
    with pytest.raises(UserError, match="some-tokenizer: no special token at the front, but the model classifies by i"):
        hf_tokenizer.check_tokenizer(directory, tokenizer)
    hf_tokenizer.check_tokenizer(directory, tokenizer, pooling="mean")


def test_another_familys_tokenizer_is_accepted_if_the_config_names_its_class(directory: Path) -> None:
    """Like multilingual-e5-small: BERT with XLM-R's tokenizer, whose special ids differ from its config.json."""
    edit(directory, bos_token_id=5, eos_token_id=6)
    with pytest.raises(UserError, match="bos id 0, but the model's is 5"):
        hf_tokenizer.check_tokenizer(directory, roberta_tokenizer())
    edit(directory, tokenizer_class="XLMRobertaTokenizer")
    hf_tokenizer.check_tokenizer(directory, roberta_tokenizer())
    with pytest.raises(UserError, match="19 tokens, but the model embeds 40"):
        hf_tokenizer.check_tokenizer(directory, roberta_tokenizer(19))


def test_other_pad_id_warns_once_if_positions_do_not_depend_on_it(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Like paraphrase-multilingual-MiniLM-L12-v2: BERT with XLM-R's tokenizer, which its config.json does not name."""
    sizes = {"vocab_size": 250_037, "hidden_size": 384, "num_hidden_layers": 12, "num_attention_heads": 12}
    sizes |= {"intermediate_size": 1536, "max_position_embeddings": 512, "type_vocab_size": 2, "pad_token_id": 0}
    settings = {"model_type": "bert", "architectures": ["BertModel"], "hidden_act": "gelu", "layer_norm_eps": 1e-12}
    (tmp_path / "config.json").write_text(json.dumps(sizes | settings | {"position_embedding_type": "absolute"}))
    tokenizer = roberta_tokenizer(250_002)
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            hf_tokenizer.check_tokenizer(tmp_path, tokenizer)
    [message] = caplog.messages
    assert message.startswith("some-tokenizer: pad id 1, but the model's is 0 (") and "no number changes" in message


def test_embedding_far_larger_than_the_vocabulary_warns(directory: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Like indobert-base-p1, which has 50,000 embeddings and 30,521 tokens."""
    edit(directory, type_vocab_size=2)
    for size, warnings in ((36, 0), (35, 1), (20, 2)):
        hf_tokenizer.check_tokenizer(directory, bert_tokenizer(size))
        assert len(caplog.messages) == warnings
    assert caplog.messages[0].startswith("some-tokenizer: only 35 tokens, but the model embeds 40 (")


def test_one_token_type_is_enough_for_single_texts(directory: Path) -> None:
    """Like klue/roberta-base and guwenbert: one token type, and BERT's tokenizer, whose pairs have two."""
    tokenizer = bert_tokenizer()
    hf_tokenizer.check_tokenizer(directory, tokenizer)  # its type_vocab_size is 1
    assert not tokenization.tokenize(tokenizer, ["w1"], None, 8).token_type_ids.any()
    with pytest.raises(
        UserError, match="^some-tokenizer: pairs have 2 token types, but the model's type_vocab_size is 1"
    ):
        hf_tokenizer.check_pairs(directory, tokenizer)
    edit(directory, type_vocab_size=2)
    hf_tokenizer.check_pairs(directory, tokenizer)
    assert tokenization.tokenize(tokenizer, ["w1"], ["w2"], 8).token_type_ids.tolist() == [0, 0, 0, 1, 1]


def test_token_types_do_not_matter_if_they_are_no_model_input(directory: Path) -> None:
    tokenizer = bert_tokenizer(model_input_names=["input_ids", "attention_mask"])
    hf_tokenizer.check_tokenizer(directory, tokenizer)  # its type_vocab_size is 1
    assert tokenization.tokenize(tokenizer, ["w1"], ["w2"], 8).token_type_ids.tolist() == [0] * 5


def test_pad_id_must_match_if_positions_depend_on_it(tmp_path: Path) -> None:
    edit(copy_config("roberta", tmp_path), tokenizer_class="RobertaTokenizer")
    with pytest.raises(UserError, match="pad id 1, but the model's is 2"):
        hf_tokenizer.check_tokenizer(tmp_path, roberta_tokenizer())


def test_special_ids_come_from_the_tokenizer() -> None:
    assert hf_tokenizer.special_ids(bert_tokenizer()) == {"pad_token_id": 0, "cls_token_id": 2, "sep_token_id": 3}
    assert hf_tokenizer.special_ids(roberta_tokenizer()) == {
        "pad_token_id": 1,
        "bos_token_id": 0,
        "eos_token_id": 2,
        "cls_token_id": 0,
        "sep_token_id": 2,
    }
    assert hf_tokenizer.special_ids(None) == {}


def test_exported_model_accepts_another_familys_tokenizer_again(directory: Path, tmp_path: Path) -> None:
    edit(directory, tokenizer_class="XLMRobertaTokenizer")
    config, tokenizer = hf_config.read_config(directory), roberta_tokenizer()
    exported = tmp_path / "exported"
    exported.mkdir()
    ids = hf_tokenizer.special_ids(tokenizer)
    hf_config.write_config(exported / "config.json", config, frozenset({"head.kernel"}), ("a", "b"), "cls", ids)
    hf_tokenizer.check_tokenizer(exported, tokenizer)


@pytest.mark.parametrize("name", ["mini-bert-en", "mini-bert-multilingual"])
def test_embedded_checkpoints_accept_their_tokenizers(name: str) -> None:
    from transformers import AutoTokenizer

    directory = Path(hf_config.__file__).parents[2] / "pretrained" / name
    hf_tokenizer.check_tokenizer(directory, AutoTokenizer.from_pretrained(str(directory), local_files_only=True))


def saved_settings(tokenizer: Any, directory: Path) -> dict[str, Any]:
    directory.mkdir()
    hf_tokenizer.save_tokenizer(tokenizer, directory)
    return json.loads((directory / "tokenizer_config.json").read_text())


def test_saved_tokenizer_names_what_transformers_4_and_5_know(tmp_path: Path) -> None:
    """transformers 4 knows no TokenizersBackend, expects a table under extra_special_tokens, and has other defaults."""
    from transformers import AutoTokenizer

    tokenizer = bert_tokenizer(extra_special_tokens=["w1"], model_max_length=64)
    expected = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_input_names": ["input_ids", "token_type_ids", "attention_mask"],
        "additional_special_tokens": ["w1"],
        "model_max_length": 64,
        "do_lower_case": True,
        "strip_accents": None,
        "tokenize_chinese_chars": True,
    }
    names = ("pad_token", "unk_token", "cls_token", "sep_token", "mask_token")
    assert saved_settings(tokenizer, tmp_path / "saved") == expected | dict(zip(names, BERT_SPECIAL, strict=True))
    for loaded in (
        AutoTokenizer.from_pretrained(str(tmp_path / "saved"), local_files_only=True),
        tokenization.load_tokenizer(tmp_path / "saved"),
    ):
        assert loaded("w1 W2", "w3")["input_ids"] == tokenizer("w1 W2", "w3")["input_ids"] == [2, 6, 7, 3, 8, 3]
        assert loaded.model_max_length == 64 and "w1" in loaded.all_special_tokens
        assert tokenization.tokenizer_fingerprint(loaded) == tokenization.tokenizer_fingerprint(tokenizer)


def test_saved_model_inputs_are_those_of_the_tokenizer(tmp_path: Path) -> None:
    """RoBERTa's class gives no token types, and the general class would."""
    settings = saved_settings(roberta_tokenizer(), tmp_path / "saved")
    assert settings["model_input_names"] == ["input_ids", "attention_mask"]
    assert "token_type_ids" not in tokenization.load_tokenizer(tmp_path / "saved")("w1", "w2")


def test_saved_merges_have_the_form_that_old_versions_read_too(tmp_path: Path) -> None:
    from transformers import RobertaTokenizer

    vocab = {word: i for i, word in enumerate([*ROBERTA_SPECIAL, "a", "b", "ab", "aab", " ", " b"])}
    merges = [("a", "b"), ("a", "ab")]
    for name, pairs, saved in (
        ("old", merges, ["a b", "a ab"]),
        ("new", [*merges, (" ", "b")], [["a", "b"], ["a", "ab"], [" ", "b"]]),  # a space in a token needs the new form
    ):
        tokenizer = RobertaTokenizer(vocab=vocab, merges=pairs)
        saved_settings(tokenizer, tmp_path / name)
        content = json.loads((tmp_path / name / "tokenizer.json").read_text())
        assert content["model"]["merges"] == saved
        assert tokenization.load_tokenizer(tmp_path / name)("aabb")["input_ids"] == [0, 8, 6, 2]


def test_tokenizer_that_fails_on_a_letter_is_refused(directory: Path) -> None:
    """Its model has no unknown token, so only words of its vocabulary can be tokenized."""
    from tokenizers.models import WordPiece

    tokenizer = bert_tokenizer()
    vocabulary = {piece: i for i, piece in enumerate(["[PAD]", "no unknown", "[CLS]", "[SEP]", "[MASK]"])}
    tokenizer.backend_tokenizer.model = WordPiece(vocabulary | {f"w{i}": i + 5 for i in range(35)}, unk_token="[?]")
    for check in (hf_tokenizer.check_tokenizer, hf_tokenizer.check_pairs):
        with pytest.raises(UserError, match=r"^some-tokenizer: the tokenizer fails on 'a': .*: correct its tokenizer"):
            check(directory, tokenizer)
