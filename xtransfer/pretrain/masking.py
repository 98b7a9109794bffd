"""Build pretraining batches: some tokens are masked, and some examples must find their partner in the batch.

Every text and every translation pair comes in two halves, A and B, and is laid out in one of two ways:

- **Joined**: one example. A text is `[CLS] A B [SEP]`, as in fine-tuning. A translation pair is
  `[CLS] A [SEP] B [SEP]`, and positions restart at B (TLM: Conneau & Lample, "Cross-lingual Language Model
  Pretraining", NeurIPS 2019).
- **Split**: two examples, `[CLS] A [SEP]` and `[CLS] B [SEP]`. Each must find the other, its partner, among all split
  examples of the batch. To do so, the pooled `[CLS]` has to express what the halves share. In a review this is the
  verdict (inverse cloze: Lee et al., "Latent Retrieval for Weakly Supervised Open Domain Question Answering", ACL
  2019). In a translation it is the meaning (translation ranking: Feng et al., "Language-agnostic BERT Sentence
  Embedding", ACL 2022).

Masking is as in BERT (80 % mask, 10 % random, 10 % unchanged), except that rare tokens are sampled more often.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from xtransfer.data.batches.packing import pack, rows_needed
from xtransfer.data.tokens.tokenizer import Tokens

Ids = np.ndarray  # [length] int32, without special tokens
Halves = tuple[Ids, Ids]

_SPLIT_FRACTION = 0.5  # share of texts and pairs whose halves become two examples
_FILL = 0.96  # share of a batch's tokens to fill, which first-fit decreasing reaches with short examples
_RARITY = 0.5  # a token that occurs n times is masked in proportion to n ** −_RARITY


@dataclass(frozen=True)
class Vocabulary:
    """The ids of the special tokens, and the size of the vocabulary."""

    cls: int
    sep: int
    pad: int
    mask: int
    size: int


@dataclass(frozen=True)
class BatchShape:
    """The shape of a batch.

    Attributes:
      rows: R, the rows of a batch.
      row_length: S, the tokens of a row.
      masks: P, the masked positions of a row.
      slots: M, the most examples in a row.
    """

    rows: int
    row_length: int
    masks: int
    slots: int = 12


class PretrainingBatches:
    """Pretraining batches by random access: batch i = f(seed, i).

    Each group of texts is drawn equally often, and so is each language pair.

    Args:
      texts: texts in two halves, by group (a language, or a language and domain).
      pairs: translations by language pair.
      vocabulary: the special tokens, and the size of the vocabulary.
      shape: the shape of a batch.
      pair_fraction: the share of draws that are translations.
      seed: the seed of all draws.
    """

    def __init__(
        self,
        texts: Mapping[str, Sequence[Halves]],
        pairs: Mapping[str, Sequence[Halves]],
        vocabulary: Vocabulary,
        shape: BatchShape,
        *,
        pair_fraction: float,
        seed: int,
    ):
        self._texts, self._pairs = list(texts.values()), list(pairs.values())
        self._vocabulary, self._shape, self._seed = vocabulary, shape, seed
        self._pair_fraction = pair_fraction if self._pairs else 0.0
        self._mask_weight = _mask_weights([*self._texts, *self._pairs], vocabulary.size)

    def __call__(self, i: int) -> dict[str, np.ndarray]:
        """Return batch i, a packed batch with four more keys.

        They are `partner` [R, M], and `mlm_positions`, `mlm_targets`, and `mlm_weight`, all [R, P]. `partner` is the
        flat index (row · M + slot) of the other half, or −1 for an example without a partner.
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
        batch = self._pack(examples)
        batch.update(self._mask(rng, batch))
        return batch

    def _draw(self, rng: np.random.Generator) -> list["_Example"]:
        """Draw a random text or translation pair, and return it as one example or as two."""
        is_pair = rng.random() < self._pair_fraction
        groups = self._pairs if is_pair else self._texts
        group = groups[int(rng.integers(len(groups)))]
        a, b = group[int(rng.integers(len(group)))]
        if is_pair and rng.random() < 0.5:  # either language may come first
            a, b = b, a
        cls, sep, limit = [self._vocabulary.cls], [self._vocabulary.sep], self._shape.row_length
        if rng.random() < _SPLIT_FRACTION:
            halves = [np.concatenate([cls, half[: limit - 2], sep]) for half in (a, b)]
            return [_Example(half, 0, is_second=k == 1) for k, half in enumerate(halves)]
        if is_pair:
            a, b = _truncate(a, b, limit - 3)
            return [_Example(np.concatenate([cls, a, sep, b, sep]), len(a) + 2)]
        a, b = _truncate(a, b, limit - 2)
        return [_Example(np.concatenate([cls, a, b, sep]), 0)]

    def _pack(self, examples: Sequence["_Example"]) -> dict[str, np.ndarray]:
        """Pack examples into rows, restart positions within them, and point each half at its partner."""
        shape = self._shape
        lengths = _lengths(examples)
        types = [(np.arange(len(x.ids)) >= (x.restart or len(x.ids))).astype(np.int32) for x in examples]  # 0, then 1
        ids = np.concatenate([x.ids for x in examples]).astype(np.int32)
        tokens = Tokens(ids, np.concatenate(types), np.concatenate([[0], np.cumsum(lengths)]))
        batch = pack(
            tokens,
            range(len(examples)),
            row_length=shape.row_length,
            rows=shape.rows,
            slots=shape.slots,
            pad_id=self._vocabulary.pad,
        )
        row, slot = batch.pop("slot").T
        for r, start, length, example in zip(row, batch["cls_index"][row, slot], lengths, examples, strict=True):
            if example.restart:
                batch["position_ids"][r, start + example.restart : start + length] -= example.restart
        flat_index = row * shape.slots + slot
        second = np.flatnonzero([example.is_second for example in examples])
        partner = np.full(shape.rows * shape.slots, -1, np.int32)
        partner[flat_index[second]] = flat_index[second - 1]
        partner[flat_index[second - 1]] = flat_index[second]
        batch["partner"] = partner.reshape(shape.rows, shape.slots)
        return batch

    def _mask(self, rng: np.random.Generator, batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Return the batch's ids with masks, and the masked positions with their targets and weights."""
        ids = batch["input_ids"]
        vocabulary = self._vocabulary
        maskable = (batch["segment_ids"] > 0) & (ids != vocabulary.cls) & (ids != vocabulary.sep)
        # The positions of the P largest log weight + Gumbel noise are a weighted sample without replacement.
        noise = np.log(self._mask_weight[ids]) + rng.gumbel(size=ids.shape)
        noise[~maskable] = -np.inf
        positions = np.argpartition(-noise, self._shape.masks - 1, axis=1)[:, : self._shape.masks]
        targets = np.take_along_axis(ids, positions, axis=1)
        weight = np.take_along_axis(maskable, positions, axis=1).astype(np.float32)
        fate = rng.random(positions.shape)
        random_ids = rng.integers(vocabulary.size, size=fate.shape)
        replacements = np.where(fate < 0.8, vocabulary.mask, np.where(fate < 0.9, targets, random_ids))
        masked = ids.copy()
        np.put_along_axis(masked, positions, np.where(weight > 0, replacements, targets).astype(np.int32), axis=1)
        return {
            "input_ids": masked,
            "mlm_positions": positions.astype(np.int32),
            "mlm_targets": targets.astype(np.int32),
            "mlm_weight": weight,
        }


@dataclass(frozen=True, eq=False)
class _Example:
    """An example to pack.

    Attributes:
      ids: the token ids, with special tokens.
      restart: the index at which positions restart and the token type changes, or 0 for neither.
      is_second: whether this is the second half of a split text. The first half is the example before it.
    """

    ids: Ids
    restart: int
    is_second: bool = False


def _lengths(examples: Sequence[_Example]) -> np.ndarray:
    return np.array([len(example.ids) for example in examples], np.int64)


def _truncate(a: Ids, b: Ids, limit: int) -> Halves:
    """Truncate the longer half, or both, so that they fit into `limit` tokens together."""
    if len(a) + len(b) <= limit:
        return a, b
    length_b = min(len(b), max(limit // 2, limit - len(a)))
    return a[: limit - length_b], b[:length_b]


def _mask_weights(groups: Sequence[Sequence[Halves]], size: int) -> np.ndarray:
    """Return the weight of each token id for masking, [size]: rare tokens have large weights."""
    counts = np.ones(size, np.float64)
    for group in groups:
        ids = np.concatenate([half for halves in group for half in halves])
        counts += np.bincount(ids, minlength=size)
    return counts**-_RARITY
