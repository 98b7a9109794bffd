"""Checkpoint origins: others can find the checkpoint, and no local directory is disclosed."""

import pytest

from xtransfer.export.provenance import as_code, as_line, declared_licence, origin


def test_an_embedded_checkpoint_has_a_licence_and_no_hub_id():
    source = origin("mini-bert-en")
    assert (source.name, source.text) == ("mini-bert-en", "`mini-bert-en` (part of xtransfer)")
    assert (source.hub_id, source.licence) == (None, "apache-2.0")


@pytest.mark.parametrize(
    ("checkpoint", "repo", "text"),
    [
        ("org/model", "org/model", "[org/model](https://huggingface.co/org/model)"),
        ("org/model@v1.0", "org/model", "[org/model](https://huggingface.co/org/model) at `v1.0`"),
        ("bert-base-cased", "bert-base-cased", "[bert-base-cased](https://huggingface.co/bert-base-cased)"),
    ],
)
def test_a_hub_id_is_linked(checkpoint, repo, text):
    source = origin(checkpoint)
    assert (source.name, source.hub_id, source.text, source.licence) == (repo, repo, text, None)


@pytest.mark.parametrize("pattern", ["{}/models/my-bert", "{}/models/my-bert/", "models/my-bert", "~/models/my-bert"])
def test_a_directory_is_named_by_its_last_part_only(tmp_path, monkeypatch, pattern):
    directory = tmp_path / "models" / "my-bert"
    directory.mkdir(parents=True)
    (directory / "README.md").write_text("---\nlicense: mit\n---\ntext\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    source = origin(pattern.format(tmp_path))
    assert (source.name, source.text) == ("my-bert", "`my-bert` (a local directory)")
    assert (source.hub_id, source.licence) == (None, "mit")


def test_a_directory_that_no_longer_exists_is_not_a_hub_id(tmp_path):
    source = origin(str(tmp_path / "gone"))
    assert (source.name, source.hub_id, source.licence) == ("gone", None, None)


@pytest.mark.parametrize(
    ("card", "licence"),
    [
        ('---\nlanguage: en\nlicense: "cc-by-4.0"\n---\n', "cc-by-4.0"),
        ("---\nlanguage: en\n---\nlicense: mit\n", None),
        ("license: mit\n", None),
        ("---\nlicense: [mit\n", None),
        ("", None),
    ],
)
def test_the_licence_comes_from_the_front_matter(tmp_path, card, licence):
    (tmp_path / "README.md").write_text(card)
    assert declared_licence(tmp_path) == licence


def test_names_cannot_break_the_page():
    assert as_line("a|b\n*c* <d> [e](f) `g`") == r"a\|b \*c\* \<d\> \[e\](f) \`g\`"
    assert as_code("a|b\n`c` *d*") == r"`a\|b 'c' *d*`"
