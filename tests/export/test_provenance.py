"""A checkpoint is named so that others find it, and no directory of this machine is told."""

import pytest

from xtransfer.export.provenance import as_code, as_line, declared_licence, origin


def test_an_embedded_checkpoint():
    found = origin("mini-bert-en")
    assert (found.name, found.text) == ("mini-bert-en", "`mini-bert-en` (part of xtransfer)")
    assert (found.hub_id, found.licence) == (None, "apache-2.0")


@pytest.mark.parametrize(
    ("checkpoint", "repo", "text"),
    [
        ("org/model", "org/model", "[org/model](https://huggingface.co/org/model)"),
        ("org/model@v1.0", "org/model", "[org/model](https://huggingface.co/org/model) at `v1.0`"),
        ("bert-base-cased", "bert-base-cased", "[bert-base-cased](https://huggingface.co/bert-base-cased)"),
    ],
)
def test_a_hub_id(checkpoint, repo, text):
    found = origin(checkpoint)
    assert (found.name, found.hub_id, found.text, found.licence) == (repo, repo, text, None)


@pytest.mark.parametrize("written", ["{}/models/my-bert", "{}/models/my-bert/", "models/my-bert", "~/models/my-bert"])
def test_a_directory_is_known_by_its_last_name_only(tmp_path, monkeypatch, written):
    directory = tmp_path / "models" / "my-bert"
    directory.mkdir(parents=True)
    (directory / "README.md").write_text("---\nlicense: mit\n---\ntext\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    found = origin(written.format(tmp_path))
    assert (found.name, found.text) == ("my-bert", "`my-bert` (a local directory)")
    assert (found.hub_id, found.licence) == (None, "mit")


def test_a_directory_that_is_gone_is_no_hub_id(tmp_path):
    found = origin(str(tmp_path / "gone"))
    assert (found.name, found.hub_id, found.licence) == ("gone", None, None)


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
def test_the_licence_is_that_of_the_front_matter(tmp_path, card, licence):
    (tmp_path / "README.md").write_text(card)
    assert declared_licence(tmp_path) == licence


def test_users_names_cannot_break_the_page():
    assert as_line("a|b\n*c* <d> [e](f) `g`") == r"a\|b \*c\* \<d\> \[e\](f) \`g\`"
    assert as_code("a|b\n`c` *d*") == r"`a\|b 'c' *d*`"
