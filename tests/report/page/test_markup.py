"""Markup: text is escaped wherever it goes."""

from html.parser import HTMLParser

from hypothesis import given
from hypothesis import strategies as st

from xtransfer.report.page.markup import Html, join, name_of, table, tag, text_in

TEXT = st.text(st.characters(blacklist_categories=("Cs", "Cc")))


class _Reader(HTMLParser):
    """Collect the elements, the attributes, and the text of a piece of markup."""

    def __init__(self, markup):
        super().__init__()
        self.tags, self.values, self.text = [], [], ""
        self.feed(markup)
        self.close()

    def handle_starttag(self, name, attributes):
        self.tags.append(name)
        self.values += [value for _, value in attributes]

    def handle_data(self, data):
        self.text += data


@given(TEXT, TEXT)
def test_text_and_attributes_come_back_as_they_went_in(text, value):
    reader = _Reader(tag("p", text, title=value))
    assert (reader.tags, reader.values, reader.text) == (["p"], [value], text)


@given(
    st.sampled_from(["<script>", "</style><script>alert(1)</script>", '"><img src=x onerror=y>', "<!--", "&lt;b&gt;"])
)
def test_markup_in_a_name_is_text(name):
    for markup in (name_of(name), text_in(name, name), table([name], [[name]]), join([name])):
        reader = _Reader(markup)
        assert not {"script", "img", "b"} & set(reader.tags) and name in reader.text


def test_elements_by_hand():
    assert tag("p", "a<b", None, Html("<br>")) == "<p>a&lt;b<br></p>"
    assert tag("line", x1="0%", y1=1.0, class_="k0", text_anchor=None, hidden=True, open=False) == (
        '<line x1="0%" y1="1" class="k0" hidden></line>'
    )
    assert tag("meta", charset="utf-8") == '<meta charset="utf-8">'


def test_a_language_is_stated_if_it_is_a_valid_tag():
    assert text_in("arb_Arab", "x") == '<span dir="auto" lang="arb-Arab">x</span>'
    assert text_in("no language!", "x") == '<span dir="auto">x</span>'
