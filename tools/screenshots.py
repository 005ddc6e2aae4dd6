"""Writes the pictures of docs/viewer.md: docs/images/viewer-*.png.

    python tools/screenshots.py RUN

RUN is the folder of a run that has ended, such as that of `make demo`. The pictures of several runs, of engines that
die, and of branches are of runs that are invented (tests/viewer/runs.py). It needs playwright and /usr/bin/chromium, or
the Chromium that MILLRACE_BROWSER names.
"""

import asyncio
import io
import json
import os
import sys
import tempfile
import urllib.parse
import urllib.request
from pathlib import Path

from PIL import Image
from playwright.async_api import Browser, async_playwright

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from tests.viewer.runs import Writer  # noqa: E402

from millrace.viewer.server import serve_runs  # noqa: E402

IMAGES = ROOT / "docs" / "images"
SIZE = {"width": 1240, "height": 775}
SCALE = 2  # pixels of the picture for one of the page
COLOURS = 256  # of a picture, which is a third as large as one with all
DRAWN = 1500  # ms until charts are drawn and files are read


async def main(run: Path) -> None:
    with tempfile.TemporaryDirectory() as folder:
        Writer(Path(folder) / "lr-1e-5", seed=1).steps(40)
        Writer(Path(folder) / "lr-3e-6", seed=4, quality=0.7).steps(40)
        async with async_playwright() as playwright:
            path = os.environ.get("MILLRACE_BROWSER", "/usr/bin/chromium")
            sandbox = ["--no-sandbox"] if os.geteuid() == 0 else []  # Chromium has none for root
            browser = await playwright.chromium.launch(executable_path=path, args=sandbox)
            async with serve_runs(Path(folder), "127.0.0.1", 0) as url:
                await picture(browser, url, "curves", "curves")
                await picture(browser, url, "fleet", "fleet?run=lr-1e-5", dark=True)
                await picture(browser, url, "branches", "samples?run=lr-1e-5&open=16/16-0.2&tab=branches")
            async with serve_runs(run, "127.0.0.1", 0) as url:
                sample = await asyncio.to_thread(one_sample, url, run.name)
                await picture(browser, url, "samples", "samples?step_min=8&step_max=12")
                await picture(browser, url, "conversation", f"samples?{sample}")
                await picture(
                    browser,
                    url,
                    "tokens",
                    f"samples?{sample}&tab=tokens",
                    dark=True,
                    hover=".tokens .l7, .tokens .l8, .tokens .l9",
                )
                await picture(browser, url, "group", f"samples?{sample}&tab=group")
            await browser.close()


async def picture(
    browser: Browser, url: str, name: str, place: str, *, dark: bool = False, hover: str | None = None
) -> None:
    """Write one picture. hover: what the pointer is over."""
    context = await browser.new_context(
        viewport={"width": SIZE["width"], "height": SIZE["height"]},
        device_scale_factor=SCALE,
        color_scheme="dark" if dark else "light",
    )
    page = await context.new_page()
    await page.goto(f"{url}/#{place}")
    await page.wait_for_timeout(DRAWN)
    if hover is not None:
        await page.locator(hover).first.hover()
        await page.wait_for_timeout(200)
    taken = Image.open(io.BytesIO(await page.screenshot())).convert("RGB")
    taken.quantize(COLOURS, kmeans=4, dither=Image.Dither.NONE).save(IMAGES / f"viewer-{name}.png", optimize=True)
    print(f"wrote docs/images/viewer-{name}.png")
    await context.close()


def one_sample(url: str, run: str) -> str:
    """Return the parameters that open a sample: one with many turns and a tool call that failed, if there is one."""

    def rows(**filters: str) -> list[dict[str, object]]:
        query = urllib.parse.urlencode({"run": run, "sort": "-turns", "limit": "500", **filters})
        with urllib.request.urlopen(f"{url}/api/samples?{query}", timeout=30) as answer:
            page = json.load(answer)
        if page["filling"]:
            return rows(**filters)
        return [dict(zip(page["columns"], row, strict=True)) for row in page["rows"]]

    found = rows(step_min="5", reward_max="0.5") or rows()
    chosen = max(found, key=lambda row: (bool(row["tool_errors"]), row["turns"]))
    step = str(chosen["step"])
    shown = {"step_min": step, "step_max": step, "sort": "reward", "open": f"{step}/{chosen['sample']}"}
    return urllib.parse.urlencode(shown)


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    asyncio.run(main(Path(sys.argv[1])))
