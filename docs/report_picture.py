"""The picture of the README: the first screen of a run's report, in headless Chromium.

python docs/report_picture.py runs/quickstart docs/assets/report.png
"""

import shutil
import sys
from pathlib import Path

from playwright.sync_api import sync_playwright


def main() -> None:
    run, target = map(Path, sys.argv[1:])
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"))  # None: Playwright's own
        page = browser.new_page(viewport={"width": 1100, "height": 660}, device_scale_factor=1.5)
        page.goto((run / "report.html").resolve().as_uri())
        page.screenshot(path=target)
        browser.close()


if __name__ == "__main__":
    main()
