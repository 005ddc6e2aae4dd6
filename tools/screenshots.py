"""Writes the pictures of docs/viewer.md: docs/images/viewer-*.png.

    python tools/screenshots.py runs

The folder has four runs, such as these. An engine of the third is killed while it goes on:

    millrace train examples/gsm8k_multiturn/cpu.yaml name=demo
    millrace train examples/gsm8k_multiturn/cpu.yaml name=demo-lr-1e-4 train.lr=1e-4 seed=1
    cp -r runs/demo-lr-1e-4 runs/fleet
    millrace train examples/gsm8k_multiturn/cpu.yaml name=fleet train.lr=1e-4 seed=1 train.steps=38 --resume
    millrace train examples/agents/run.yaml agent=tools/branching_agent.py:solve name=branches \
        model.context_length=512 rollout.max_sample_tokens=512 rollout.max_turns=12

It needs playwright and /usr/bin/chromium, or the Chromium that MILLRACE_BROWSER names.
"""

import asyncio
import io
import json
import os
import sys
import urllib.parse
import urllib.request
from pathlib import Path
from typing import Any

from PIL import Image
from playwright.async_api import Browser, async_playwright

from millrace.viewer.server import serve_runs

ROOT = Path(__file__).resolve().parent.parent
IMAGES = ROOT / "docs" / "images"
SIZE = {"width": 1240, "height": 775}
SCALE = 2  # pixels of the picture for one of the page
COLOURS = 256  # of a picture, which is a third as large as one with all
DRAWN = 1500  # ms until charts are drawn and files are read


async def main(runs: Path) -> None:
    async with async_playwright() as playwright, serve_runs(runs, "127.0.0.1", 0) as url:
        path = os.environ.get("MILLRACE_BROWSER", "/usr/bin/chromium")
        sandbox = ["--no-sandbox"] if os.geteuid() == 0 else []  # Chromium has none for root
        browser = await playwright.chromium.launch(executable_path=path, args=sandbox)
        await picture(browser, url, "curves", "curves?runs=demo,demo-lr-1e-4")
        await picture(browser, url, "fleet", "fleet?run=fleet", dark=True)
        branched = await asyncio.to_thread(one_sample, url, "branches", "sequences")
        await picture(browser, url, "branches", f"samples?{branched}&tab=branches")
        sample = await asyncio.to_thread(one_sample, url, "demo", "tool_errors")
        await picture(browser, url, "samples", "samples?run=demo&step_min=8&step_max=12")
        await picture(browser, url, "conversation", f"samples?{sample}")
        hover = ".tokens .l7, .tokens .l8, .tokens .l9"
        await picture(browser, url, "tokens", f"samples?{sample}&tab=tokens", dark=True, hover=hover)
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


def one_sample(url: str, run: str, most: str) -> str:
    """Return the parameters that open a sample: the one with the most `sequences`, or one with `tool_errors`."""

    def ask(route: str, **filters: object) -> dict[str, Any]:
        query = urllib.parse.urlencode({"run": run, **filters})
        with urllib.request.urlopen(f"{url}/api/{route}?{query}", timeout=30) as answer:
            found: dict[str, Any] = json.load(answer)
        return found

    while (page := ask("samples", sort="-turns", limit=200, step_min=5))["filling"] or not page["files"]:
        pass
    rows = [dict(zip(page["columns"], row, strict=True)) for row in page["rows"]]
    if most == "sequences":
        of = {row["sample"]: len(ask("sample", step=row["step"], sample=row["sample"])["sequences"]) for row in rows}
        chosen = max(rows, key=lambda row: of[row["sample"]])
    else:
        chosen = max(rows, key=lambda row: (bool(row[most]), row["turns"]))
    step = chosen["step"]
    shown = {"run": run, "step_min": step, "step_max": step, "sort": "reward", "open": f"{step}/{chosen['sample']}"}
    return urllib.parse.urlencode(shown)


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    asyncio.run(main(Path(sys.argv[1])))
