"""How several source languages share one sample."""

from collections import Counter
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from xtransfer.config import TaskConfig
from xtransfer.data import sampling
from xtransfer.data.task import Example, Task
from xtransfer.errors import ConfigError


def config(*languages: str, **settings: object) -> TaskConfig:
    return TaskConfig(source_language=languages[0], source_languages=languages, **settings)


def examples(language: str, *counts: int) -> list[Example]:
    """Return examples of as many classes as there are counts."""
    labels = [label for label, count in enumerate(counts) for _ in range(count)]
    return [Example(f"t/train/{language}/{i}", f"text {i}", None, label, language) for i, label in enumerate(labels)]


@pytest.mark.parametrize(
    ("total", "weights", "parts"),
    [
        (10, (6, 3, 1), (6, 3, 1)),
        (7, (1, 1, 1), (3, 2, 2)),  # equal claims: in order
        (4, (6, 3, 1), (3, 1, 0)),  # claims 6, 3, 2, and then 6/5 before 3/3 and 1/1
        (8, (3, 1), (6, 2)),
        (2, (5, 2), (1, 1)),  # claims 5, and then 2/1 before 5/3
        (0, (3, 1), (0, 0)),
        (5, (0, 0), (0, 0)),
        (5, (2, 0), (5, 0)),
        (1000, (1e-300, 3e-300), (250, 750)),
    ],
)
def test_parts_by_hand(total, weights, parts):
    assert sampling.split_total(total, weights) == parts


@given(st.integers(0, 300), st.lists(st.integers(1, 100), min_size=1, max_size=6))
def test_parts_are_those_of_one_claim_after_the_other_and_never_shrink(total, weights):
    parts = [0] * len(weights)
    for _ in range(total):
        claims = [Fraction(weight, 2 * part + 1) for weight, part in zip(weights, parts, strict=True)]
        parts[claims.index(max(claims))] += 1
    assert list(sampling.split_total(total, weights)) == parts
    larger = sampling.split_total(total + 1, weights)
    assert all(after >= before for before, after in zip(parts, larger, strict=True))


def test_temperature_by_hand():
    assert sampling.temperature_weights((100, 25), 1) == (100, 25)
    assert sampling.temperature_weights((100, 25, 0), 2) == (1, 0.5, 0)
    assert sampling.temperature_weights((8, 1), 3) == pytest.approx((1, 0.5))


@pytest.mark.parametrize(
    ("settings", "sizes"),
    [
        ({}, (100, 25)),
        ({"labelled": 20}, (16, 4)),
        ({"labelled": 30, "sampling_temperature": 2.0}, (20, 10)),
        ({"labelled": 8, "source_shares": (1.0, 3.0)}, (2, 6)),
        ({"sampling_temperature": 2.0}, (50, 25)),
        ({"source_shares": (1.0, 1.0)}, (25, 25)),
        ({"source_shares": (0.1, 0.2)}, (12, 25)),  # 37 of at most 37.5
    ],
)
def test_sizes_of_sources_by_hand(settings, sizes):
    result = sampling.source_sizes({"en": 100, "de": 25}, config("en", "de", **settings), "labelled")
    assert result == dict(zip(("en", "de"), sizes, strict=True))


def test_no_part_of_the_largest_sample_is_more_than_available():
    # Of 40, the exact shares are 38.4 and 0.4, and the first language would have all 40.
    languages = ("a", "b", "c", "d", "e")
    settings = config(*languages, source_shares=(96.0, 1.0, 1.0, 1.0, 1.0))
    available = dict(zip(languages, (39, 1, 1, 1, 1), strict=True))
    assert sampling.source_sizes(available, settings, "unlabelled") == available | dict.fromkeys("bcde", 0)


def test_unlabelled_text_has_a_size_of_its_own():
    settings = config("en", "de", labelled=6, unlabelled=9, source_shares=(2.0, 1.0))
    assert sampling.source_sizes({"en": 50, "de": 50}, settings, "unlabelled") == {"en": 6, "de": 3}


@given(st.lists(st.integers(1, 500), min_size=2, max_size=4), st.floats(1, 50))
def test_the_largest_sample_fits_and_no_larger_one_has_the_exact_shares(counts, temperature):
    languages = [f"l{i}" for i in range(len(counts))]
    available = dict(zip(languages, counts, strict=True))
    settings = config(*languages, sampling_temperature=temperature)
    sizes = sampling.source_sizes(available, settings, "unlabelled")
    assert all(0 <= sizes[language] <= available[language] for language in languages)
    weights = sampling.temperature_weights(counts, temperature)
    one_more = sum(sizes.values()) + len(counts) + 1
    assert any(one_more * w / sum(weights) > n - 0.5 for w, n in zip(weights, counts, strict=True))


def test_samples_that_are_not_available_are_errors():
    shares = {"source_shares": (1.0, 1.0)}
    with pytest.raises(ConfigError, match=r"task.labelled 80: the share of de is 40 examples, .*: 25; 0 takes 50 in"):
        sampling.source_sizes({"en": 100, "de": 25}, config("en", "de", labelled=80, **shares), "labelled")
    with pytest.raises(ConfigError, match="task.unlabelled 0: there is no such text in de: add some"):
        sampling.source_sizes({"en": 100, "de": 0}, config("en", "de", **shares), "unlabelled")
    train = {"en": examples("en", 30, 30), "de": examples("de", 1, 1)}
    with pytest.raises(ConfigError, match="task.labelled 4 leaves no example in de: raise it, or the share of de"):
        sampling.labelled_in_sources(train, config("en", "de", labelled=4))
    train["de"] = examples("de", 30, 1)
    with pytest.raises(ConfigError, match="task.labelled 6 in de, balanced over classes, .*: bad 30, good 1"):
        sampling.labelled_in_sources(train, config("en", "de", labelled=12, **shares), ("bad", "good"))


@given(st.integers(4, 40), st.integers(4, 40), st.integers(0, 5))
def test_labelled_samples_are_nested_balanced_and_those_of_each_language_alone(n, m, seed):
    n, m = sorted((n, m))
    train = {"en": examples("en", 30, 30), "de": examples("de", 15, 15)}
    few, many = (
        sampling.labelled_in_sources(train, config("en", "de", labelled=k, labelled_seed=seed)) for k in (n, m)
    )
    for language in train:
        assert few[language] == many[language][: len(few[language])]
        counts = Counter(example.label for example in many[language])
        assert abs(counts[0] - counts[1]) <= 1
        assert many[language] == sampling.labelled_subset(train[language], len(many[language]), seed)


def test_samples_without_a_size_keep_the_order_and_the_ids():
    train = {"en": examples("en", 4, 4), "de": examples("de", 2, 2)}
    assert sampling.labelled_in_sources(train, config("en", "de")) == train
    drawn = sampling.labelled_in_sources(train, config("en", "de", source_shares=(1.0, 1.0)))
    assert drawn["de"] == train["de"] and len(drawn["en"]) == 4
    assert [example for example in train["en"] if example in drawn["en"]] == drawn["en"]
    # numpy.random.default_rng([0, 0]).permutation(8) starts with 2, 3, 4, and 6 in some order.
    assert [example.id for example in drawn["en"]] == [f"t/train/en/{i}" for i in (2, 3, 4, 6)]
    other = sampling.labelled_in_sources(train, config("en", "de", source_shares=(1.0, 1.0), labelled_seed=1))
    assert other["en"] != drawn["en"]


def test_unlabelled_samples_leave_labelled_examples_out():
    train = {"en": examples("en", 30, 30), "de": examples("de", 15, 15)}
    task = Task(
        name="t",
        labels=("bad", "good"),
        source_language="en",
        target_languages=("fr",),
        load=lambda split, language: train[language],
        fingerprint=lambda: "",
        synthetic=True,
        pretraining=lambda language: {},
        parallel=lambda first, second: [],
    )
    labelled = {"en": train["en"][:20], "de": train["de"][:20]}
    settings = config("en", "de", unlabelled=10)
    drawn = sampling.unlabelled_in_sources(task, "train_rest", settings, labelled)
    assert {language: len(drawn[language]) for language in drawn} == {"en": 8, "de": 2}  # of 40 and 10
    assert all(example.label == -1 for split in drawn.values() for example in split)
    for language, split in drawn.items():
        assert not {example.id for example in split} & {example.id for example in labelled[language]}
    assert sampling.unlabelled_in_sources(task, "none", settings, labelled) == {"en": [], "de": []}
