"""HTML that is escaped by construction: text becomes markup only through `tag`."""

import html
import re
from collections.abc import Iterable

_VOID = frozenset({"meta", "br"})  # elements without an end tag
_LANGUAGE_TAG = re.compile(r"[A-Za-z]{2,3}(-[A-Za-z0-9]{2,8})*")


class Html(str):
    """Text that is markup already. Any other text is escaped when it goes into a `tag`."""

    __slots__ = ()


Child = str | None
Value = str | float | bool | None


def tag(name: str, *children: Child, **attributes: Value) -> Html:
    """Return an element.

    Args:
      name: the element's name.
      children: markup, text to escape, or None for nothing.
      attributes: their values; `class_` and `x1` are written as `class` and `x1`, and an underscore inside a name as a
        hyphen. None and False leave the attribute out, and True writes its name alone.
    """
    written = "".join(
        f" {_attribute(key)}" if value is True else f' {_attribute(key)}="{html.escape(_text(value))}"'
        for key, value in attributes.items()
        if value is not None and value is not False
    )
    if name in _VOID:
        return Html(f"<{name}{written}>")
    return Html(f"<{name}{written}>{join(children)}</{name}>")


def join(children: Iterable[Child]) -> Html:
    """Return pieces of markup and text in a row, the text escaped."""
    return Html("".join(child if isinstance(child, Html) else html.escape(child or "") for child in children))


def name_of(text: str, element: str = "span") -> Html:
    """Return a name or a text of unknown script, isolated so that right-to-left text moves nothing around it."""
    return tag(element, text, dir="auto")


def text_in(language: str, text: str, element: str = "span") -> Html:
    """Return a text in a language as the task names it, with the language if it is a valid tag."""
    code = language.replace("_", "-")
    return tag(element, text, dir="auto", lang=code if _LANGUAGE_TAG.fullmatch(code) else None)


def note(*children: Child) -> Html:
    """Return a line of small text that explains the figure above it."""
    return tag("p", *children, class_="note")


def table(header: Iterable[Child], rows: Iterable[Iterable[Child]], *, text_columns: int = 1, class_: str = "") -> Html:
    """Return a table in a box of its own, which scrolls if the table is wider than the page.

    Args:
      header: the cells of the header.
      rows: the cells of each row.
      text_columns: the number of columns, from the left, that are aligned left.
      class_: classes of the table.
    """

    def cells(row: Iterable[Child], element: str) -> Html:
        return join(
            tag(
                "th" if column == 0 else element,
                cell,
                class_="text" if column < text_columns else None,
                scope="row" if column == 0 and element == "td" else None,
            )
            for column, cell in enumerate(row)
        )

    head = tag("thead", tag("tr", cells(header, "th")))
    body = tag("tbody", *(tag("tr", cells(row, "td")) for row in rows))
    return tag("div", tag("table", head, body, class_=class_ or None), class_="scroll", tabindex="0")


def _attribute(key: str) -> str:
    return key.rstrip("_").replace("_", "-")


def _text(value: str | float) -> str:
    return value if isinstance(value, str) else f"{value:.4g}"
