"""The page in a real browser: no overflow, no console errors, readable contrast, on a phone and a
desktop, in light and dark.
"""

import html
import json
import re
import shutil
import subprocess

import fabricated
import pytest

from experiments import report

CHROMIUM = (
    shutil.which("chromium") or shutil.which("google-chrome") or shutil.which("chromium-browser")
)
pytestmark = pytest.mark.skipif(not CHROMIUM, reason="needs chromium or google-chrome")
# what a reader reads; small print included
READ = (
    "p, h1, h2, h3, li, a, b, td, th, caption, small, figcaption, dt, dd, summary, code, pre,"
    " .verdict, .verdict *"
)
PROBE = """
const rgb = text => text.match(/[\\d.]+/g).map(Number);
const linear = v => (v /= 255) <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4;
const light = ([r, g, b]) => 0.2126 * linear(r) + 0.7152 * linear(g) + 0.0722 * linear(b);
const ground = e => {
  for (; e; e = e.parentElement) {
    const c = rgb(getComputedStyle(e).backgroundColor);
    if (c.length < 4 || c[3] > 0) return c;
  }
  return [255, 255, 255];
};
document.querySelectorAll("details").forEach(d => d.open = true);
const poor = [];
let looked = 0;
for (const e of document.querySelectorAll(READ)) {
  if (!e.textContent.trim()) continue;
  looked++;
  const [a, b] = [light(rgb(getComputedStyle(e).color)), light(ground(e))].sort((x, y) => y - x);
  if ((a + 0.05) / (b + 0.05) < 4.5) poor.push(e.tagName + "." + e.className + " " + getComputedStyle(e).color + " " + e.textContent.slice(0, 30));
}
const root = document.documentElement;
const wide = [...document.querySelectorAll("body *")].filter(e => !e.closest(".scroll") && e.getBoundingClientRect().right > innerWidth + 1);
const cards = document.querySelector(".cards tbody tr");
parent.postMessage({inner: innerWidth, scroll: root.scrollWidth, paper: getComputedStyle(document.body).backgroundColor, looked,
  poor: poor.slice(0, 5), wide: wide.slice(0, 5).map(e => e.tagName + "." + e.className), stacked: getComputedStyle(cards).display,
  boxes: [...document.querySelectorAll(".scroll")].filter(e => e.scrollWidth > e.clientWidth).length}, "*");
"""


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    out = fabricated.folder(tmp_path_factory.mktemp("page") / "out")
    report.write(out, modules=fabricated.modules())
    return (out / "report.html").read_text()


def probe(page, folder, wide, dark):
    """What the script sees in a frame of ``wide`` pixels (a window cannot be narrower than 500),
    and the browser's log.
    """
    inside = page.replace(
        "</body>", f"<script>{PROBE.replace('READ', json.dumps(READ))}</script></body>"
    )
    outside = (
        '<!doctype html><meta name="color-scheme" content="light dark"><body'
        ' style="margin:0"><script>onmessage = e => { document.body.dataset.seen ='
        f' JSON.stringify(e.data) }}</script><iframe style="border:0;width:{wide}px;height:900px"'
        f' srcdoc="{html.escape(inside)}"></iframe>'
    )
    (folder / "outside.html").write_text(outside)
    result = subprocess.run(
        [
            CHROMIUM,
            "--headless",
            "--no-sandbox",
            "--disable-gpu",
            f"--user-data-dir={folder / 'profile'}",
            f"--blink-settings=preferredColorScheme={0 if dark else 1}",
            f"--window-size={max(wide, 500)},900",
            "--enable-logging=stderr",
            "--v=0",
            "--virtual-time-budget=4000",
            "--dump-dom",
            f"file://{folder / 'outside.html'}",
        ],
        capture_output=True,
        text=True,
        timeout=120,
    )
    seen = re.search(r'data-seen="([^"]+)"', result.stdout)
    assert seen, result.stderr[-2000:]
    return json.loads(html.unescape(seen[1])), [
        line for line in result.stderr.splitlines() if "CONSOLE" in line
    ]


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("wide", [390, 1280])
def test_page_fits_and_can_be_read(page, tmp_path, wide, dark):
    seen, console = probe(page, tmp_path, wide, dark)
    assert seen["inner"] == wide
    assert seen["paper"] == ("rgb(22, 24, 28)" if dark else "rgb(253, 253, 251)")
    assert seen["scroll"] <= wide and not seen["wide"]
    assert not console
    assert seen["looked"] > 300 and not seen["poor"]
    assert seen["stacked"] == ("flex" if wide == 390 else "table-row")
    assert (seen["boxes"] > 0) == (wide == 390)  # wide tables scroll in boxes of their own


def test_probe_sees_overflow_errors_and_poor_contrast(page, tmp_path):
    """The other test can fail: a page with each fault is found out."""
    bad = page.replace(
        "</main>",
        '<p style="width:1500px;color:#888;background:#999">grey</p><script>console.error("oh")</script></main>',
    )
    seen, console = probe(bad, tmp_path, 390, dark=False)
    assert (
        seen["scroll"] > 390
        and seen["wide"]
        and len(seen["poor"]) == 1
        and "grey" in seen["poor"][0]
        and len(console) == 1
    )
