"""Takes explorer.png: the report's page of a folder of runs, or a page that is there, as a browser shows it.

    python docs/draw_explorer.py RUNS [PICTURE]
    python docs/draw_explorer.py PAGE.html PICTURE

It needs Playwright and Chromium, as the tests of the page do. If the data is not CIFAR-10, the picture has the banner.
"""

from __future__ import annotations

import io
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))

from PIL import Image

from cifar.report import write_report
from helpers.browser import OpenPage, open_browser, page_url

SIZE = (1400, 1000)
# The pointer is at a point in the middle of the front; the page is scrolled to the explorer.
POINT = """
const { scatter } = explorer.parts, i = view.front[Math.floor(view.front.length * 0.6)], { x, y } = scatter.current;
document.getElementById("explorer").scrollIntoView();
await new Promise(requestAnimationFrame);
const box = scatter.plot.getBoundingClientRect();
return [box.left + x(view.measured.x[i]), box.top + y(view.measured.y[i])];
"""


def main(runs: Path, picture_file: Path = Path(__file__).parent / "explorer.png") -> None:
    with tempfile.TemporaryDirectory() as folder, open_browser() as browser:
        file = runs if runs.suffix == ".html" else write_report([], runs=runs, out=Path(folder)).page
        page = OpenPage(browser, page_url(file), width=SIZE[0], height=SIZE[1])
        page.page.mouse.move(*page.run(POINT))
        page.settle()
        picture = Image.open(io.BytesIO(page.page.screenshot())).convert("RGB")
        picture.save(picture_file, optimize=True)
        page.close()


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
