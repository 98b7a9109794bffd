"""Batches for pretraining: masked tokens, and "does B belong to A" for the pooler.

Three kinds of example, all laid out by `packing.pack`:

- a text as fine-tuning will see it, `[CLS] A B [SEP]`, whole or with B from another text;
- BERT's pair form, `[CLS] A [SEP] B [SEP]`, with the text's own B or another's;
- a translation pair, whose second half restarts its positions (TLM: Conneau & Lample, "Cross-lingual
  Language Model Pretraining", NeurIPS 2019), true or with another sentence's translation.

The label is 1 where B belongs to A. Masking is BERT's (80 % mask, 10 % random, 10 % kept), with rare
tokens sampled more often.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from xtransfer.data.packing import pack, rows_needed
from xtransfer.data.text import Tokens

Ids = np.ndarray  # [length] int32, no special tokens
Halves = tuple[Ids, Ids]

_FOREIGN = 1 / 3  # share of examples whose B belongs to another A
_FILL = 0.96  # of a batch's tokens to aim at: first-fit decreasing reaches it with short examples
_RARITY = 0.5  # a token of count n is masked in proportion to n ** -_RARITY


@dataclass(frozen=True)
class Special:
    """Ids of the special tokens, and the size of the vocabulary."""

    cls: int
    sep: int
    pad: int
    mask: int
    size: int


@dataclass(frozen=True)
class Shape:
    """A batch: R rows of S tokens with P masked positions, at most M examples a row."""

    rows: int
    row_length: int
    masks: int
    slots: int = 8


class PretrainingBatches:
    """Random access: batch i = f(seed, i).

    `texts` maps a group (a language and domain) to its texts, each in two halves; a foreign B comes from
    the same group, so that telling it takes more than the topic. `pairs` maps a language pair to its
    translations. Texts are drawn with equal shares per group, and `pair_fraction` of all examples are pairs.
    """

    def __init__(
        self,
        texts: Mapping[str, Sequence[Halves]],
        pairs: Mapping[str, Sequence[Halves]],
        special: Special,
        shape: Shape,
        *,
        pair_fraction: float,
        seed: int,
    ):
        self._texts, self._pairs = list(texts.values()), list(pairs.values())
        self._special, self._shape, self._seed = special, shape, seed
        self._pair_fraction = pair_fraction if self._pairs else 0.0
        self._mask_weight = _mask_weights([*self._texts, *self._pairs], special.size)

    def __call__(self, i: int) -> dict[str, np.ndarray]:
        """A batch with `label` and `weight` [R, M], and `mlm_positions`, `mlm_targets` and `mlm_weight` [R, P]."""
        rng = np.random.default_rng((self._seed, i))
        shape = self._shape
        examples: list[tuple[Ids, Ids, int, int]] = []
        budget = _FILL * shape.rows * shape.row_length
        while budget > 0:
            examples.append(self._example(rng))
            budget -= len(examples[-1][0])
        lengths = np.array([len(example[0]) for example in examples])
        while rows_needed(lengths, shape.row_length, shape.slots) > shape.rows:
            lengths = lengths[:-1]
        examples = examples[: len(lengths)]
        batch = self._laid_out(examples)
        batch.update(self._masked(rng, batch))
        return batch

    def _example(self, rng: np.random.Generator) -> tuple[Ids, Ids, int, int]:
        """(input ids, token types, where positions restart or 0, label) of a random example."""
        is_pair = rng.random() < self._pair_fraction
        groups = self._pairs if is_pair else self._texts
        group = groups[int(rng.integers(len(groups)))]
        first, second = group[int(rng.integers(len(group)))]
        label = int(rng.random() >= _FOREIGN)
        if not label:
            second = group[int(rng.integers(len(group)))][1]
        swapped = is_pair and rng.random() < 0.5  # either language may come first
        a, b = (second, first) if swapped else (first, second)
        single = not is_pair and rng.random() < 0.5
        a, b = _truncated(a, b, self._shape.row_length - (2 if single else 3))
        cls, sep = [self._special.cls], [self._special.sep]
        if single:
            ids = np.concatenate([cls, a, b, sep])
            return ids, np.zeros_like(ids), 0, label
        ids = np.concatenate([cls, a, sep, b, sep])
        start = len(a) + 2
        return ids, (np.arange(len(ids)) >= start).astype(np.int32), start if is_pair else 0, label

    def _laid_out(self, examples: Sequence[tuple[Ids, Ids, int, int]]) -> dict[str, np.ndarray]:
        ids, types, restarts, labels = zip(*examples, strict=True)
        offsets = np.cumsum([0, *(len(x) for x in ids)])
        tokens = Tokens(np.concatenate(ids).astype(np.int32), np.concatenate(types).astype(np.int32), offsets)
        shape = self._shape
        batch = pack(
            tokens,
            range(len(examples)),
            row_length=shape.row_length,
            rows=shape.rows,
            slots=shape.slots,
            pad_id=self._special.pad,
        )
        row, slot = batch.pop("slot").T
        starts = batch["cls_index"][row, slot]
        for r, start, restart, length in zip(row, starts, restarts, np.diff(offsets), strict=True):
            if restart:
                batch["position_ids"][r, start + restart : start + length] -= restart
        batch["label"] = np.full((shape.rows, shape.slots), -1, np.int32)
        batch["label"][row, slot] = labels
        batch["weight"] = (batch["label"] >= 0).astype(np.float32)
        return batch

    def _masked(self, rng: np.random.Generator, batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        ids = batch["input_ids"]
        special = self._special
        maskable = (batch["segment_ids"] > 0) & (ids != special.cls) & (ids != special.sep)
        # The P largest of log weight + Gumbel noise are a weighted sample without replacement.
        noise = np.log(self._mask_weight[ids]) + rng.gumbel(size=ids.shape)
        noise[~maskable] = -np.inf
        positions = np.argpartition(-noise, self._shape.masks - 1, axis=1)[:, : self._shape.masks]
        targets = np.take_along_axis(ids, positions, axis=1)
        weight = np.take_along_axis(maskable, positions, axis=1).astype(np.float32)
        fate = rng.random(positions.shape)
        shown = np.where(
            fate < 0.8, special.mask, np.where(fate < 0.9, targets, rng.integers(special.size, size=fate.shape))
        )
        masked = ids.copy()
        np.put_along_axis(masked, positions, np.where(weight > 0, shown, targets).astype(np.int32), axis=1)
        return {
            "input_ids": masked,
            "mlm_positions": positions.astype(np.int32),
            "mlm_targets": targets.astype(np.int32),
            "mlm_weight": weight,
        }


def _truncated(a: Ids, b: Ids, limit: int) -> Halves:
    """Cuts the longer one until both fit in `limit` tokens together."""
    over = len(a) + len(b) - limit
    if over <= 0:
        return a, b
    keep_b = min(len(b), max(limit // 2, limit - len(a)))
    return a[: limit - keep_b], b[:keep_b]


def _mask_weights(groups: Sequence[Sequence[Halves]], size: int) -> np.ndarray:
    counts = np.ones(size, np.float64)
    for group in groups:
        ids = np.concatenate([half for halves in group for half in halves])
        counts += np.bincount(ids, minlength=size)
    return counts**-_RARITY
