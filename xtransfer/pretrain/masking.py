"""Batches for pretraining: masked tokens, and examples whose partner is to be found in the same batch.

Texts and translation pairs come in two halves, and each is laid out by `packing.pack` in one of two ways:

- **together**: a text as fine-tuning will see it, `[CLS] A B [SEP]`; a translation pair as `[CLS] A [SEP] B [SEP]`,
  whose second half restarts its positions (TLM: Conneau & Lample, "Cross-lingual Language Model Pretraining",
  NeurIPS 2019);
- **apart**: two examples, `[CLS] A [SEP]` and `[CLS] B [SEP]`, each the other's partner among all examples of the batch
  that are apart. To find its partner, the pooled `[CLS]` must express what the halves share: in a review the verdict
  (inverse cloze: Lee et al., "Latent Retrieval for Weakly Supervised Open Domain Question Answering", ACL 2019), in a
  translation the meaning (translation ranking: Feng et al., "Language-agnostic BERT Sentence Embedding", ACL 2022).

Masking is BERT's (80 % mask, 10 % random, 10 % kept), with rare tokens sampled more often.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from xtransfer.data.batches.packing import pack, rows_needed
from xtransfer.data.tokens.tokenizer import Tokens

Ids = np.ndarray  # [length] int32, without special tokens
Halves = tuple[Ids, Ids]

_APART = 0.5  # share of texts and pairs whose halves are apart
_FILL = 0.96  # share of a batch's tokens to fill, which first-fit decreasing reaches with short examples
_RARITY = 0.5  # a token of count n is masked in proportion to n ** −_RARITY


@dataclass(frozen=True)
class Special:
    """The ids of the special tokens, and the size of the vocabulary."""

    cls: int
    sep: int
    pad: int
    mask: int
    size: int


@dataclass(frozen=True)
class Shape:
    """The shape of a batch: R rows of S tokens with P masked positions, and at most M examples per row."""

    rows: int
    row_length: int
    masks: int
    slots: int = 12


class PretrainingBatches:
    """Pretraining batches by random access: batch i = f(seed, i).

    `texts` holds texts by group (a language and domain), and `pairs` translations by language pair, each in two halves.
    Groups are drawn with equal shares, and `pair_fraction` of all draws are translations.
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
        """Return a batch with `partner` [R, M], and `mlm_positions`, `mlm_targets`, and `mlm_weight` [R, P].

        `partner` is the place (row · M + slot) of the other half, −1 for an example without one.
        """
        rng = np.random.default_rng((self._seed, i))
        shape = self._shape
        examples: list[_Example] = []
        budget = _FILL * shape.rows * shape.row_length
        while budget > 0:
            drawn = self._draw(rng)
            examples += drawn
            budget -= sum(len(example.ids) for example in drawn)
        while rows_needed(_lengths(examples), shape.row_length, shape.slots) > shape.rows:
            examples = examples[:-2] if examples[-1].is_second else examples[:-1]
        batch = self._laid_out(examples)
        batch.update(self._masked(rng, batch))
        return batch

    def _draw(self, rng: np.random.Generator) -> list["_Example"]:
        """Draw a random text or pair, as one example or as its two halves."""
        is_pair = rng.random() < self._pair_fraction
        groups = self._pairs if is_pair else self._texts
        group = groups[int(rng.integers(len(groups)))]
        a, b = group[int(rng.integers(len(group)))]
        if is_pair and rng.random() < 0.5:  # either language may come first
            a, b = b, a
        cls, sep, limit = [self._special.cls], [self._special.sep], self._shape.row_length
        if rng.random() < _APART:
            halves = [np.concatenate([cls, half[: limit - 2], sep]) for half in (a, b)]
            return [_Example(half, 0, is_second=k == 1) for k, half in enumerate(halves)]
        if is_pair:
            a, b = _truncated(a, b, limit - 3)
            return [_Example(np.concatenate([cls, a, sep, b, sep]), len(a) + 2)]
        a, b = _truncated(a, b, limit - 2)
        return [_Example(np.concatenate([cls, a, b, sep]), 0)]

    def _laid_out(self, examples: Sequence["_Example"]) -> dict[str, np.ndarray]:
        shape = self._shape
        lengths = _lengths(examples)
        types = [(np.arange(len(x.ids)) >= (x.restart or len(x.ids))).astype(np.int32) for x in examples]
        ids = np.concatenate([x.ids for x in examples]).astype(np.int32)
        tokens = Tokens(ids, np.concatenate(types), np.concatenate([[0], np.cumsum(lengths)]))
        batch = pack(
            tokens,
            range(len(examples)),
            row_length=shape.row_length,
            rows=shape.rows,
            slots=shape.slots,
            pad_id=self._special.pad,
        )
        row, slot = batch.pop("slot").T
        for r, start, length, example in zip(row, batch["cls_index"][row, slot], lengths, examples, strict=True):
            if example.restart:
                batch["position_ids"][r, start + example.restart : start + length] -= example.restart
        place = row * shape.slots + slot
        second = np.flatnonzero([example.is_second for example in examples])
        partner = np.full(shape.rows * shape.slots, -1, np.int32)
        partner[place[second]], partner[place[second - 1]] = place[second - 1], place[second]
        batch["partner"] = partner.reshape(shape.rows, shape.slots)
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


@dataclass(frozen=True, eq=False)
class _Example:
    """Ids with special tokens, and where positions and token types restart (0: nowhere)."""

    ids: Ids
    restart: int
    is_second: bool = False  # the example before it is its partner


def _lengths(examples: Sequence[_Example]) -> np.ndarray:
    return np.array([len(example.ids) for example in examples], np.int64)


def _truncated(a: Ids, b: Ids, limit: int) -> Halves:
    """Cut the longer half until both fit in `limit` tokens together."""
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
