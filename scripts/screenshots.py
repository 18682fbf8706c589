"""Takes the picture of the tangent explorer that the README shows.

    python scripts/screenshots.py [--page=results/embedded/ViT-Nano-8_seed3/report.html]

It needs the extra "test" and a Chromium; other pages of a run give pictures of these.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

from playwright.sync_api import sync_playwright

from tangent_arithmetic.run.args import Parser
from tangent_arithmetic.runtime.errors import UsageError, entry_point, unknown

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "results/embedded/ViT-Nano-8_seed3/report.html"
PICTURE = ROOT / "docs/images/explorer.png"
WIDTH, SCALE = 1100, 1.5


def chromium() -> str:
    """The path of the Chromium on this machine."""
    for name in ("chromium", "chromium-browser", "google-chrome", "chrome"):
        if found := shutil.which(name):
            return found
    raise UsageError("no Chromium found; install one, for instance with: apt-get install chromium")


def explorer(page: Path, picture: Path, preset: str) -> None:
    """Writes a picture of a page's explorer, with the sliders at a preset."""
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=chromium(), args=["--no-sandbox", "--headless=new"]
        )
        tab = browser.new_page(viewport={"width": WIDTH, "height": 1200}, device_scale_factor=SCALE)
        tab.goto(page.resolve().as_uri())
        part = tab.locator("#explorer")
        menu = tab.locator("#explorer-preset")
        names = menu.locator("option").all_inner_texts()
        if not (fitting := [name for name in names if name.lower().startswith(preset.lower())]):
            raise unknown("preset", preset, names)
        menu.select_option(label=fitting[0])
        tab.wait_for_timeout(500)
        picture.parent.mkdir(parents=True, exist_ok=True)
        part.screenshot(path=str(picture))
        browser.close()


@entry_point
def main(argv: Sequence[str] | None = None) -> int:
    """Entry point."""
    parser = Parser(description=__doc__)
    parser.add_argument("--page", type=Path, default=PAGE, help="a report page with an explorer")
    parser.add_argument("--output", type=Path, default=PICTURE, help="the PNG to write")
    parser.add_argument("--preset", default="best sum", help="start of the preset's name")
    args = parser.parse_args(argv)
    explorer(args.page, args.output, args.preset)
    print(f"wrote {args.output}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
