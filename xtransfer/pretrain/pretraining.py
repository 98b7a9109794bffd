"""Pretrain one encoder: tokenizer, batches, loss, training loop, and the checkpoint with its model card."""

import dataclasses
import json
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.sharding import Mesh

from xtransfer import storage
from xtransfer.config import PretrainConfig, cache_dir, refuse_pattern, user_path
from xtransfer.data import blank
from xtransfer.data.tokens.tokenizer import load_tokenizer
from xtransfer.distillation.objectives import Pair, mean
from xtransfer.errors import CheckpointError, ConfigError, DataError
from xtransfer.models.encoder import EncoderConfig
from xtransfer.models.heads import MaskedLM, segment_mean
from xtransfer.models.hf import checkpoint as hf_checkpoint
from xtransfer.models.hf import config as hf_config
from xtransfer.models.hf.tokenizer import check_tokenizer
from xtransfer.pretrain import masking, text
from xtransfer.runs.workdir import as_record, check_settings_unchanged, record
from xtransfer.runtime import compilation_cache, sharding, terminal
from xtransfer.runtime.locks import directory_lock
from xtransfer.train import loop, metrics_log, optimizer, schedules, state, steps
from xtransfer.train.checkpoints import CHECKPOINTS, fall_back, remove_leftovers
from xtransfer.train.tracking import LoggerSource, Tracking

SPECIAL_TOKENS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
_PARTNER_TEMPERATURE = 0.1  # divides the cosines
_CARD_WIDTH = 120  # characters per line of a model card
_POSITION_SCALE = 0.03  # gives the sinusoids the spread of BERT's normal(0.02)


def pretrain(
    settings: PretrainConfig,
    output: Path,
    *,
    from_earlier_step: bool = False,
    loggers: Sequence[LoggerSource] = (),
) -> None:
    """Pretrain an encoder and write its checkpoint. Only one process can work in `<output>.work` at a time.

    Args:
      settings: the recipe.
      output: the checkpoint's directory, which must not exist.
      from_earlier_step: remove the newest training checkpoint if it is damaged, and resume from the one before it.
      loggers: the loggers that follow the training.

    Raises:
      UserError: the recipe differs from the one that `<output>.work` was started with, or is wrong.
    """
    work = refuse_pattern(output.with_name(output.name + ".work"), "--output")
    compilation_cache.enable(cache_dir(settings.task))
    with directory_lock(work):
        check_settings_unchanged(work / "config.json", settings)
        if from_earlier_step:
            fall_back(work / CHECKPOINTS)
        remove_leftovers(work / CHECKPOINTS)
        _pretrain(settings, output, work, Tracking(tuple(loggers), as_record(settings)))


def _pretrain(settings: PretrainConfig, output: Path, work: Path, tracking: Tracking) -> None:
    texts, pairs = text.texts(settings.task, settings.languages), text.pairs(settings.task, settings.languages)
    empty = [name for name, group in texts.items() if all(map(blank.is_empty, group))]
    if empty or not texts:
        raise DataError(
            f"task {settings.task.name!r} has no text to pretrain on in {', '.join(empty or settings.languages)}; it "
            "is read from the unlabelled split"
        )
    mesh = sharding.make_mesh()
    if settings.rows % sharding.data_shards(mesh):
        raise ConfigError(f"config key rows is {settings.rows}; choose a multiple of the {jax.device_count()} devices")
    # Recorded only now, so that a recipe that cannot work is not held against the corrected one.
    if settings.start_from:
        tokenizer, architecture = _load_tokenizer(settings.start_from), _load_architecture(settings)
        record(work / "config.json", as_record(settings))
    else:
        record(work / "config.json", as_record(settings))
        tokenizer = _train_tokenizer(settings, texts, pairs, work / "tokenizer")
        architecture = _new_architecture(settings, tokenizer)
    batches = _batches(settings, architecture, tokenizer, texts, pairs)
    terminal.log(
        f"{sum(map(len, texts.values())):,} texts, {sum(map(len, pairs.values())):,} pairs, {len(tokenizer):,} tokens"
    )

    graphdef, params = _model(settings, architecture, mesh)
    tx = optimizer.adamw(
        weight_decay=settings.weight_decay,
        clip_norm=settings.clip_norm,
        b1=settings.adam_b1,
        b2=settings.adam_b2,
        eps=settings.adam_eps,
    )
    step = steps.make_train_step(graphdef, _loss(settings.partner_weight), tx, mesh, params)
    final_state = loop.fit(
        work,
        loop.Plan("pretraining", settings.steps, max(settings.steps // 500, 1), settings.seed),
        loop.Start(lambda: state.create(params, tx, mesh), state.abstract(params, tx, mesh)),
        step,
        schedules.learning_rates(settings),
        batches,
        None,
        mesh,
        tracking,
    )
    notes = {
        "README.md": _card(settings, architecture, metrics_log.read_metrics(work)),
        "pretraining.json": json.dumps(as_record(_without_local_paths(settings)), indent=2) + "\n",
        "pretraining.jsonl": (work / metrics_log.METRICS_FILE).read_text(encoding="utf-8"),
    }
    if settings.start_from:  # keep the recipe and the log of the checkpoint that this run starts from
        start = hf_checkpoint.resolve(settings.start_from)
        notes |= {f"start-{p.name}": p.read_text(encoding="utf-8") for p in sorted(start.glob("pretraining.json*"))}
    hf_checkpoint.save(output, architecture, final_state.params, tokenizer=tokenizer, dtype="float16", notes=notes)
    terminal.log(f"{output}: written")


def _loss(partner_weight: float) -> steps.LossFn:
    """Return the loss: cross-entropy of the masked tokens, plus `partner_weight` times the same for partners."""

    def terms(model: Any, batch: Mapping[str, jax.Array], dropout_key: jax.Array) -> steps.Terms:
        hidden = model.encode(batch, dropout_key=dropout_key)  # [R, S, H]
        logits = model.token_logits(hidden, batch)  # [R, P, V]
        losses = optax.losses.softmax_cross_entropy_with_integer_labels(logits, batch["mlm_targets"])  # [R, P]
        masked = (jnp.sum(losses * batch["mlm_weight"]), jnp.sum(batch["mlm_weight"]))
        means = segment_mean(hidden, batch["segment_ids"], batch["cls_index"].shape[1])  # [R, M, H]
        partners, correct = _partner_terms(means.reshape(-1, means.shape[-1]), batch["partner"].reshape(-1))
        loss = mean(masked) + partner_weight * mean(partners)
        return {"loss": (loss, jnp.ones(())), "masked": masked, "partner": partners, "partner_accuracy": correct}

    return terms


def _partner_terms(vectors: jax.Array, partner: jax.Array) -> tuple[Pair, Pair]:
    """Return the cross-entropy and the accuracy of finding each half's partner, by cosine, among all split examples.

    Args:
      vectors: the mean of each example's tokens, [N, H] float32; zeros in an empty slot.
      partner: the index of each example's partner, [N] int32; −1 without a partner.
    """
    vectors = vectors / jnp.linalg.norm(vectors + 1e-6, axis=-1, keepdims=True)  # [N, H]
    scores = vectors @ vectors.T / _PARTNER_TEMPERATURE  # [N, N]
    is_split = partner >= 0  # [N]
    is_candidate = is_split[None, :] & ~jnp.eye(len(partner), dtype=bool)  # [N, N]
    scores = jnp.where(is_candidate, scores, -1e9)
    losses = optax.losses.softmax_cross_entropy_with_integer_labels(scores, jnp.maximum(partner, 0))  # [N]
    count = jnp.sum(is_split).astype(jnp.float32)
    correct = jnp.sum((jnp.argmax(scores, -1) == partner) & is_split).astype(jnp.float32)
    return (jnp.sum(jnp.where(is_split, losses, 0.0)), count), (correct, count)


def _load_architecture(settings: PretrainConfig) -> EncoderConfig:
    """Return the architecture of `start_from`, or refuse one with fewer positions than a row has tokens."""
    architecture = hf_config.read_config(hf_checkpoint.resolve(settings.start_from))
    positions = architecture.max_positions - architecture.position_offset
    if settings.row_length > positions:
        raise ConfigError(f"row_length is {settings.row_length}, but {settings.start_from} has {positions} positions")
    return architecture


def _new_architecture(settings: PretrainConfig, tokenizer: Any) -> EncoderConfig:
    """Return the architecture of the recipe."""
    return EncoderConfig(
        vocab_size=len(tokenizer),
        hidden_size=settings.hidden_size,
        num_layers=settings.num_layers,
        num_heads=settings.num_heads,
        intermediate_size=settings.intermediate_size,
        max_positions=settings.max_positions,
        hidden_dropout=settings.dropout,
        attention_dropout=settings.dropout,
        pad_id=tokenizer.pad_token_id,
    )


def _model(settings: PretrainConfig, architecture: EncoderConfig, mesh: Mesh) -> tuple[Any, nnx.State]:
    """Return the graphdef, with the dropout of pretraining, and the parameters of `start_from`, or new ones."""
    architecture = architecture.with_dropout(settings.pretraining_dropout)
    if settings.start_from:
        directory = hf_checkpoint.resolve(settings.start_from)
        if not hf_checkpoint.has_language_model(directory):
            terminal.log(f"{settings.start_from} has no language model's head; starting with a new one")
        return hf_checkpoint.load_masked_lm(directory, seed=settings.seed, mesh=mesh, config=architecture)
    model = MaskedLM(architecture, rngs=nnx.Rngs(settings.seed))
    # If the learned positions start as sinusoids, the loss leaves its first plateau much sooner.
    table = _POSITION_SCALE * _sinusoids(architecture.max_positions, architecture.hidden_size)
    model.encoder.embeddings.position_embeddings.embedding[...] = jnp.asarray(table, jnp.float32)
    return nnx.split(model, nnx.Param)


def _sinusoids(length: int, size: int) -> np.ndarray:
    """Return sinusoidal positions [length, size] (Vaswani et al., "Attention Is All You Need", 2017, section 3.5)."""
    angle = np.arange(length)[:, None] / 10_000 ** (np.arange(0, size, 2)[None, :] / size)
    return np.stack([np.sin(angle), np.cos(angle)], axis=-1).reshape(length, -1)[:, :size]


def _load_tokenizer(start_from: str) -> Any:
    """Return the tokenizer of a checkpoint, or refuse one that does not suit its model or masking."""
    start = hf_checkpoint.resolve(start_from)
    tokenizer = load_tokenizer(start)
    check_tokenizer(start, tokenizer)
    if tokenizer.mask_token_id is None:
        raise CheckpointError(f"{start_from}: its tokenizer has no mask token, so it cannot be pretrained further")
    return tokenizer


def _train_tokenizer(
    settings: PretrainConfig, texts: Mapping[str, list[str]], pairs: Mapping[str, Any], directory: Path
) -> Any:
    """Return a WordPiece tokenizer that lower-cases text and keeps accents. It is trained once per run."""
    from tokenizers import BertWordPieceTokenizer
    from transformers import BertTokenizerFast  # type: ignore[attr-defined]  # defined at run time

    if not directory.exists():
        trained = BertWordPieceTokenizer(lowercase=True, strip_accents=False, handle_chinese_chars=True)
        lines = [line for group in texts.values() for line in group]
        lines += [side for group in pairs.values() for pair in group for side in pair]
        trained.train_from_iterator(
            lines,
            vocab_size=settings.vocab_size,
            min_frequency=2,
            show_progress=False,
            special_tokens=list(SPECIAL_TOKENS),
        )
        wrapped = BertTokenizerFast(
            tokenizer_object=trained._tokenizer,
            do_lower_case=True,
            strip_accents=False,
            model_max_length=settings.max_positions,
        )
        with storage.atomic_directory(directory) as partial:
            wrapped.save_pretrained(partial)
    return load_tokenizer(directory)


def _batches(
    settings: PretrainConfig,
    architecture: EncoderConfig,
    tokenizer: Any,
    texts: Mapping[str, list[str]],
    pairs: Mapping[str, list[tuple[str, str]]],
) -> masking.PretrainingBatches:
    """Tokenize the texts and the translation pairs, and return batches of them."""

    def encode(examples: list[tuple[str, str]]) -> list[masking.Halves]:
        flat = [half for example in examples for half in example]
        encodings = tokenizer.backend_tokenizer.encode_batch(flat, add_special_tokens=False)
        ids = [np.asarray(encoding.ids, np.int32) for encoding in encodings]
        return list(zip(ids[::2], ids[1::2], strict=True))

    # Only split texts are tokenized in halves, because a tokenizer may treat the seam differently.
    split = text.halves if settings.split_texts else lambda line: (line, "")
    halves = {name: encode([split(line) for line in group]) for name, group in texts.items()}
    halves = {name: [(a, b) for a, b in group if len(a) + len(b)] for name, group in halves.items()}
    translations = {name: [(a, b) for a, b in encode(group) if len(a) and len(b)] for name, group in pairs.items()}
    return masking.PretrainingBatches(
        halves,
        {name: group for name, group in translations.items() if group},
        masking.InputFormat(
            cls=tokenizer.cls_token_id,
            sep=tokenizer.sep_token_id,
            pad=tokenizer.pad_token_id,
            mask=tokenizer.mask_token_id,
            vocab_size=architecture.vocab_size,
            position_offset=architecture.position_offset,
        ),
        masking.BatchShape(settings.rows, settings.row_length, settings.masks, max(12, settings.row_length // 8)),
        pair_fraction=settings.pair_fraction,
        split_texts=settings.split_texts,
        split_pairs=settings.split_pairs,
        seed=settings.seed,
    )


def _without_local_paths(settings: PretrainConfig) -> PretrainConfig:
    """Return the recipe without this machine's directories. Of `start_from`, keep only the name."""
    task = dataclasses.replace(settings.task, cache_dir="", data_dir="")
    return dataclasses.replace(settings, task=task, start_from=_name(settings.start_from))


def _card(settings: PretrainConfig, architecture: EncoderConfig, log: Sequence[Mapping[str, float]]) -> str:
    """Return the model card: what the model is, how and from what it was trained, and what it is not for."""
    languages = "\n".join(f"- {language}" for language in settings.languages)
    start, last = _name(settings.start_from), log[-1]
    header = f"---\nlanguage:\n{languages}\n" + ("" if start else "license: apache-2.0\n")
    origin = _FURTHER.format(start=start) if start else _FROM_SCRATCH
    if settings.task.name == "minireviews":
        origin += " The text is synthetic: a program wrote it."
    recipe = (
        f"Batches have {settings.rows} packed rows of {settings.row_length} tokens with {settings.masks} masks each, "
        f"for {settings.steps:,} steps."
    )
    found = ""
    if settings.split_texts or settings.split_pairs:
        recipe += (
            f" If the text has translations, {settings.pair_fraction:.0%} of the draws are translation pairs. "
            f"{settings.split_texts:.0%} of the texts and {settings.split_pairs:.0%} of the pairs are split into two "
            "examples, each of which must find the other in the batch."
        )
        found = f", and {last['partner_accuracy']:.1%} of the other halves are found"
    points = [
        f"**Recipe**: `pretraining.json`, the settings of `python -m xtransfer.pretrain`, with seed {settings.seed}. "
        + recipe,
        "**Log**: `pretraining.jsonl`. At the end of training, on the training batches, the loss is "
        f"{last['masked']:.3f} nats per masked token{found}.",
        "**Weights**: float16, converted to float32 when loaded. Tokenizer and weights belong together, because "
        "training a tokenizer is not deterministic.",
    ]
    if start:
        points.append(f"**Licence**: see `{start}`.")
    else:
        points.append("**Licence**: Apache 2.0, text and weights.")
    size = f"It has {architecture.num_layers} layers of width {architecture.hidden_size}."
    body = [
        f"# A small encoder for {', '.join(settings.languages)}",
        textwrap.fill(f"{origin} It was trained on the text of the task `{settings.task.name}`. {size}", _CARD_WIDTH),
        "\n".join(textwrap.fill(f"- {point}", _CARD_WIDTH, subsequent_indent="  ") for point in points),
    ]
    return f"{header}library_name: transformers\n---\n\n" + "\n\n".join(body) + "\n"


def _name(start_from: str) -> str:
    """Return the name of a checkpoint without local directories; a hub id stays as it is."""
    return Path(start_from).name if user_path(start_from).exists() else start_from


_FROM_SCRATCH = (
    "This encoder was pretrained from scratch, to try out methods on a laptop's CPU in minutes. It has seen no other "
    "text than named below, so no conclusion about real languages can be drawn from it."
)
_FURTHER = "This encoder was pretrained further from `{start}`."
