"""The generator of minireviews: frozen texts, balanced splits, correct grammar, and the builder."""

import hashlib
import random
import re
import tomllib
from collections import Counter
from importlib import resources

import pytest

from xtransfer.data.corpora import minireviews
from xtransfer.data.corpora.minireviews import generator as g
from xtransfer.data.corpora.minireviews import prepared
from xtransfer.errors import UserError

ALL_SPLITS = tuple(g.SPLIT_SIZES)
FROZEN = {
    "en": "a1b806a699c0404b1e02df096a4dd4a12538ef1f859fce3e793b0f59aea9b1b3",
    "de": "c5c01af5c4270b6c04733ae2660d2551c1b830f8751b647c82503825be3cb6fb",
    "fr": "a8535c2b9845d13dfd4daf168c29d6fd36a3145c5fa608a94776b7153f027efd",
    "ja": "b2ea8538abc6196d480c9558863fffa5de7f58ee14005e10d4a2a7f9e6edeb9a",
}


@pytest.fixture(scope="module")
def sentences():
    """Return, by language, 15 sentences from each frame, with random fillers and no typos."""
    rng = random.Random("sentences")
    by_language = {language: [] for language in g.LANGUAGES}
    for (group, domain), frames in g.load_language("en").frames.items():
        for frame in frames:
            for _ in range(15):
                meaning = g.draw_meaning(rng, group, domain, (frame,))
                for language in g.LANGUAGES:
                    by_language[language].append(g.realise(meaning, language))
    return by_language


@pytest.fixture(scope="module")
def texts():
    """Return the test reviews of each language."""
    return {language: [r.text for r in g.reviews(language, "test")] for language in g.LANGUAGES}


@pytest.mark.parametrize("language", g.LANGUAGES)
def test_the_texts_never_change(language):
    rows = [f"{r.label} {r.domain} {r.text}" for r in g.reviews(language, "test")[:100]]
    assert hashlib.sha256("\n".join(rows).encode()).hexdigest() == FROZEN[language]


@pytest.mark.parametrize("language", g.LANGUAGES)
def test_splits_are_balanced_and_do_not_overlap(language):
    seen = set()
    for split, size in g.SPLIT_SIZES.items():
        rows = g.reviews(language, split)
        assert len(rows) == size
        assert sum(r.label for r in rows) == size // 2
        cells = Counter((r.label, r.domain) for r in rows)
        assert len(cells) == 6 and max(cells.values()) - min(cells.values()) <= 2
        seen.update(r.text for r in rows)
    assert len(seen) == sum(g.SPLIT_SIZES.values())


def test_a_split_does_not_depend_on_how_many_splits_are_generated():
    assert g.reviews("en", "test") == g._splits("en", "test")["test"] == g._splits("en", "pretraining")["test"]


def test_unknown_languages_and_pairs_are_errors():
    with pytest.raises(KeyError, match="'es'"):
        g.reviews("es", "test")
    with pytest.raises(KeyError, match="'de-en'"):
        next(g.parallel("de-en"))


def test_about_one_percent_of_words_are_misspelt():
    rng = random.Random(0)
    correct_texts = [" ".join(g.realise(m, "en") for m in g.plan_review(rng, 1, "books")) for _ in range(2000)]
    words = changed = 0
    for text in correct_texts:
        misspelt = g.add_typos(text, "en", rng)
        assert len(misspelt.split()) == len(text.split())
        words += len(text.split())
        changed += sum(a != b for a, b in zip(text.split(), misspelt.split(), strict=True))
    assert 0.007 < changed / words < 0.014


def test_about_two_percent_of_labels_are_flipped(monkeypatch):
    monkeypatch.setattr(g, "_new_text", lambda rng, polarity, *_, long: str(polarity))
    flipped = [r for r in g._splits.__wrapped__("en", "train")["train"] if r.text != str(r.label)]
    assert 0.012 < len(flipped) / 4000 < 0.028


def test_all_languages_have_the_same_ids_in_the_same_order():
    english = g.load_language("en")
    for language in g.LANGUAGES[1:]:
        other = g.load_language(language)
        for table in ("frames", "fillers"):
            english_table, other_table = getattr(english, table), getattr(other, table)
            assert english_table.keys() == other_table.keys()
            for key in english_table:
                # The first fillers are the most frequent ones.
                assert list(english_table[key]) == list(other_table[key]), (language, key)


def test_each_frame_has_the_same_number_of_variants_in_every_language():
    for key, frames in g.load_language("en").frames.items():
        for frame, variants in frames.items():
            counts = {len(g.load_language(language).frames[key][frame]) for language in g.LANGUAGES}
            assert counts == {len(variants)}, (key, frame)


@pytest.mark.parametrize("language", g.LANGUAGES)
def test_polar_fillers_are_unique_and_have_one_polarity(language):
    words = g.load_language(language)
    for domain in g.DOMAINS:
        for slot in ("pos", "np_pos", "say_pos", "strong_pos"):
            positive = [next(iter(f.values())) for f in words.fillers[slot, domain].values()]
            negative = [next(iter(f.values())) for f in words.fillers[slot.replace("pos", "neg"), domain].values()]
            assert len(set(positive)) == len(positive) and len(set(negative)) == len(negative)
            assert not set(positive) & set(negative)


def test_shared_rules_name_existing_ids():
    rules = tomllib.loads(resources.files(minireviews).joinpath("shared.toml").read_text(encoding="utf-8"))
    fillers = g.load_language("en").fillers
    aspects = {i for domain in g.DOMAINS for i in fillers["aspect", domain]} | {"product"}
    adjectives = {i for slot in ("pos", "neg", "strong_pos", "strong_neg") for i in fillers[slot, "books"]}
    for rule in rules["unsuited"].values():
        assert set(rule["aspects"]) <= aspects and set(rule["fillers"]) <= adjectives
    for domain in g.DOMAINS:
        for aspect in (*fillers["aspect", domain], "product"):
            assert len(g._filler_ids("pos", domain, aspect)) >= 5 and len(g._filler_ids("neg", domain, aspect)) >= 5
        for frame, excluded in rules["excludes"].items():
            assert any(frame in frames for frames in g.load_language("en").frames.values())
            for slot, ids in excluded.items():
                tables = g.load_language("en").frames.items() if slot == "frame" else [(None, fillers[slot, domain])]
                assert set(ids) <= {i for _, table in tables for i in table}


NEGATIONS = [
    # (group, frame, slots, English sentence), where the group and not the adjective gives the label
    ("pos", "not_at_all", {"aspect": "plot", "neg": "dull"}, "The plot is not dull at all."),
    ("neg", "not_at_all", {"aspect": "plot", "pos": "gripping"}, "The plot is not gripping at all."),
    ("pos", "nobody", {"aspect": "plot", "neg": "dull"}, "Nobody could call the plot dull."),
    ("neg", "anything_but", {"aspect": "plot", "pos": "witty"}, "The plot is anything but witty."),
    ("pos", "not_np", {"product": "book", "np_neg": "flop"}, "This book is anything but a flop."),
    ("neg", "verdict", {"product": "book", "np_pos": "gem"}, "On balance, this book is anything but a little gem."),
    ("pos", "say", {"say_pos": "not_bored"}, "I was not bored for a moment."),
    ("neg", "say", {"say_neg": "not_touched"}, "It did not touch me."),
]


@pytest.mark.parametrize(("group", "frame", "slots", "expected"), NEGATIONS)
def test_negation_reverses_the_adjective(group, frame, slots, expected):
    if frame == "verdict":
        group, frame = f"verdict_{group}", "not_np"
    assert g.realise(g.Meaning(group, frame, "books", 0, slots), "en") == expected


def test_a_frame_with_an_adjective_of_the_other_polarity_negates_it():
    """Look for a negation in each such frame of every language."""
    negations = {
        "en": r"\b(not|anything but|nobody|never|neither|wrong|but)\b",
        "de": r"\b(nicht|alles andere als|niemand|nie|weder|aber)\b",
        "fr": r"(\bn'|\bne\b|\btout sauf\b|\bpersonne\b|\bjamais\b|\bni\b|\bmais\b|loin d')",
        "ja": r"(ん|ない|程遠い|が、|\.not\})",
    }
    for language, pattern in negations.items():
        for polarity, other in (("pos", "neg"), ("neg", "pos")):
            for group in (polarity, f"verdict_{polarity}"):
                for frame, variants in g.load_language(language).frames[group, "books"].items():
                    for variant in variants:
                        has_opposite = any(base in (other, f"np_{other}") for _, base, _, _ in g._SLOT.findall(variant))
                        negated = re.search(pattern, variant, re.IGNORECASE) is not None
                        assert negated or not has_opposite, (language, group, frame, variant)


def test_the_last_sentence_decides_the_label_of_a_mixed_review():
    rng = random.Random(3)
    mixed = 0
    for i in range(600):
        plan = g.plan_review(rng, i % 2, "dvd")
        groups = [m.group for m in plan if m.group != "neutral"]
        assert 2 <= len(plan) <= 4 and groups
        polarity, other = ("pos", "neg") if i % 2 else ("neg", "pos")
        assert groups[-1] in (polarity, f"verdict_{polarity}")
        if other in groups:
            mixed += 1
            assert groups[-1] == f"verdict_{polarity}"
    assert mixed > 100


def test_sentences_are_complete_and_punctuated(sentences):
    for language, language_sentences in sentences.items():
        for sentence in language_sentences:
            assert not re.search(r"[{}|^]|  |\s[.,]|\.\.|,\.", sentence), sentence
            assert sentence.endswith("。" if language == "ja" else "."), sentence
            assert not sentence[0].islower(), sentence
            if language == "ja":
                assert " " not in sentence, sentence
                assert re.search(r"(です|ます|ました|ません|でした|でしょう)。$", sentence), sentence


def test_english_articles_fit_the_next_word(sentences):
    for sentence in sentences["en"]:
        assert not re.search(r"\b[Aa] [aeio]\w", sentence) and not re.search(r"\b[Aa]n [^aeiouh]", sentence), sentence


def test_french_words_are_elided_and_contracted(sentences):
    for sentence in sentences["fr"]:
        low = sentence.lower()
        assert not re.search(r"\b(de|à) les?\b(?! (lâcher|recommander|commander))", low), sentence
        assert not re.search(r"\b(le|la|je|ne|que|de|se|me|si) [aeiouéèêàâîïôûœ]", low.replace("que on", "")), sentence
        assert not re.search(r"\b(que il|que elle|que on|si il|ce album)\b", low), sentence
        assert not re.search(r"\w[:;!?]", sentence), sentence


def test_french_adjectives_agree(sentences):
    words = g.load_language("fr")
    rng = random.Random(8)
    for _ in range(500):
        meaning = g.draw_meaning(rng, "pos", rng.choice(g.DOMAINS), ("is",))
        gender = words.fillers["aspect", meaning.domain][meaning.slots["aspect"]]["gender"]
        adjective = words.fillers["pos", meaning.domain][meaning.slots["pos"]][gender]
        assert g.realise(meaning, "fr").endswith(f" est {adjective}.")


def test_german_sentences_have_correct_cases_commas_and_capitals(sentences):
    genders = {"Roman": "m", "Band": "m", "Film": "m", "Buch": "n", "Album": "n", "CD": "f", "DVD": "f", "Platte": "f"}
    allowed = {"m": {"dieser", "diesen"}, "n": {"dieses"}, "f": {"diese"}}
    for sentence in sentences["de"]:
        for article, noun in re.findall(r"\b([Dd]iese[rnsm]?) (\w+)", sentence):
            assert noun == "Produktion" or article.lower() in allowed[genders[noun]], sentence
        assert not re.search(r"\b(von|durch) (mein|meine|ein|der) ", sentence), sentence
        # A full sentence after a colon starts with a capital letter.
        assert not re.search(r": (ich|das|es|die|mir|der) ", sentence), sentence
        # A comma precedes dass, warum, and wie, except in comparisons.
        correct = r", (dass|warum|wie)\b|so gut wie|war wie|wirken wie|sind wie|klingt wie|verging wie|wie von"
        assert not re.search(r"\b(dass|warum|wie)\b", re.sub(correct, "", sentence)), sentence


def test_parallel_texts_agree_in_sentences_and_numbers_and_cover_all_fillers():
    rows = list(g.parallel("de-fr", 300))
    assert rows == list(g.parallel("de-fr", 300)) and len({a for a, _ in rows}) == 300
    german_numbers, french_numbers = (g.load_language(name).fillers["number", "books"] for name in ("de", "fr"))
    for german, french in rows:
        assert german.count(". ") == french.count(". ")
        for number in german_numbers:
            if f" {german_numbers[number]['text']} Euro" in german:
                assert f" {french_numbers[number]['text']} euros" in french
    covered = " ".join(a for a, _ in g.parallel("en-de", 8000))
    for slot in ("pos", "neg", "strong_pos", "strong_neg", "np_pos", "np_neg"):
        for forms in g.load_language("en").fillers[slot, "books"].values():
            assert forms["text"] in covered


def test_parallel_text_contains_no_dev_or_test_review(monkeypatch):
    pairs = list(g.parallel("en-de", 50))
    reviews = {"en": g.reviews("en", "test"), "de": g.reviews("de", "test")}
    held_out = g.Review(pairs[7][0], 0, "books"), g.Review(pairs[9][1], 0, "books")
    extra = {("en", "test"): held_out[:1], ("de", "dev"): held_out[1:]}
    monkeypatch.setattr(g, "reviews", lambda language, split: extra.get((language, split), reviews[language]))
    filtered = list(g.parallel("en-de", 48))
    assert filtered == [pair for i, pair in enumerate(pairs) if i not in (7, 9)]


def test_pretraining_reviews_are_longer():
    rng = random.Random(0)
    for polarity in (0, 1):
        lengths = [len(g.plan_review(rng, polarity, "dvd", long=True)) for _ in range(200)]
        assert min(lengths) >= 3 and max(lengths) <= 7 and sum(lengths) / 200 > 4


def test_a_linear_classifier_needs_many_labels():
    from sklearn.feature_extraction.text import CountVectorizer
    from sklearn.linear_model import LogisticRegression

    train, test = g.reviews("en", "train"), g.reviews("en", "test")

    def accuracy(rows):
        bigrams = CountVectorizer(ngram_range=(1, 2), binary=True)
        model = LogisticRegression(max_iter=300).fit(
            bigrams.fit_transform([r.text for r in rows]), [r.label for r in rows]
        )
        return model.score(bigrams.transform([r.text for r in test]), [r.label for r in test])

    few = [accuracy(random.Random(seed).sample(train, 128)) for seed in range(5)]
    assert 0.58 < sum(few) / 5 < 0.76
    assert 0.86 < accuracy(train) < 0.96


def test_reviews_are_short(texts):
    for language in ("en", "de", "fr"):
        lengths = sorted(len(t.split()) for t in texts[language])
        assert 20 <= lengths[500] <= 35 and lengths[-20] < 55
    lengths = sorted(len(t) for t in texts["ja"])
    assert 40 <= lengths[500] <= 80


def test_reviews_are_the_same_after_building_and_reading(tmp_path, monkeypatch):
    monkeypatch.setattr(g, "SPLIT_SIZES", {"test": 30, "dev": 10, "train": 20, "unlabelled": 20, "pretraining": 40})
    monkeypatch.setattr(g, "_splits", g.cache(g._splits.__wrapped__))
    builder = prepared.prepare("fr", tmp_path)
    assert prepared.prepare("fr", tmp_path).data_dir == builder.data_dir
    assert set(builder.info.splits) == {"train", "dev", "test", "unlabelled"}
    assert "SYNTHETIC" in builder.info.description
    rows = prepared.read("fr", "test", tmp_path)
    expected = g.reviews("fr", "test")
    assert rows == [
        {"id": f"{i:05d}", "text": r.text, "label": r.label, "domain": r.domain} for i, r in enumerate(expected)
    ]
    prepared.prepare("fr-pretraining", tmp_path)
    rows = prepared.read("fr-pretraining", "pretraining", tmp_path)
    assert [row["text"] for row in rows] == [r.text for r in g.reviews("fr", "pretraining")]
    assert set(rows[0]) == {"id", "text", "domain"}


def test_parallel_pairs_are_the_same_after_building_and_reading(tmp_path, monkeypatch):
    monkeypatch.setattr(g.parallel, "__defaults__", (50,))
    prepared.prepare("en-ja", tmp_path)
    rows = prepared.read("en-ja", "parallel", tmp_path)
    assert [(row["text"], row["text_pair"]) for row in rows] == list(g.parallel("en-ja", 50))


def test_builder_errors_name_the_config_or_path(tmp_path):
    with pytest.raises(UserError, match="no config 'es'.*en-de"):
        prepared.prepare("es", tmp_path)
    with pytest.raises(UserError, match="not prepared"):
        prepared.read("en", "test", tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="/file/minireviews-.* cannot be written"):
        prepared.prepare("en", tmp_path / "file")
