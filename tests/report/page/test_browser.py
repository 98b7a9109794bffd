"""The page in a real browser: nothing overflows, on a telephone and on a wide screen, in light and dark, and it prints.

Without a browser these tests are skipped, or fail if XTRANSFER_REQUIRE_BROWSER is 1.
"""

import json
import os
import re
import shutil
import subprocess

import pytest

from tests.helpers import reported
from xtransfer.report.workdir_report import report

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
IS_REQUIRED = os.environ.get("XTRANSFER_REQUIRE_BROWSER") == "1"
pytestmark = pytest.mark.skipif(CHROMIUM is None and not IS_REQUIRED, reason="no chromium is installed")

# Elements that reach beyond the right edge, except inside a box that scrolls by itself.
MEASURE = """
<script>
addEventListener("load", () => {
  document.querySelectorAll("details").forEach((box) => { box.open = true; });
  const root = document.documentElement;
  const wide = [...document.querySelectorAll("body *")].filter((element) =>
    element.getBoundingClientRect().right > root.clientWidth + 1 && !element.closest(".scroll > *"));
  const ran = document.title === "run";
  root.dataset.measured = JSON.stringify({
    width: root.scrollWidth, window: root.clientWidth, ran,
    wide: wide.slice(0, 5).map((element) => element.tagName + " " + element.textContent.slice(0, 40)),
    heading: getComputedStyle(document.querySelector("h1")).color,
  });
});
</script>
"""

FRAME = """<!doctype html><body style="margin:0">
<iframe src="{page}" width="{width}" height="800" style="border:0"></iframe>
<script>
addEventListener("load", () => {{
  const inner = document.querySelector("iframe").contentDocument.documentElement;
  document.documentElement.dataset.measured = inner.dataset.measured;
}});
</script>
"""


@pytest.fixture(scope="module")
def copy(tmp_path_factory):
    """Return a copy of a page with a script that measures it, and without the policy that forbids scripts."""
    root = tmp_path_factory.mktemp("browser")
    targets = ("de", "ar", "ja", "arb_Arab", "a-language-with-a-rather-long-name")
    labels = (*reported.LABELS, "x" * 60, "日本語のラベル")
    workdir = reported.workdir(root, targets=targets, labels=tuple(sorted(labels)))
    report(workdir)
    text = (workdir.root / "report" / "report.html").read_text(encoding="utf-8")
    text, count = re.subn(r'<meta http-equiv="Content-Security-Policy"[^>]*>', "", text)
    assert count == 1
    page = root / "copy.html"
    page.write_text(text.replace("</body>", MEASURE + "</body>"), encoding="utf-8")
    return page


def browse(page, tmp_path, *flags):
    """Open the page in a browser without a window, and return the finished process."""
    assert CHROMIUM is not None, "XTRANSFER_REQUIRE_BROWSER is 1, and no chromium is installed"
    command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"]
    command += ["--disable-background-networking", "--disable-component-update", "--disable-sync", "--hide-scrollbars"]
    command += [f"--user-data-dir={tmp_path / 'profile'}", *flags]
    return subprocess.run([*command, page.as_uri()], capture_output=True, text=True, timeout=120)


def measured(page, width, tmp_path, *flags):
    """Render the page in a window of a width, and return what its script measured."""
    result = browse(page, tmp_path, f"--window-size={width},900", *flags, "--dump-dom")
    found = re.search(r'data-measured="([^"]*)"', result.stdout)
    assert found, result.stderr[-2000:]
    return json.loads(found[1].replace("&quot;", '"').replace("&lt;", "<").replace("&gt;", ">").replace("&amp;", "&"))


@pytest.mark.parametrize("width", [400, 1400])
def test_nothing_overflows(copy, tmp_path, width):
    # A window has a least width, so the page is measured inside a frame of the width.
    frame = measured_in_frame(copy, width, tmp_path)
    assert frame["window"] == width
    assert (frame["width"], frame["wide"]) == (width, [])
    assert not frame["ran"], "a label ran as a script"


def measured_in_frame(page, width, tmp_path):
    outer = tmp_path / "outer.html"
    outer.write_text(FRAME.format(page=page.as_uri(), width=width), encoding="utf-8")
    return measured(outer, 1600, tmp_path, "--allow-file-access-from-files")


def test_light_and_dark(copy, tmp_path):
    light = measured(copy, 1000, tmp_path / "light", "--blink-settings=preferredColorScheme=1")
    dark = measured(copy, 1000, tmp_path / "dark", "--blink-settings=preferredColorScheme=0")
    assert light["heading"] == "rgb(28, 33, 40)" and dark["heading"] == "rgb(228, 231, 235)"


def test_it_prints(copy, tmp_path):
    pdf = tmp_path / "page.pdf"
    result = browse(copy, tmp_path, f"--print-to-pdf={pdf}", "--no-pdf-header-footer")
    assert pdf.is_file(), result.stderr[-2000:]
    content = pdf.read_bytes()
    assert content.startswith(b"%PDF-")
    # Ten parts do not fit on one sheet. A page that scrolls inside a box would print as one.
    assert len(re.findall(rb"/Type\s*/Page\b", content)) > 1
