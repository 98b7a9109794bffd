"""The seeded generator of the SYNTHETIC task `minireviews`: product reviews in four languages, and parallel sentences.

A *meaning* is the id of a frame, with the id of a filler for each of its slots. The TOML file of a language says how
its frames and fillers are worded. Reviews in different languages are drawn independently; the parallel corpus words one
meaning in two languages. Everything is a pure function of the seed strings below.
"""

from __future__ import annotations

import random
import re
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, partial
from importlib import resources
from typing import Any

VERSION = "1.0.0"
# Identifies the texts in prepared data and in every workdir's record. It is the sha256 of this package's files from
# when the texts were fixed. Renew it if the texts change, which a test checks, and only then.
FINGERPRINT = "15bd3d4e7824d7165ae71a2ba4e626ef80f2f1f0bfbd9674a68653eff090d497"
LANGUAGES = ("en", "de", "fr", "ja")
PAIRS = ("en-de", "en-fr", "en-ja", "de-fr", "de-ja", "fr-ja")
DOMAINS = ("books", "dvd", "music")
LABELS = ("negative", "positive")
# Small splits first: a text belongs to the first split that drew it, so larger splits never change smaller ones.
SPLIT_SIZES = {"test": 1000, "dev": 500, "train": 4000, "unlabelled": 4000, "pretraining": 15000}
PARALLEL_SIZE = 40000
LABEL_NOISE = 0.02
TYPO_RATE = 0.01
# Japanese has no spaces. A word is about two and a half characters, and typing errors are rarer.
TYPO_RATE_PER_CHARACTER = 0.002

# Frames about one aspect, after which the verdict may still go the other way.
_CONCESSIONS = (
    "is", "is_very", "is_strong", "is_and", "not_at_all", "anything_but", "nobody", "not_as", "adv", "not_only",
    "why_some", "never", "neither", "adv_but",
)  # fmt: skip
_AFTER_CONTRAST = ("even_so", "my_verdict", "all_the_same", "recommend", "not_np", "does_not_change", "what_counts")
_SUMMARIES = ("all_in_all", "my_verdict", "very", "not_adj", "what_counts")
_SKEW = 2.5
# Frames that say plainly what they mean; the others deny, compare, or quote somebody.
_PLAIN = ("is", "is_very", "is_strong", "is_and", "np", "say", "will_like", "adv", "say_because", "not_only", "say_and")
_SLOT = re.compile(r"\{(\^?)([a-z_]+?)(\d*)(?:\.([a-z_0-9]+))?\}")
_WORD = re.compile(r"[^\W\d_]{4,}")


@dataclass(frozen=True)
class Review:
    """One review; `label` is 0 for negative and 1 for positive, after label noise."""

    text: str
    label: int
    domain: str


@dataclass(frozen=True)
class Meaning:
    """A sentence before it is worded: `group` and `domain` find the frame, `slots` maps slot names to filler ids."""

    group: str
    frame: str
    domain: str
    variant: int
    slots: Mapping[str, str]


@dataclass(frozen=True)
class Language:
    """The words of one language: frames[group, domain][id] = variants; fillers[slot, domain][id] = {form: text}."""

    frames: Mapping[tuple[str, str], Mapping[str, tuple[str, ...]]]
    fillers: Mapping[tuple[str, str], Mapping[str, Mapping[str, str]]]


def _resource(language: str) -> bytes:
    return resources.files(__package__).joinpath(f"{language}.toml").read_bytes()


@cache
def load_language(language: str) -> Language:
    """Read the words of `language`, one of LANGUAGES."""
    table = tomllib.loads(_resource(language).decode())
    columns: dict[str, list[str]] = table["forms"]
    frames = {
        (group, domain): {key: (v,) if isinstance(v, str) else tuple(v) for key, v in _merged(by_domain, domain)}
        for group, by_domain in table["frames"].items()
        for domain in DOMAINS
    }
    fillers = {
        (slot, domain): {key: _forms(columns.get(slot, ["text"]), v) for key, v in _merged(by_domain, domain)}
        for slot, by_domain in table["fillers"].items()
        for domain in DOMAINS
    }
    return Language(frames, fillers)


def _merged(by_domain: Mapping[str, Mapping[str, str]], domain: str) -> list[tuple[str, str]]:
    return [*by_domain.get("any", {}).items(), *by_domain.get(domain, {}).items()]


def _forms(columns: Sequence[str], value: str) -> dict[str, str]:
    return dict(zip(columns, value.split("|"), strict=True))


@cache
def _frame_ids(group: str, domain: str) -> tuple[str, ...]:
    return tuple(load_language(LANGUAGES[0]).frames[group, domain])


@cache
def _filler_ids(slot: str, domain: str, aspect: str = "") -> tuple[str, ...]:
    """Return the ids of the fillers of `slot`; for adjectives only those that can describe `aspect`."""
    unsuited = _unsuited(aspect) if slot in ("pos", "neg", "strong_pos", "strong_neg") else frozenset()
    return tuple(i for i in load_language(LANGUAGES[0]).fillers[slot, domain] if i not in unsuited)


@cache
def _shared() -> dict[str, Any]:
    return tomllib.loads(_resource("shared").decode())


@cache
def _unsuited(aspect: str) -> frozenset[str]:
    rules = _shared()["unsuited"].values()
    return frozenset(i for rule in rules if aspect in rule["aspects"] for i in rule["fillers"])


@cache
def _excluded(frame: str) -> frozenset[tuple[str, str]]:
    """Return the (slot, filler id) and ("frame", id) that contradict `frame` within one review."""
    pairs = _shared()["excludes"].get(frame, {})
    return frozenset((slot, i) for slot, ids in pairs.items() for i in ids)


@cache
def _frame_slots(group: str, frame: str, domain: str) -> tuple[tuple[str, str], ...]:
    """Return (slot, its base name) for every slot that any language uses in this frame."""
    names: dict[str, str] = {}
    for language in LANGUAGES:
        for variant in load_language(language).frames[group, domain][frame]:
            names.update({base + number: base for _, base, number, _ in _SLOT.findall(variant)})
    return tuple(sorted(names.items()))


def _draw_filler(rng: random.Random, slot: str, domain: str, aspect: str) -> str:
    """Draw an id. Among words that carry an opinion the first of the list are frequent, with a long tail."""
    ids = _filler_ids(slot, domain, aspect)
    return ids[int(len(ids) * rng.random() ** (_SKEW if slot.endswith(("pos", "neg")) else 1))]


def draw_meaning(
    rng: random.Random,
    group: str,
    domain: str,
    frames: Sequence[str] | None = None,
    fixed: Mapping[str, str] | None = None,
    used: set[tuple[str, str]] | None = None,
) -> Meaning:
    """Draw a sentence of `group` ("pos", "neg", "verdict_pos", "verdict_neg", or "neutral"), from `frames` if given.

    Args:
      rng: the random stream.
      group: the kind of sentence.
      domain: the review's domain.
      fixed: fillers of slots that stay the same through a review, such as the word for the product.
      used: the (slot, filler id) and ("frame", id) that the review has used; the drawn ones are added.
      frames: the frames to draw from.
    """
    used = set() if used is None else used
    frames = frames or _frame_ids(group, domain)
    frame = rng.choice(frames)
    while ("frame", frame) in used:
        frame = rng.choice(frames)
    used.add(("frame", frame))
    used.update(_excluded(frame))
    slots: dict[str, str] = {}
    for slot, base in _frame_slots(group, frame, domain):  # sorted, so an aspect comes before what describes it
        if fixed and base in fixed:
            slots[slot] = fixed[base]
            continue
        choice = _draw_filler(rng, base, domain, slots.get("aspect", "product"))
        while (base, choice) in used:
            choice = _draw_filler(rng, base, domain, slots.get("aspect", "product"))
        used.add((base, choice))
        slots[slot] = choice
    return Meaning(group, frame, domain, rng.randrange(12), slots)


def realise(meaning: Meaning, language: str) -> str:
    """Return the sentence that says `meaning` in `language`, starting with a capital letter."""
    words = load_language(language)
    variants = words.frames[meaning.group, meaning.domain][meaning.frame]

    def fill(match: re.Match[str]) -> str:
        upper, base, number, form = match.groups()
        forms = words.fillers[base, meaning.domain][meaning.slots[base + number]]
        if form in meaning.slots:  # agreement: the form that the gender of another slot's filler names
            other = form.rstrip("0123456789")
            form = words.fillers[other, meaning.domain][meaning.slots[form]]["gender"]
        text = forms[form] if form else next(iter(forms.values()))
        return _capitalised(text) if upper else text

    return _capitalised(_SLOT.sub(fill, variants[meaning.variant % len(variants)]))


def _capitalised(text: str) -> str:
    return text[:1].upper() + text[1:]


def join(sentences: Sequence[str], language: str) -> str:
    """Join sentences as the language does: with a space, or in Japanese without one."""
    return ("" if language == "ja" else " ").join(sentences)


def plan_review(rng: random.Random, polarity: int, domain: str, *, long: bool = False) -> list[Meaning]:
    """Draw the two to four sentences of a review whose author means `polarity` (0 or 1).

    A `long` review starts with two to four further opinions of the same polarity.
    """
    side, other = ("pos", "neg") if polarity else ("neg", "pos")
    polar: list[Meaning]
    fixed = {slot: rng.choice(_filler_ids(slot, domain)) for slot in ("product", "genre")}
    draw = partial(draw_meaning, rng, domain=domain, fixed=fixed, used=set())

    def opinion() -> Sequence[str] | None:
        return _PLAIN if rng.random() < 0.7 else None

    kind = rng.random()
    if kind < 0.23:  # a mixed opinion: the objection comes first, and the verdict decides
        against = [draw(other, frames=_CONCESSIONS) for _ in range(rng.choice((1, 1, 1, 2)))]
        polar = [*against, draw(f"verdict_{side}", frames=_AFTER_CONTRAST)]
    elif kind < 0.60:  # one opinion, summed up
        polar = [draw(side, frames=opinion()), draw(f"verdict_{side}", frames=_SUMMARIES)]
    else:
        polar = [draw(side, frames=opinion()) for _ in range(rng.choice((2, 2, 3)))]
    if long:
        return [*(draw(side, frames=opinion()) for _ in range(rng.choice((2, 3, 3, 4)))), *polar]
    neutral = [draw("neutral") for _ in range(rng.choice((0, 1, 1, 1, 2)))]
    if neutral and rng.random() < 0.2 and kind >= 0.60:
        return [*polar, neutral[0]]
    return [*neutral[: 4 - len(polar)], *polar]


def add_typos(text: str, language: str, rng: random.Random) -> str:
    """Return `text` with about one word in a hundred misspelt: two letters swapped, one dropped, or one doubled."""
    if language == "ja":
        hits = [i for i in range(1, len(text) - 2) if rng.random() < TYPO_RATE_PER_CHARACTER]
        spans = [(i, i + 2) for i in hits if text[i : i + 2].isalpha()]
    else:
        # Only words of four letters or more are misspelt, which are about every second one.
        spans = [m.span() for m in _WORD.finditer(text) if rng.random() < 2 * TYPO_RATE]
    for start, end in reversed(spans):
        at = start if language == "ja" else rng.randrange(start + 1, end - 1)
        pair = text[at : at + 2]
        misspelt = rng.choice((pair[::-1], pair[0], pair[0] + pair))
        text = text[:at] + misspelt + text[at + 2 :]
    return text


def _cells(size: int, rng: random.Random) -> list[tuple[int, str]]:
    """Return (label, domain) for every item, balanced to within one, and shuffled."""
    cells = [(i % 2, DOMAINS[i // 2 % 3]) for i in range(size)]
    rng.shuffle(cells)
    return cells


@cache
def _splits(language: str, last: str) -> Mapping[str, tuple[Review, ...]]:
    """Return every split up to `last` in the order of SPLIT_SIZES; no text occurs twice among them."""
    seen: set[str] = set()
    splits: dict[str, tuple[Review, ...]] = {}
    for split, size in SPLIT_SIZES.items():
        rng = random.Random(f"minireviews/{VERSION}/{language}/{split}")
        reviews = []
        for label, domain in _cells(size, rng):
            polarity = 1 - label if rng.random() < LABEL_NOISE else label
            text = _new_text(rng, polarity, domain, language, seen, long=split == "pretraining")
            reviews.append(Review(text, label, domain))
        splits[split] = tuple(reviews)
        if split == last:
            break
    return splits


def _new_text(rng: random.Random, polarity: int, domain: str, language: str, seen: set[str], *, long: bool) -> str:
    while True:
        sentences = [realise(meaning, language) for meaning in plan_review(rng, polarity, domain, long=long)]
        text = add_typos(join(sentences, language), language, rng)
        if text not in seen:
            seen.add(text)
            return text


def reviews(language: str, split: str) -> tuple[Review, ...]:
    """Return the reviews of one split, always the same ones in the same order.

    Raises:
      KeyError: an unknown language or split.
    """
    if language not in LANGUAGES or split not in SPLIT_SIZES:
        raise KeyError(f"no reviews of {language!r}/{split!r}: languages {LANGUAGES}, splits {tuple(SPLIT_SIZES)}")
    return _splits(language, "pretraining" if split == "pretraining" else "unlabelled")[split]


def parallel(pair: str, size: int = PARALLEL_SIZE) -> Iterator[tuple[str, str]]:
    """Yield `size` translation pairs of one to three sentences for `pair`, such as "en-de". They have no label.

    Raises:
      KeyError: an unknown pair.
    """
    if pair not in PAIRS:
        raise KeyError(f"no parallel text for {pair!r}: pairs {PAIRS}")
    first, second = pair.split("-")
    rng = random.Random(f"minireviews/{VERSION}/{pair}/parallel")
    groups = ("pos",) * 3 + ("neg",) * 3 + ("verdict_pos", "verdict_neg") + ("neutral",) * 2
    held_out = {review.text for name in (first, second) for split in ("test", "dev") for review in reviews(name, split)}
    seen: set[str] = set()
    while len(seen) < size:
        domain = rng.choice(DOMAINS)
        meanings = [draw_meaning(rng, rng.choice(groups), domain) for _ in range(rng.choice((1, 1, 2, 2, 3)))]
        text = join([realise(m, first) for m in meanings], first)
        translation = join([realise(m, second) for m in meanings], second)
        if text not in seen and not held_out & {text, translation}:
            seen.add(text)
            yield text, translation
