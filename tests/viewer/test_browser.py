"""The page in a real browser, over runs that are invented. `make test-page` runs it."""

import contextlib
import os
import re
import time
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from millrace.viewer.server import serve_runs
from tests.viewer.runs import HOSTILE, Writer, write, write_short

BROWSER = os.environ.get("MILLRACE_BROWSER", "")
if not BROWSER:
    pytest.skip("set MILLRACE_BROWSER to a Chromium, or run make test-page", allow_module_level=True)
pytest.importorskip("playwright", reason="playwright is not installed; run make test-page")

from playwright.async_api import Browser, Page, async_playwright, expect  # noqa: E402

expect.set_options(timeout=15_000)


@pytest.fixture
async def browser() -> AsyncIterator[Browser]:
    async with async_playwright() as playwright:
        sandbox = ["--no-sandbox"] if os.geteuid() == 0 else []  # Chromium has none for root
        browser = await playwright.chromium.launch(executable_path=BROWSER, args=sandbox)
        yield browser
        await browser.close()


@pytest.fixture
def troubles() -> list[str]:
    """What the browser's console reports. A test that expects some clears them."""
    return []


@pytest.fixture
async def page(browser: Browser, troubles: list[str]) -> AsyncIterator[Page]:
    """A page on which an error, a refusal by the policy, or a request to another host fails the test."""
    context = await browser.new_context(viewport={"width": 1440, "height": 900}, color_scheme="light")
    page = await context.new_page()
    page.on("pageerror", lambda error: troubles.append(f"{error}\n{error.stack}"))
    page.on("console", lambda said: troubles.append(said.text) if said.type == "error" else None)
    page.on("dialog", lambda dialog: troubles.append(dialog.message))
    hosts: set[str] = set()
    page.on("request", lambda request: hosts.add(re.sub(r"^(\w+://[^/:]+).*", r"\1", request.url)))
    yield page
    assert not troubles
    assert hosts <= {"http://127.0.0.1", "about:blank"}, hosts
    await context.close()


def run(folder: Path, name: str = "run", steps: int = 6, seed: int = 0) -> Writer:
    writer = Writer(folder / name, seed=seed)
    writer.steps(steps)
    return writer


async def test_curves_grow_during_a_run_and_stay_after_it(page: Page, tmp_path: Path) -> None:
    writer = run(tmp_path, steps=0)
    async with serve_runs(writer.folder, "127.0.0.1", 0) as url:
        await page.goto(url)
        await expect(page.locator("#status")).to_contain_text("step 0")
        await expect(page.get_by_role("img", name="Chart: Reward")).to_be_visible()
        writer.steps(10)
        await expect(page.locator("#status")).to_contain_text("step 10")
        for name in ("Loss", "KL", "Gap", "Length", "Staleness", "Seconds of a step", "Tokens per second"):
            await expect(page.get_by_role("img", name=f"Chart: {name}", exact=True).locator("canvas")).to_have_count(1)
        await expect(page.get_by_label("Advisories")).to_contain_text("step 10")
        shown = await page.locator("figure", has_text="Reward").first.locator(".keys b").all_text_contents()
        assert len(shown) == 2
        writer.steps(1)
        await expect(page.locator("#status")).to_contain_text("step 11")


async def test_a_long_run_is_drawn_at_once_and_gets_all_its_steps(page: Page, tmp_path: Path) -> None:
    writer = run(tmp_path, steps=1)
    text = (writer.folder / "metrics.jsonl").read_text().splitlines()[-1]
    with (writer.folder / "metrics.jsonl").open("a") as file:
        file.writelines(text.replace('"step": 1', f'"step": {step}') + "\n" for step in range(2, 12_002))
    async with serve_runs(writer.folder, "127.0.0.1", 0) as url:
        async with page.expect_response(lambda response: "api/metrics" in response.url) as answered:
            await page.goto(url)
        first = await (await answered.value).json()
        assert first["count"] == 0
        assert 500 < len(first["sketch"]["step"]) <= 1000
        await expect(page.get_by_role("img", name="Chart: Loss").locator("canvas")).to_have_count(1)
        await page.wait_for_function("""async () => {
            const { metricsOf } = await import("/static/js/metrics.js");
            const data = await metricsOf("run");
            return !data.partial && data.columns.step.length > 12000 && data.columns.step.at(-1) === 12001;
        }""")
        writer.step = 12_001
        writer.steps(1)
        await expect(page.locator("#status")).to_contain_text("step 12,002")


async def test_runs_are_compared_and_the_link_keeps_which(page: Page, tmp_path: Path) -> None:
    run(tmp_path, "first")
    run(tmp_path, "second", seed=3)
    async with serve_runs(tmp_path, "127.0.0.1", 0) as url:
        await page.goto(url)
        legend = page.locator("#legend")
        await expect(legend).to_contain_text("first")
        await expect(legend).to_contain_text("second")
        await page.get_by_role("checkbox", name="second").uncheck()
        await expect(legend).to_have_text("")
        link = page.url
        await page.goto("about:blank")
        await page.goto(link)
        await expect(page.get_by_role("checkbox", name="first")).to_be_checked()
        await expect(page.get_by_role("checkbox", name="second")).not_to_be_checked()
        await page.goto("about:blank")
        await page.goto(f"{url}/#samples?run=third")
        await expect(page.locator("#banner")).to_contain_text("there is no run third here; this is ")


async def test_the_fleet_of_an_ended_run_has_a_table_and_lanes(page: Page, tmp_path: Path) -> None:
    run(tmp_path)
    async with serve_runs(tmp_path, "127.0.0.1", 0) as url:
        await page.goto(f"{url}/#fleet")
        row = page.locator("#engines tr", has_text="sglang-1")
        await expect(row).to_contain_text("ready")
        assert await row.locator("td").last.text_content() == ""
        await expect(page.locator("#lane-legend")).to_contain_text("dead")
        await expect(page.locator("#lanes canvas")).to_have_count(1)
        box = await page.locator("#lanes").bounding_box()
        assert box is not None
        await page.mouse.move(box["x"] + 700, box["y"] + 40)
        async with page.expect_response(lambda response: "timeline" in response.url and "start=" in response.url):
            await page.mouse.wheel(0, -600)  # zooms, and fetches what the zoom needs
        await expect(page.locator("#events")).to_contain_text("sglang-1 was killed by SIGKILL")


async def test_a_run_that_ended_or_was_cut_off_says_so_and_so_do_its_engines(page: Page, tmp_path: Path) -> None:
    writer = run(tmp_path)
    async with serve_runs(tmp_path, "127.0.0.1", 0) as url:
        await page.goto(f"{url}/#fleet")
        status, engines = page.locator("#status"), page.locator("#engines")
        await expect(engines).to_contain_text("ready")
        await expect(status).to_contain_text("now")
        long_ago = time.time() - 3600
        for path in writer.folder.iterdir():
            os.utime(path, (long_ago, long_ago))
        await expect(status).to_contain_text("no news since")
        await expect(engines.locator(".s-gone")).to_have_count(3)
        await expect(engines).to_contain_text("no news, was ready")
        writer.closed()
        await expect(status).to_contain_text("ended")
        await expect(engines.locator("td:has-text('gone')")).to_have_count(3)
        writer.clock += 600
        writer.opened()
        await expect(engines.locator(".s-ready")).to_have_count(3)
        await expect(page.locator("#lane-legend")).to_contain_text("not running")
        writer.closed("no engine is left: sglang-0 (dead)")
        await expect(status).to_contain_text("ended by an error")
        await expect(page.locator("#as-of")).to_contain_text("no engine is left: sglang-0 (dead)")


async def test_filters_sorting_and_pages(page: Page, tmp_path: Path, troubles: list[str]) -> None:
    run(tmp_path)
    async with serve_runs(tmp_path, "127.0.0.1", 0) as url:
        await page.goto(f"{url}/#samples")
        pager = page.locator("#pager")
        await expect(pager).to_contain_text("1–100 of 192")
        await page.get_by_role("button", name="Next page").click()
        await expect(pager).to_contain_text("101–192 of 192")
        await page.get_by_label("step, at least").fill("5")
        await expect(pager).to_contain_text("of 64")
        await page.get_by_label("end", exact=True).select_option("token_limit")
        await expect(page.locator("#rows tbody td:has-text('answered')")).to_have_count(0)
        await page.get_by_role("button", name="Clear").click()
        await expect(pager).to_contain_text("of 192")
        await page.get_by_role("columnheader", name="tokens").get_by_role("button").click()
        await expect(page.get_by_role("columnheader", name="tokens")).to_have_attribute("aria-sort", "descending")
        cells = [int(text) for text in await page.locator("#rows tbody tr td:nth-child(6)").all_text_contents()]
        assert cells == sorted(cells, reverse=True)
        assert "sort=-tokens" in page.url
        await page.get_by_label("reward, at least").fill("x")
        await expect(page.locator("#rows")).to_contain_text("reward_min: 'x' is not a number")
        troubles.clear()  # the browser logs the status 400


async def test_a_broken_line_is_named_and_the_rest_is_shown(page: Page, tmp_path: Path) -> None:
    writer = run(tmp_path)
    with (writer.folder / "metrics.jsonl").open("a") as file:
        file.write('{"step": 7, "rew')  # a run that was cut off
    async with serve_runs(writer.folder, "127.0.0.1", 0) as url:
        await page.goto(url)
        await expect(page.locator("#status")).to_contain_text("step 6")
        await expect(page.locator("#banner")).to_be_hidden()  # the line may still be under way
        with (writer.folder / "metrics.jsonl").open("a") as file:
            file.write("\n")
        await expect(page.locator("#banner")).to_contain_text("metrics.jsonl: 1 line could not be read")
        writer.steps(1)
        await expect(page.locator("#status")).to_contain_text("step 7")


async def test_a_hundred_thousand_samples_can_be_used(page: Page, tmp_path: Path) -> None:
    run(tmp_path, steps=1)
    (tmp_path / "run/samples/step-000001.parquet").unlink()
    write_short(tmp_path / "run", 50, 2000)
    async with serve_runs(tmp_path, "127.0.0.1", 0) as url:
        await page.goto(f"{url}/#samples")
        await expect(page.locator("#pager")).to_contain_text("of 100,000")
        await page.get_by_role("button", name="Last page").click()
        await expect(page.locator("#pager")).to_contain_text("99,901–100,000 of 100,000")
        await page.keyboard.press("/")
        await page.keyboard.type("number 7 1234")
        await expect(page.locator("#pager")).to_contain_text("1 found")
        await expect(page.locator("#pager")).to_contain_text("all 50 files searched")
        await page.keyboard.press("Enter")
        await page.keyboard.press("Enter")
        await expect(page.locator("#open h2")).to_have_text("7-154.2")


async def test_hostile_text_is_shown_as_text_and_runs_nothing(page: Page, tmp_path: Path) -> None:
    writer = run(tmp_path, steps=5)
    writer.line("advice.jsonl", {"step": 5, "kind": HOSTILE[0], "text": HOSTILE[1], "do": HOSTILE[2]})
    writer.event("restart_failed", HOSTILE[1], seconds=1.0, reason=HOSTILE[2])
    async with serve_runs(tmp_path, "127.0.0.1", 0) as url:
        await page.goto(url)
        await expect(page.get_by_label("Advisories")).to_contain_text(HOSTILE[1])
        await page.goto(f"{url}/#fleet")
        await expect(page.locator("#events")).to_contain_text(HOSTILE[2])
        for step in range(1, 6):
            text = HOSTILE[step % 5].partition("\u202e")[0]
            for tab in ("", "group", "tokens"):
                await page.goto(f"{url}/#samples?open={step}/{step}-1.5&tab={tab}")
                await expect(page.locator("#sample-body")).to_contain_text(text.strip())
                assert await page.locator("#sample-body").locator("script, img, svg, a, style").count() == 0
        assert await page.evaluate("window.hacked") is None


async def test_tokens_have_colours_a_legend_and_a_tooltip(page: Page, tmp_path: Path) -> None:
    run(tmp_path)
    async with serve_runs(tmp_path, "127.0.0.1", 0) as url:
        await page.goto(f"{url}/#samples?open=4/4-1.6&tab=tokens")
        legend = page.locator("#token-legend")
        await expect(legend).to_contain_text("nats or less")
        for mode, says, kind in (
            ("engine − trainer", "trainer likelier", ".over"),
            ("trained on", "trained on:", ".own"),
            ("version", "5", ".v1"),
        ):
            await page.get_by_role("radio", name=mode).click()
            await expect(legend).to_contain_text(says)
            assert await page.locator(f".tokens {kind}").count() > 0
        await page.locator(".tokens .made").nth(3).hover()
        tip = page.get_by_role("tooltip")
        for name in ("logprob, engine", "logprob, trainer", "engine − trainer", "version"):
            await expect(tip).to_contain_text(name)


async def test_a_link_leads_to_the_row_of_its_sample(page: Page, tmp_path: Path) -> None:
    run(tmp_path)
    async with serve_runs(tmp_path, "127.0.0.1", 0) as url:
        await page.goto(f"{url}/#samples?open=5/5-3.7&step_max=5")
        await expect(page.locator("tr.marked")).to_have_attribute("data-name", "5/5-3.7")
        await expect(page.locator("tr.marked")).to_be_in_viewport()


async def test_the_status_names_the_run_that_it_is_of(page: Page, tmp_path: Path) -> None:
    run(tmp_path, "first", steps=2)
    run(tmp_path, "second", steps=3, seed=3)
    async with serve_runs(tmp_path, "127.0.0.1", 0) as url:
        await page.goto(f"{url}/#fleet?run=first")
        status = page.locator("#status")
        await expect(status).to_contain_text("firststep 2")
        await page.keyboard.press("1")
        await expect(page.locator("#legend")).to_contain_text("second")
        await expect(status).to_have_text("")
        await page.get_by_role("checkbox", name="first").uncheck()
        await expect(status).to_contain_text("secondstep 3")


async def test_the_parts_of_a_samples_seconds_add_up(page: Page, tmp_path: Path) -> None:
    writer = Writer(tmp_path / "run")
    writer.step = 1
    row = writer.sample("1-0", 0, 0.5)
    whole, half = {**row, "seconds": 4.0}, {**row, "sample": "1-0.1", "seconds": 4.0}
    whole["timings"] = [("queue", 1.0), ("generate", 3.0)]
    half["timings"] = [("queue", 1.0), ("generate", 1.0)]
    write(writer.folder, 1, [whole, half])
    async with serve_runs(tmp_path, "127.0.0.1", 0) as url:
        await page.goto(f"{url}/#samples?open=1/1-0.0")
        await expect(page.locator(".timings .key")).to_have_text(["queue1.00 s", "generate3.00 s"])
        await page.goto(f"{url}/#samples?open=1/1-0.1")
        await expect(page.locator(".timings .key")).to_have_text(["queue1.00 s", "generate1.00 s", "other2.00 s"])


async def test_the_marks_of_an_axis_have_the_digits_that_they_need(page: Page, tmp_path: Path) -> None:
    run(tmp_path, steps=1)
    marks = """(ends) => import("/static/js/charts.js").then(({ axisFormat }) =>
        ends.map(axisFormat([{ points: ends.map((end, step) => [step, end]) }])))"""
    async with serve_runs(tmp_path, "127.0.0.1", 0) as url:
        await page.goto(url)
        for least, most, texts in ((1.5, 1.5, ["1.5", "1.5"]), (1.0, 1.25, ["1.00", "1.25"]), (1.5, 9, ["1.5", "9"])):
            assert await page.evaluate(marks, [least, most]) == texts


async def test_branches_are_a_tree_whose_leaves_lead_to_tokens(page: Page, tmp_path: Path) -> None:
    run(tmp_path)
    async with serve_runs(tmp_path, "127.0.0.1", 0) as url:
        await page.goto(f"{url}/#samples?open=4/4-1.2&tab=branches")
        await expect(page.get_by_role("img", name="Tree of the sample's branches").locator("canvas")).to_have_count(1)
        await page.get_by_role("button", name="branch 2").click()
        await expect(page.get_by_label("Sequence")).to_have_value("1")
        await expect(page.locator(".tokens")).to_contain_text("Another way, number 1")


async def test_keys_lead_through_samples(page: Page, tmp_path: Path) -> None:
    run(tmp_path)
    async with serve_runs(tmp_path, "127.0.0.1", 0) as url:
        await page.goto(url)
        await expect(page.locator("#status")).to_contain_text("step 6")
        await page.keyboard.press("3")
        await expect(page.locator("#pager")).to_contain_text("of 192")
        await page.keyboard.press("j")
        await page.keyboard.press("j")
        await expect(page.locator("tr.marked")).to_have_attribute("data-name", "6/6-0.1")
        await page.keyboard.press("Enter")
        await expect(page.locator("#open h2")).to_have_text("6-0.1")
        await page.keyboard.press("j")
        await expect(page.locator("#open h2")).to_have_text("6-0.2")
        await page.keyboard.press("k")
        await page.keyboard.press("v")
        await expect(page.locator(".tokens")).to_be_visible()
        await page.keyboard.press("Escape")
        await expect(page.locator("#open")).to_be_hidden()
        await page.keyboard.press("/")
        await page.keyboard.type("3?")  # in a field, keys are text
        await expect(page.locator("#q")).to_have_value("3?")
        await page.keyboard.press("Escape")
        await page.keyboard.press("?")
        await expect(page.get_by_role("dialog", name="Keys")).to_be_visible()
        await page.keyboard.press("Escape")
        await expect(page.get_by_role("dialog", name="Keys")).to_be_hidden()


async def test_views_change_while_they_are_being_fetched(page: Page, tmp_path: Path) -> None:
    run(tmp_path)
    async with serve_runs(tmp_path, "127.0.0.1", 0) as url:
        await page.goto(url)
        await expect(page.locator("#status")).to_contain_text("step 6")
        for key in "123" * 6 + "3v12" + "321" * 4:
            await page.keyboard.press(key)
        await expect(page.locator("#charts figure").first).to_be_visible()


async def test_dark_follows_the_system_and_the_choice_stays(page: Page, tmp_path: Path) -> None:
    run(tmp_path, steps=2)
    colour = "getComputedStyle(document.body).backgroundColor"
    async with serve_runs(tmp_path, "127.0.0.1", 0) as url:
        await page.goto(url)
        light = await page.evaluate(colour)
        await page.emulate_media(color_scheme="dark")
        dark = await page.evaluate(colour)
        assert dark != light
        button = page.get_by_role("button", name="Colours")
        await button.click()
        assert await page.evaluate(colour) == light
        await page.keyboard.press("t")
        await page.emulate_media(color_scheme="light")
        assert await page.evaluate(colour) == dark
        await page.reload()
        await expect(button).to_have_attribute("aria-label", "Colours: dark")
        assert await page.evaluate(colour) == dark


async def test_every_control_has_a_name(page: Page, tmp_path: Path) -> None:
    run(tmp_path, "first", steps=2)
    run(tmp_path, "second", steps=2, seed=1)
    unnamed = """[...document.querySelectorAll("button, input, select, a, [role=img]")].filter((one) =>
        one.offsetParent && !(one.ariaLabel || one.labels?.length || one.textContent.trim()))
        .map((one) => one.outerHTML)"""
    async with serve_runs(tmp_path, "127.0.0.1", 0) as url:
        for view in ("curves", "fleet", "samples", "samples?run=first&open=2/2-1.2&tab=tokens"):
            await page.goto(f"{url}/#{view}")
            await expect(page.locator("#runs")).to_be_visible()
            await expect(page.locator("#charts figure, #engines tr, #rows tr").first).to_be_visible()
            assert await page.evaluate(unnamed) == []


async def test_a_dead_server_is_named_and_its_return_too(page: Page, tmp_path: Path, troubles: list[str]) -> None:
    run(tmp_path, steps=2)
    async with contextlib.AsyncExitStack() as stack:
        url = await stack.enter_async_context(serve_runs(tmp_path, "127.0.0.1", 0))
        await page.goto(url)
        await expect(page.locator("#status")).to_contain_text("step 2")
        await stack.aclose()
        await expect(page.locator("#banner")).to_contain_text("The server does not answer")
        await expect(page.locator("#charts figure").first).to_be_visible()  # what was there stays
        await stack.enter_async_context(serve_runs(tmp_path, "127.0.0.1", int(url.rpartition(":")[2])))
        await expect(page.locator("#banner")).to_be_hidden()
    troubles.clear()  # the browser logs each request that failed
