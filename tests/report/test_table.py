"""The table writer: Markdown, and a terminal that is wide, narrow, or highlighted."""

import io

import pytest
from rich.console import Console

from xtransfer.report.table import Table, markdown, show, show_fields

TABLE = Table(("name", "value"), (("a|b", "1.0"), ("[red]c", "20.0")), title="Title")


def printed(width: int, *, color: bool = False, **settings) -> str:
    out = io.StringIO()
    console = Console(file=out, width=width, force_terminal=color, color_system="standard" if color else None)
    show(TABLE, console, **settings)
    return out.getvalue()


def test_markdown_by_hand():
    assert markdown(TABLE) == ["| name | value |", "| --- | ---: |", r"| a\|b | 1.0 |", "| [red]c | 20.0 |"]


@pytest.mark.parametrize("cell", ["a|b", r"a\|b"])
def test_a_bar_is_escaped_once(cell):
    assert markdown(Table(("x",), ((cell,),)))[2] == r"| a\|b |"


@pytest.mark.parametrize(("text_columns", "rule"), [(0, "| ---: | ---: |"), (2, "| --- | --- |")])
def test_text_columns_are_aligned_left(text_columns, rule):
    assert markdown(Table(("a", "b"), (), text_columns))[1] == rule


def test_markup_and_bars_are_printed_unchanged():
    text = printed(80)
    assert "Title" in text and "a|b" in text and "[red]c" in text and "20.0" in text


def test_a_narrow_terminal_wraps_cells_unless_wrap_is_off():
    assert max(map(len, printed(8).splitlines())) <= 8
    rows = [line for line in printed(8, wrap=False).splitlines() if "20.0" in line]
    assert len(rows) == 1 and "[red]c" in rows[0]


def test_only_highlighted_rows_are_red():
    lines = printed(80, color=True, highlight=[1]).splitlines()
    red = [line for line in lines if "31m" in line]
    assert len(red) == 1 and "20.0" in red[0]


def test_fields_are_in_two_columns():
    out = io.StringIO()
    show_fields([("id", "x"), ("label", "[b]good")], Console(file=out, width=40))
    assert [line.split() for line in out.getvalue().splitlines()] == [["id", "x"], ["label", "[b]good"]]
