"""A tiny multi-label task from the embedded reviews, labelled with sentiment and domain, and tiny encoders."""

import json
from pathlib import Path
from typing import Any

import jax
from flax import nnx

from xtransfer.data.corpora.minireviews import generator
from xtransfer.data.tokens.tokenizer import load_tokenizer
from xtransfer.models.encoder import EncoderConfig
from xtransfer.models.heads import MaskedLM
from xtransfer.models.hf import checkpoint as hf_checkpoint
from xtransfer.models.hf import config as hf_config
from xtransfer.predict import __main__ as predict

SIZES = {"train": 80, "dev": 24, "test": 25}
TEXTS = ["The songs are wonderful.", "A dreadful book, boring from the first page.", "I love this film! " * 20, "Hm."]
LABELS = ("books", "music", "positive")  # a negative review of a film has none


def label_set(review: generator.Review) -> list[str]:
    """Return the labels of a review in no particular order."""
    return ["positive"] * review.label + [review.domain] * (review.domain in LABELS)


def write_task(directory: Path, languages: tuple[str, ...] = ("en", "de")) -> Path:
    """Write `<language>/<split>.jsonl` with the columns id, text, and label (a list), and return the directory."""
    for language in languages:
        reviews = iter(generator.reviews(language, "test"))
        for split, size in SIZES.items():
            rows = [(number, next(reviews)) for number in range(size)]
            lines = [json.dumps({"id": f"{n}", "text": r.text, "label": label_set(r)}) + "\n" for n, r in rows]
            path = directory / language / f"{split}.jsonl"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text("".join(lines), encoding="utf-8")
    return directory


def checkpoint(directory: Path, embedded: str, *, seed: int) -> Path:
    """Write a random encoder of one layer with the tokenizer of an embedded checkpoint, and return its directory."""
    tokenizer = load_tokenizer(hf_checkpoint.resolve(embedded))
    config = EncoderConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        num_layers=1,
        num_heads=2,
        intermediate_size=32,
        max_positions=32,
        pad_id=tokenizer.pad_token_id,
    )
    params = nnx.state(MaskedLM(config, rngs=nnx.Rngs(seed), with_next_sentence=True), nnx.Param)
    # Multiply the usual weights by ten, so that a random encoder distinguishes words and learns in a few steps.
    params = jax.tree.map(lambda leaf: leaf * 10 if leaf.ndim > 1 else leaf, params)
    hf_checkpoint.save(directory, config, params, tokenizer=tokenizer)
    return directory


def config_file(root: Path, *lines: str) -> Path:
    """Write the data, two encoders, and a config file of an experiment that takes seconds; return the config file."""
    teacher = checkpoint(root / "teacher", "mini-bert-en", seed=1)
    student = checkpoint(root / "student", "mini-bert-multilingual", seed=2)
    text = [
        "from xtransfer import config as settings",
        "def get_config(arg=''):",
        "    config = settings.default()",
        f"    config.task.name, config.task.data_dir = 'files', {str(write_task(root / 'data'))!r}",
        "    config.task.path, config.task.id_column = '{language}/{split}.jsonl', 'id'",
        "    config.task.multi_label, config.task.labelled, config.task.unlabelled_from = True, 48, 'train_rest'",
        f"    config.teacher.checkpoint, config.student.checkpoint = {str(teacher)!r}, {str(student)!r}",
        "    config.evaluation_batch_size, config.seeds = 8, (0,)",
        "    for model in (config.teacher, config.student):",
        "        model.steps, model.evaluations, model.batch_size = 30, 3, 8",
        "        model.learning_rate, model.max_length, model.pooling = 1e-2, 24, 'cls'",
        *(f"    {line}" for line in lines),
        "    return config",
        "",
    ]
    path = root / "config.py"
    path.write_text("\n".join(text), encoding="utf-8")
    return path


def classifier(base: Path, directory: Path) -> Path:
    """Write a multi-label classifier whose head tells texts apart, and return its directory."""
    config = hf_config.read_config(base)
    _, params = hf_checkpoint.load_classifier(base, len(LABELS), seed=1)
    params["head"] = jax.tree.map(lambda leaf: leaf * 50, params["head"])
    tokenizer = load_tokenizer(base)
    tokenizer.model_max_length = config.max_positions  # so that others truncate texts as we do
    hf_checkpoint.save(directory, config, params, tokenizer=tokenizer, labels=LABELS, multi_label=True)
    return directory


def write_texts(directory: Path) -> Path:
    """Write `TEXTS` as the input of the predict command, and return the file."""
    path = directory / "texts.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS), encoding="utf-8")
    return path


def predicted(model: Path, source: Path, *flags: str) -> list[dict[str, Any]]:
    """Run the predict command and return the rows that it writes."""
    output = source.with_suffix(".out")
    command = ["--model", str(model), "--input", str(source), "--output", str(output), "--overwrite"]
    predict.main([*command, *flags])
    return [json.loads(line) for line in output.read_text(encoding="utf-8").splitlines()]
