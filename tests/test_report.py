"""report.html in a real browser: every figure is drawn, nothing complains, sorting and enlarging work, no network."""

import re
import shutil
import subprocess

import pytest

from validation.cli import main

BROWSER = next(
    (path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), None
)

PROBE = """
<script>
window.addEventListener("load", () => {
  const report = {};
  const drawn = [...document.querySelectorAll("figure svg")].map(svg => svg.getBoundingClientRect());
  report.figures = drawn.length;
  report.visible = drawn.filter(box => box.width > 100 && box.height > 30).length;
  const table = [...document.querySelectorAll("table.sortable")].find(t => t.tBodies[0].rows.length > 1);
  const column = () => [...table.tBodies[0].rows].map(row => row.cells[0].innerText);
  const head = table.tHead.rows[0].cells[0];
  head.click(); const up = column(); head.click(); const down = column();
  const right = [...up].sort((a, b) => a.localeCompare(b));
  report.sorted = up.join() === right.join() && up.join() === down.reverse().join();
  const zoom = document.querySelector(".zoom"), before = zoom.getBoundingClientRect().width;
  zoom.click(); report.enlarged = zoom.classList.contains("large") && zoom.getBoundingClientRect().width > before;
  report.outside = performance.getEntriesByType("resource").length;
  document.body.insertAdjacentText("beforeend", "PROBED " + JSON.stringify(report));
});
</script>
"""


def test_a_report_of_figures_at_hand_is_that_of_figures_drawn_anew(tmp_path):
    out = tmp_path / "run"
    settings = ["--stabilization.steps", "200", "--stabilization.samples", "8", "--seeds", "4"]
    assert main(["validate", "stabilization", *settings, "--out", str(out), "--quiet"]) == 0
    page = (out / "report.html").read_text(encoding="utf-8")
    (folder,) = out.glob("stabilization-*/figures")
    assert len(list(folder.iterdir())) == page.count("<svg")
    assert main(["report", str(out)]) == 0
    assert (out / "report.html").read_text(encoding="utf-8") == page
    shutil.rmtree(folder)
    assert main(["report", str(out)]) == 0
    assert (out / "report.html").read_text(encoding="utf-8") == page
    assert main(["validate", "stabilization", *settings, "--out", str(out), "--quiet", "--fresh"]) == 0
    assert len(list(folder.iterdir())) == page.count("<svg")


@pytest.mark.skipif(BROWSER is None, reason="no Chromium here")
def test_the_report_works_in_a_browser_without_a_network(tmp_path):
    out = tmp_path / "run"
    settings = ["--stabilization.steps", "300", "--stabilization.samples", "8", "--seeds", "4"]
    assert main(["validate", "stabilization", *settings, "--out", str(out), "--quiet"]) == 0
    page = (out / "report.html").read_text(encoding="utf-8")
    probed = tmp_path / "probed.html"
    probed.write_text(page.replace("</body>", PROBE + "</body>"), encoding="utf-8")
    assert BROWSER is not None
    shown = subprocess.run(
        [
            BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr", "--log-level=0",
            f"--user-data-dir={tmp_path / 'profile'}", "--virtual-time-budget=3000", "--window-size=1200,900",
            "--host-resolver-rules=MAP * ~NOTFOUND", "--dump-dom", probed.as_uri(),
        ],
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    found = re.search(r"PROBED (\{.*?\})", shown.stdout)
    assert found, shown.stderr[-2000:]
    figures = page.count("<svg")
    assert found[1] == (f'{{"figures":{figures},"visible":{figures},"sorted":true,"enlarged":true,"outside":0}}')
    assert "CONSOLE" not in shown.stderr
