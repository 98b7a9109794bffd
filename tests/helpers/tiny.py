"""Tiny random checkpoints and tasks for tests: real files that every command handles in seconds."""

import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
from flax import nnx

from xtransfer.models.encoder import EncoderConfig
from xtransfer.models.heads import Classifier, MaskedLM
from xtransfer.models.hf import checkpoint as hf_checkpoint

GOOD = {"en": ["good", "fine", "great"], "de": ["gut", "fein", "toll"], "fr": ["bon", "beau", "super"]}
BAD = {"en": ["bad", "poor", "awful"], "de": ["schlecht", "arm", "übel"], "fr": ["mauvais", "pauvre", "affreux"]}
FILLER = {
    "en": ["the", "film", "is", "very"],
    "de": ["der", "Film", "ist", "sehr"],
    "fr": ["le", "film", "est", "très"],
}
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]


def checkpoint(directory: Path, *, seed: int = 0, hidden: int = 16, layers: int = 1) -> Path:
    """Write a random BERT whose vocabulary is the words above, and return its directory."""
    wrapped = word_tokenizer()
    config = EncoderConfig(
        vocab_size=len(wrapped),
        hidden_size=hidden,
        num_layers=layers,
        num_heads=2,
        intermediate_size=2 * hidden,
        max_positions=32,
        hidden_dropout=0.05,
        attention_dropout=0.05,
    )
    params = nnx.state(MaskedLM(config, rngs=nnx.Rngs(seed), with_next_sentence=True), nnx.Param)
    # Multiply the usual weights by ten, so that a random encoder distinguishes words and learns in a few steps.
    params = jax.tree.map(lambda leaf: leaf * 10 if leaf.ndim > 1 else leaf, params)
    hf_checkpoint.save(directory, config, params, tokenizer=wrapped)
    return directory


def word_tokenizer(special: Sequence[str] = SPECIAL) -> Any:
    """Return a tokenizer whose vocabulary is the special tokens, in this order, and the words above."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    words = sorted({word.lower() for table in (GOOD, BAD, FILLER) for group in table.values() for word in group})
    vocab = {word: i for i, word in enumerate([*special, *words])}
    tokenizer = Tokenizer(models.WordPiece(vocab, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True, strip_accents=False)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[(name, vocab[name]) for name in ("[CLS]", "[SEP]")],
    )
    names = dict(zip(("pad_token", "unk_token", "cls_token", "sep_token", "mask_token"), SPECIAL, strict=True))
    inputs = ["input_ids", "token_type_ids", "attention_mask"]
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_input_names=inputs, **names)


def roberta(directory: Path) -> Path:
    """Write a random RoBERTa classifier and its tokenizer, and return the directory."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    special = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
    tables = (*GOOD.values(), *BAD.values(), *FILLER.values())
    words = [*special, *sorted({word for group in tables for word in group})]
    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.post_processor = processors.RobertaProcessing(("</s>", 2), ("<s>", 0))
    names = ("bos_token", "pad_token", "eos_token", "unk_token", "mask_token", "cls_token", "sep_token")
    names = dict(zip(names, [*special, "<s>", "</s>"], strict=True))
    config = EncoderConfig(
        vocab_size=len(words),
        hidden_size=16,
        num_layers=2,
        num_heads=2,
        intermediate_size=32,
        max_positions=34,
        type_vocab_size=1,
        layer_norm_eps=1e-5,
        pad_id=1,
        position_offset=2,
        head_input_dropout=True,
        family="roberta",
    )
    params = nnx.state(Classifier(config, 2, rngs=nnx.Rngs(3)), nnx.Param)
    params = jax.tree.map(lambda leaf: leaf * 10 if leaf.ndim > 1 else leaf, params)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, **names)
    hf_checkpoint.save(directory, config, params, tokenizer=tokenizer, labels=("bad", "good"))
    return directory


def write_task(directory: Path, *, train: int = 64, other: int = 16, languages: tuple[str, ...] = ("en", "de")) -> Path:
    """Write `<language>/<split>.tsv` with the columns text and label (bad or good), and return the directory."""
    for language in languages:
        for split, size in (("train", train), ("dev", other), ("test", other + 1)):
            rng = random.Random(f"{language}/{split}")
            lines = ["text\tlabel"]
            for i in range(size):
                label, words = (("good", GOOD), ("bad", BAD))[i % 2]
                tokens = [*FILLER[language], rng.choice(words[language]), rng.choice(words[language])]
                lines.append(f"{' '.join(tokens[: rng.randint(3, 4)] + tokens[-2:])}\t{label}")
            path = directory / language / f"{split}.tsv"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return directory


def config_file(path: Path, data: Path, teacher: Path, student: Path, **student_settings: object) -> Path:
    """Write the config file of an experiment that takes seconds on `write_task`'s files, and return its path."""
    settings = {
        "steps": 48,
        "evaluations": 3,
        "batch_size": 8,
        "learning_rate": 1e-2,
        "max_length": 12,
        "pooling": "mean",
    }
    lines = [
        "from xtransfer import config as settings",
        "def get_config(arg=''):",
        "    config = settings.default()",
        "    config.task.name, config.task.data_dir = 'files', " + repr(str(data)),
        "    config.task.labelled, config.task.unlabelled_from = 40, 'train_rest'",
        f"    config.teacher.checkpoint, config.student.checkpoint = {str(teacher)!r}, {str(student)!r}",
        "    config.evaluation_batch_size = 8",
        "    config.seeds = (0,)",
    ]
    lines += [f"    config.teacher.{key} = {value!r}" for key, value in settings.items()]
    lines += [f"    config.student.{key} = {value!r}" for key, value in (settings | student_settings).items()]
    path.write_text("\n".join([*lines, "    return config", ""]), encoding="utf-8")
    return path


def rows_of(workdir: Path, name: str = "results.jsonl") -> list[dict[str, Any]]:
    """Return the rows of a file of JSON lines in a directory, by default the results of a workdir, unchecked."""
    return [json.loads(line) for line in (workdir / name).read_text().splitlines()]
