"""Compare a checkpoint with its reference: choose the inputs, find or compute the reference, and give the verdict."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from xtransfer.data.tokens.tokenizer import load_tokenizer, tokenize
from xtransfer.errors import CheckpointError, ConfigError, MachineError, UserError
from xtransfer.models.hf import config as hf_config
from xtransfer.models.hf.tokenizer import check_pairs, check_tokenizer
from xtransfer.parity import activations, reference
from xtransfer.parity.activations import Difference
from xtransfer.parity.reference import Reference

PAIR = ("Is the shop open on Sunday?", "It opens at ten and closes when the last guest has gone.")
SENTENCES = (
    "Yes.",
    "The soup was cold, but nobody at our table dared to say so.",
    "Der Zug nach Köln fährt heute leider zwanzig Minuten später ab.",
    "¿Quién dejó la ventana abierta anoche?",
    "L'été dernier, nous avons traversé les Pyrénées à pied.",
    "Мы купили хлеб, сыр и два килограмма яблок.",
    "这家餐馆的面条又便宜又好吃。",
    "駅の前で三時に会いましょう。",
    "كان الطريق إلى القرية طويلاً وجميلاً.",
    "बारिश के बाद आसमान साफ़ हो गया।",
    "Room 12/B: €49.90 (incl. Wi-Fi) – well, almost… 🙂",
    "She wrote the first letter in spring, when the river was high; the second came in June and spoke of the harvest, "
    "of a neighbour's wedding, and of a dog that had followed her home; in the third, which we still keep in the "
    "drawer beside the stove, she asks whether the apple trees have been cut, who looks after the bees, and why none "
    "of us has ever answered. It is not that we did not want to. My father began an answer every winter, on the good "
    "paper, by the good lamp, and every winter he put it away again because the news had grown old before the page "
    "was full, and so the three letters lie there, and the bees, I can say it now, are well.",
)


@dataclass(frozen=True)
class Report:
    """The comparison of a checkpoint with a reference.

    Attributes:
      model: the checkpoint's directory.
      source: where the reference is from.
      notes: sentences on the model and the inputs.
      rows: the difference of each activation, in the order of computation.
    """

    model: Path
    source: str
    notes: tuple[str, ...]
    rows: tuple[Difference, ...]

    @property
    def ok(self) -> bool:
        """Whether all activations agree."""
        return all(row.ok for row in self.rows)

    @property
    def verdict(self) -> str:
        """One sentence: the two are the same function, or where they first differ and by how much."""
        if self.ok:
            return f"The same function: all {len(self.rows)} activations agree with the reference."
        wrong = [row for row in self.rows if not row.ok]
        first = wrong[0]
        index = ", ".join(map(str, first.worst))
        return (
            f"NOT the same function: {len(wrong)} of {len(self.rows)} activations differ too much, first {first.name} "
            f"(by {first.maximum:.2e} at [{index}]; {first.allowed:.2e} is allowed)."
        )


def check(directory: Path, recorded: Path | None = None, record: Path | None = None) -> Report:
    """Compare a checkpoint's activations with a reference.

    Args:
      directory: the checkpoint.
      recorded: a file with a recorded reference. None computes the reference if PyTorch is installed, and otherwise
        reads the one beside the checkpoint.
      record: a file to save the computed reference to, or None.

    Raises:
      UserError: the checkpoint cannot be read, there is no reference, or it belongs to other weights.
    """
    config = hf_config.read_config(directory)
    notes = [f"{config.family}, {config.num_layers} layers of {config.hidden_size}"]
    pooling = hf_config.read_pooling(directory)
    if not hf_config.transformers_pools(config.family, pooling):
        notes.append(f"the classifier pools by {pooling}; pooled and logits use the first token, as in transformers")
    expected, source = _reference(directory, recorded, record, notes)
    if record is not None:
        reference.save(record, expected)
    tokens = int(expected.inputs["attention_mask"].sum())
    notes.append(f"{len(expected.inputs['input_ids'])} examples, {tokens} tokens")
    ours = activations.activations(directory, expected.inputs)
    try:
        rows = activations.compare(ours, expected.activations)
    except ValueError as error:
        raise CheckpointError(f"{directory}: not the architecture of the reference: {error}") from error
    if rows[-1].name != "logits":
        notes.append("the checkpoint has no trained classification head, so there are no logits to compare")
    return Report(directory, source, tuple(notes), rows)


def _reference(directory: Path, recorded: Path | None, record: Path | None, notes: list[str]) -> tuple[Reference, str]:
    """Return the reference and its origin. If it is computed here, also add a note on its inputs to `notes`."""
    if recorded is not None and record is not None:
        raise ConfigError("--record saves a newly computed reference; leave out --reference")
    if recorded is None and reference.available():
        if record is not None and record.exists() and not reference.is_reference(record):
            raise ConfigError(f"{record} exists and is not a reference; choose another file for --record")
        inputs, note = _inputs(directory)
        notes.append(note)
        computed = reference.compute(directory, inputs)
        return computed, f"computed live by {computed.made_with}"
    if record is not None:
        raise MachineError(
            "--record needs PyTorch, which is not installed; install torch, or record on another machine"
        )
    if recorded is None and not (directory / reference.FILE).is_file():
        raise MachineError(
            f"{directory}: nothing to compare with; install torch, or record a reference with --record on a machine "
            f"that has it, and pass it as --reference or copy it to {directory / reference.FILE}"
        )
    file = recorded or directory / reference.FILE
    loaded = reference.load(file, directory)
    return loaded, f"{file}, recorded by {loaded.made_with}"


def _inputs(directory: Path) -> tuple[dict[str, np.ndarray], str]:
    """Return a reference's inputs, and a note on them.

    They are sentences and a pair, tokenized by the checkpoint's own tokenizer, or random ids if it has none that fits.
    """
    config = hf_config.read_config(directory)
    try:
        tokenizer = load_tokenizer(directory)
        check_tokenizer(directory, tokenizer, hf_config.read_pooling(directory))
        tokenized = [tokenize(tokenizer, SENTENCES, None, activations.limit(config))]
    except UserError as error:
        return activations.random_inputs(config), f"inputs are random token ids ({error})"
    note = "and a pair, tokenized by the model's own tokenizer"
    try:
        check_pairs(directory, tokenizer)
        tokenized.append(tokenize(tokenizer, PAIR[:1], PAIR[1:], activations.limit(config)))
    except UserError as error:
        note = f"tokenized by the model's own tokenizer, and no pair ({error})"
    examples = [tokens.item(i) for tokens in tokenized for i in range(len(tokens))]
    return activations.pad(examples, config), f"inputs are sentences in several languages {note}"
