"""Build pretraining batches: some tokens are masked, and some examples must find their partner in the batch.

Every text and every translation pair comes in two halves, A and B, and is laid out in one of two ways:

- **Joined**: one example. A text is `[CLS] A B [SEP]`, as in fine-tuning. A translation pair is
  `[CLS] A [SEP] B [SEP]`, and positions restart at B, so that a token may attend to its translation at nearly the same
  position (TLM: Conneau & Lample, "Cross-lingual Language Model Pretraining", NeurIPS 2019).
- **Split**: two examples, `[CLS] A [SEP]` and `[CLS] B [SEP]`. Each must find the other, its partner, among all split
  examples of the batch, by the mean of its tokens. The mean then has to express what the halves share: in a
  translation the meaning (translation ranking: Feng et al., "Language-agnostic BERT Sentence Embedding", ACL 2022), and
  in a text its subject and its verdict (inverse cloze: Lee et al., "Latent Retrieval for Weakly Supervised Open Domain
  Question Answering", ACL 2019). The texts of a batch are from one group, so that neither language nor domain give
  the partner away.

Masking is as in BERT (80 % mask, 10 % random, 10 % unchanged), except that rare tokens are sampled more often.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from xtransfer.data.batches.packing import pack, rows_needed
from xtransfer.data.tokens.tokenizer import Tokens

Ids = np.ndarray  # [length] int32, without special tokens
Halves = tuple[Ids, Ids]

_FILL = 0.96  # share of a batch's tokens to fill, which first-fit decreasing reaches with short examples
_RARITY = 0.5  # a token that occurs n times is masked in proportion to n ** −_RARITY


@dataclass(frozen=True)
class InputFormat:
    """How a tokenizer and an encoder expect their inputs.

    Attributes:
      cls: the id of the first token.
      sep: the id of the token after each text.
      pad: the id of padding.
      mask: the id of a masked token.
      vocab_size: V.
      position_offset: the position id of an example's first token.
    """

    cls: int
    sep: int
    pad: int
    mask: int
    vocab_size: int
    position_offset: int = 0


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

    All texts of a batch are from one group. Each group is drawn equally often, and so is each language pair. Of a text
    that is longer than a row, a random window is drawn.

    Args:
      texts: texts in two halves, by group (a language, or a language and domain).
      pairs: translations by language pair.
      input_format: the special ids, positions, and token types.
      shape: the shape of a batch.
      pair_fraction: the share of draws that are translations.
      split_texts: the share of texts that are split.
      split_pairs: the share of translations that are split.
      seed: the seed of all draws.
    """

    def __init__(
        self,
        texts: Mapping[str, Sequence[Halves]],
        pairs: Mapping[str, Sequence[Halves]],
        input_format: InputFormat,
        shape: BatchShape,
        *,
        pair_fraction: float,
        split_texts: float,
        split_pairs: float,
        seed: int,
    ):
        self._texts, self._pairs = list(texts.values()), list(pairs.values())
        self._format, self._shape, self._seed = input_format, shape, seed
        self._pair_fraction = pair_fraction if self._pairs else 0.0
        self._split_texts, self._split_pairs = split_texts, split_pairs
        self._mask_weight = _mask_weights([*self._texts, *self._pairs], input_format.vocab_size)

    def __call__(self, i: int) -> dict[str, np.ndarray]:
        """Return batch i, a packed batch with four more keys.

        They are `partner` [R, M], and `mlm_positions`, `mlm_targets`, and `mlm_weight`, all [R, P]. `partner` is the
        flat index (row · M + slot) of the other half, or −1 for an example without a partner.
        """
        rng = np.random.default_rng((self._seed, i))
        shape = self._shape
        texts = self._texts[int(rng.integers(len(self._texts)))]
        examples: list[_Example] = []
        budget = _FILL * shape.rows * shape.row_length
        while budget > 0:
            drawn = self._draw(rng, texts)
            examples += drawn
            budget -= sum(len(example.ids) for example in drawn)
        while rows_needed(_lengths(examples), shape.row_length, shape.slots) > shape.rows:
            examples = examples[:-2] if examples[-1].is_second else examples[:-1]
        batch = self._pack(examples)
        batch.update(self._mask(rng, batch))
        return batch

    def _draw(self, rng: np.random.Generator, texts: Sequence[Halves]) -> list["_Example"]:
        """Draw one of `texts` or a translation pair, and return it as one example or as two."""
        limit = self._shape.row_length
        if rng.random() < self._pair_fraction:
            group = self._pairs[int(rng.integers(len(self._pairs)))]
            a, b = group[int(rng.integers(len(group)))]
            if rng.random() < 0.5:  # either language may come first
                a, b = b, a
            if rng.random() < self._split_pairs:
                return self._halves(a[: limit - 2], b[: limit - 2])
            a, b = _truncate(a, b, limit - 3)
            return [_Example(self._enclosed(a, b), len(a) + 2)]
        a, b = texts[int(rng.integers(len(texts)))]
        if len(a) and len(b) and rng.random() < self._split_texts:
            return self._halves(a[-(limit - 2) :], b[: limit - 2])
        text = np.concatenate([a, b])
        start = int(rng.integers(max(len(text) - (limit - 2), 0) + 1))
        return [_Example(self._enclosed(text[start : start + limit - 2]))]

    def _halves(self, a: Ids, b: Ids) -> list["_Example"]:
        return [_Example(self._enclosed(a)), _Example(self._enclosed(b), is_second=True)]

    def _enclosed(self, *texts: Ids) -> Ids:
        """Return the ids of one example, with special tokens."""
        parts = [part for text in texts for part in (text, [self._format.sep])]
        return np.concatenate([[self._format.cls], *parts])

    def _pack(self, examples: Sequence["_Example"]) -> dict[str, np.ndarray]:
        """Pack examples into rows, restart positions in pairs, and point each half at its partner."""
        shape = self._shape
        lengths = _lengths(examples)
        ids = np.concatenate([example.ids for example in examples]).astype(np.int32)
        offsets = np.concatenate([[0], np.cumsum(lengths)])
        tokens = Tokens(ids, np.zeros(len(ids), np.int32), offsets, np.zeros(len(examples), bool))
        batch = pack(
            tokens,
            range(len(examples)),
            row_length=shape.row_length,
            rows=shape.rows,
            slots=shape.slots,
            pad_id=self._format.pad,
            position_offset=self._format.position_offset,
        )
        row, slot = batch.pop("slot").T
        for r, start, length, example in zip(row, batch["cls_index"][row, slot], lengths, examples, strict=True):
            if example.second:
                batch["position_ids"][r, start + example.second : start + length] -= example.second
        flat_index = row * shape.slots + slot
        second = np.flatnonzero([example.is_second for example in examples])
        partner = np.full(shape.rows * shape.slots, -1, np.int32)
        partner[flat_index[second]] = flat_index[second - 1]
        partner[flat_index[second - 1]] = flat_index[second]
        batch["partner"] = partner.reshape(shape.rows, shape.slots)
        return batch

    def _mask(self, rng: np.random.Generator, batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Return the batch's ids with masks, and the masked positions with their targets and weights."""
        ids, form = batch["input_ids"], self._format
        maskable = (batch["segment_ids"] > 0) & (ids != form.cls) & (ids != form.sep)
        # The positions of the P largest log weight + Gumbel noise are a weighted sample without replacement.
        noise = np.log(self._mask_weight[ids]) + rng.gumbel(size=ids.shape)
        noise[~maskable] = -np.inf
        positions = np.argpartition(-noise, self._shape.masks - 1, axis=1)[:, : self._shape.masks]
        targets = np.take_along_axis(ids, positions, axis=1)
        weight = np.take_along_axis(maskable, positions, axis=1).astype(np.float32)
        fate = rng.random(positions.shape)
        random_ids = rng.integers(form.vocab_size, size=fate.shape)
        replacements = np.where(fate < 0.8, form.mask, np.where(fate < 0.9, targets, random_ids))
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
      second: the index at which the second text of a joined pair starts, or 0 for a single text.
      is_second: whether this is the second half of a split text or pair. The first half is the example before it.
    """

    ids: Ids
    second: int = 0
    is_second: bool = False


def _lengths(examples: Sequence[_Example]) -> np.ndarray:
    return np.array([len(example.ids) for example in examples], np.int64)


def _truncate(a: Ids, b: Ids, limit: int) -> Halves:
    """Truncate the longer text, or both, so that they fit into `limit` tokens together."""
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
