"""Charts: axes and positions, worked out by hand."""

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from xtransfer.evaluation.calibration import Bin
from xtransfer.report.page import charts
from xtransfer.report.page.charts import Axis, Dot, Line, Point
from xtransfer.report.page.markup import Html

BLUE = charts.kinds(["monox_kd"])["monox_kd"]
PERCENT = Axis(0, 100, ((0, "0"), (100, "100")), "%")


@pytest.mark.parametrize(
    ("values", "settings", "texts"),
    [
        ([61, 93], {}, ["60", "70", "80", "90", "100"]),  # 32 / 4 = 8, and the next round step is 10
        ([0, 1], {"ticks": 2}, ["0", "0.5", "1.0"]),
        ([-2, 7], {"ticks": 3, "signed": True}, ["-5", "0", "+5", "+10"]),
        ([0, 3], {"whole": True}, ["0", "1", "2", "3"]),
        ([5, 5], {"ticks": 5}, ["5", "6"]),
        ([], {"ticks": 1}, ["0", "1"]),
    ],
)
def test_axes_by_hand(values, settings, texts):
    assert [text for _, text in charts.axis(values, "x", **settings).ticks] == texts


@given(st.lists(st.floats(-1e6, 1e6), min_size=1), st.integers(1, 8))
def test_an_axis_holds_its_values_between_a_few_ticks(values, ticks):
    axis = charts.axis(values, "x", ticks=ticks)
    margin = 1e-6 * (axis.high - axis.low)
    assert axis.low - margin <= min(values) and max(values) <= axis.high + margin
    assert 2 <= len(axis.ticks) <= ticks + 3


def test_baseline_and_teacher_always_look_the_same():
    assert charts.kinds(["x", "vanilla", "y"])["vanilla"] == charts.kinds(["vanilla"])["vanilla"]
    looks = charts.kinds(["teacher", "vanilla", *"abcdefg"])
    assert len({kind.colour for kind in looks.values()}) == 9
    assert len({looks[name].shape for name in "abcdefg"}) == 7


def test_a_row_of_dots_by_hand():
    rows = [(Html("de"), [Dot(25.0, BLUE, "a<b", (10.0, 40.0))])]
    markup = charts.dot_rows(rows, PERCENT, "x")
    assert 'x1="10.00%" x2="40.00%"' in markup and 'x="25.00%"' in markup and "a&lt;b" in markup


def test_a_line_and_a_point_by_hand():
    line = Line(((0, 0), (50, 100)), BLUE, "run", marked=frozenset({50}))
    markup = charts.line_chart([line], PERCENT, PERCENT, "x")
    assert '<line x1="0.00%" y1="150" x2="50.00%" y2="0">' in markup
    assert markup.count("scale(.5)") == 1  # only the point that is not marked is small
    points = [Point(90, 50, BLUE, "t", "de")]
    assert 'x="90.00%" y="75" dx="8"' in charts.scatter(points, PERCENT, PERCENT, "x")


def test_labels_that_would_cover_each_other_move_or_go():
    place = charts._label_places
    assert place([(100, 50, "de")]) == [("start", 8, 4)]
    assert place([(245, 50, "de")]) == [("end", -8, 4)]  # 13 pixels wide, and the chart has 250
    # The first label is right of its point. There the second point is in the way, so the label goes to the left.
    assert place([(100, 50, "de"), (112, 50, "fr")]) == [("end", -8, 4), ("start", 8, 4)]
    crowd = place([(100, 50, name) for name in ("aa", "bb", "cc", "dd", "ee")])
    assert crowd[-1] is None and len(set(crowd[:-1])) == 4
    assert place([(100, 50, "")]) == [None]


def test_a_reliability_diagram_by_hand():
    markup = charts.reliability([Bin(1, 0.6, 0.5), Bin(3, 0.9, 1.0)], BLUE, "x")
    circles = re.findall(r'cx="([^"]+)" cy="([^"]+)" r="([^"]+)"', markup)
    # Of 130 pixels; the radius is 2 + 7 √(1/4) and 2 + 7 √(3/4).
    assert circles == [("60.00%", "65", "5.5"), ("90.00%", "0", "8.062")]
