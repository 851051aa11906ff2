"""Pictures of the playground: light, dark and narrow, with a head and classified photographs on it.

    python demo/screenshots.py [--url http://127.0.0.1:8000/]

Writes PNG files to out/playground. Starts the service with the bundled model where no address is given.
"""

from __future__ import annotations

import argparse
import io
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pictures import bundled_pictures
from PIL import Image
from playwright.sync_api import Browser, expect, sync_playwright
from service_process import running_service

from text2weight_client import Client

CLASSES = ("clock", "cup", "lamp", "chair", "telephone", "bottle", "rocket", "motorcycle")
PHOTOGRAPHS = ("coffee", "rocket", "motorcycle")
VIEWS: dict[str, dict[str, Any]] = {
    "light": {"color_scheme": "light", "viewport": {"width": 960, "height": 900}},
    "dark": {"color_scheme": "dark", "viewport": {"width": 960, "height": 900}},
    "narrow": {"color_scheme": "light", "viewport": {"width": 360, "height": 740}},
}
TIMEOUT_MS = 60_000
COLOURS = 64  # keeps a picture below 150 kB


def main() -> int:
    """Take all pictures; returns the exit code."""
    parser = argparse.ArgumentParser(description="Pictures of the playground.")
    parser.add_argument("--url", help="of a running service; default: start one")
    parser.add_argument("--out", type=Path, default=Path("out/playground"), metavar="DIR")
    options = parser.parse_args()
    chromium = shutil.which("chromium")
    if chromium is None:
        print(
            "screenshots: no chromium on the path; install it, for example with: apt-get install chromium",
            file=sys.stderr,
        )
        return 2
    options.out.mkdir(parents=True, exist_ok=True)
    expect.set_options(timeout=TIMEOUT_MS)
    with tempfile.TemporaryDirectory() as folder, _service(options) as url, sync_playwright() as playwright:
        photographs = _write_photographs(Path(folder))
        browser = playwright.chromium.launch(executable_path=chromium)
        for name, view in VIEWS.items():
            file = options.out / f"{name}.png"
            _take(browser, url, view, photographs, file)
            print(file)
        browser.close()
    return 0


@contextmanager
def _service(options: argparse.Namespace) -> Iterator[str]:
    if options.url is not None:
        yield options.url
        return
    with running_service(None, options.out / "service.log") as service, Client(service.url) as client:
        service.wait_until_ready(client)
        yield service.url


def _write_photographs(folder: Path) -> list[Path]:
    files = []
    for picture in bundled_pictures():
        if picture.name in PHOTOGRAPHS:
            files.append(folder / f"{picture.name}.jpg")
            picture.image.save(files[-1])
    return files


def _take(browser: Browser, url: str, view: dict[str, Any], photographs: list[Path], file: Path) -> None:
    page = browser.new_page(**view)
    page.set_default_timeout(TIMEOUT_MS)
    page.goto(url)
    expect(page.locator("#worker")).to_contain_text("ready")
    page.get_by_label("Class name").fill(", ".join(CLASSES))
    page.get_by_role("button", name="Add").click()
    page.get_by_label("Sampler").select_option("ddim")
    page.get_by_label("Seed").fill("7")
    page.locator("#image-input").set_input_files(photographs)
    page.get_by_role("button", name="Generate").click()
    expect(page.locator("#picture-news")).to_have_text(f"{len(photographs)} pictures classified.")
    with Image.open(io.BytesIO(page.screenshot(full_page=True))) as picture:
        picture.convert("RGB").quantize(COLOURS).save(file, optimize=True)
    page.close()


if __name__ == "__main__":
    sys.exit(main())
