// The page: which view is shown, the list of runs, keys, and when views are brought up to date.

import { get, whenReachable } from "./api.js";
import { curves } from "./curves.js";
import { byId, el, fill } from "./dom.js";
import { fleet } from "./fleet.js";
import { known, short, whole } from "./format.js";
import { lifeOf, news } from "./life.js";
import { samples } from "./samples.js";
import { change, hashOf, parameter, state, whenChanged } from "./state.js";
import { nextTheme, startTheme, whenThemeChanges } from "./theme.js";

const VIEWS = { curves, fleet, samples };
const EVERY = 2000; // ms between two looks at what is new
const LIVES = { fresh: "running", ended: "", failed: "failed", silent: "no news" }; // in the list of runs
const OVERLAID = 6; // runs that are compared at first
const page = { runs: [], live: false, view: null, shown: null, busy: false, started: false };

/** The runs that are compared, by name. */
function compared() {
  const names = page.runs.map((run) => run.name);
  const chosen = parameter("runs")
    .split(",")
    .filter((name) => names.includes(name));
  return chosen.length ? chosen : names.slice(0, OVERLAID);
}

/** The run whose engines and samples are shown. */
function current() {
  const name = parameter("run");
  return page.runs.find((run) => run.name === name) ?? page.runs[0] ?? null;
}

/** The one run whose curves are shown. */
const shownRun = () => page.runs.find((run) => run.name === compared()[0]) ?? null;

const context = () => ({
  runs: page.runs,
  compared: compared(),
  run: current(),
  live: page.live,
  order: page.runs.map((run) => run.name).sort(),
});

async function look() {
  if (page.busy) return;
  page.busy = true;
  try {
    const answer = await get("api/runs");
    page.live = answer.live;
    page.runs = answer.runs.sort((a, b) => (b.changed_at ?? 0) - (a.changed_at ?? 0) || a.name.localeCompare(b.name));
    if (!page.started) {
      page.started = true;
      if (!page.runs.length && !location.hash) change({}, { view: "fleet" });
    }
    show();
    await page.shown?.update(context());
    failed(null);
  } catch (error) {
    failed(error);
  } finally {
    page.busy = false;
  }
}

/** Say above the view why something could not be fetched. A server that is gone is named already. */
function failed(error) {
  failure = !error || unreachable || error.name === "AbortError" ? "" : error.message;
  showBanner();
}

/** Show the view that the hash names, and bring it up to date. */
function show() {
  const { view } = state();
  if (page.view !== view) {
    page.shown?.unmount?.();
    page.view = view;
    page.shown = VIEWS[view];
    byId("main").className = view;
    const root = el("div", { class: "view" });
    fill(byId("main"), root);
    page.shown.mount(root, context());
  }
  for (const link of byId("views").children) {
    link.href = hashOf(link.dataset.view);
    link.hidden = page.started && !page.runs.length && link.dataset.view !== "fleet";
    if (link.dataset.view === view) link.setAttribute("aria-current", "page");
    else link.removeAttribute("aria-current");
  }
  showRuns();
  showStatus();
}

function showStatus() {
  const several = page.view === "curves" && compared().length > 1; // no run of which there is one step
  const run = several ? null : page.view === "curves" ? shownRun() : current();
  const parts = [];
  if (run) parts.push(el("b", {}, run.name));
  if (run && known(run.step)) parts.push(el("span", {}, `step ${whole(run.step)}`));
  if (run?.changed_at) {
    const title = run.ended?.reason ?? "when the run last wrote to its folder";
    parts.push(el("span", { class: lifeOf(run, page.live), title }, news(run, page.live)));
  }
  if (page.live) parts.push(el("span", { class: "live" }, "live"));
  fill(byId("status"), parts);
  const troubles = page.runs.flatMap((one) =>
    one.troubles.map((text) => (page.runs.length > 1 ? `${one.name}: ${text}` : text)),
  );
  const asked = parameter("run");
  if (asked && page.runs.length && !page.runs.some((one) => one.name === asked))
    troubles.unshift(`there is no run ${asked} here; this is ${current().name}`);
  showBanner(troubles);
}

let unreachable = ""; // why there is no server
let failure = ""; // why it could not answer
function showBanner(troubles = null) {
  const banner = byId("banner");
  if (troubles !== null) banner.troubles = troubles;
  const texts = unreachable ? [unreachable] : [...(failure ? [failure] : []), ...(banner.troubles ?? [])];
  banner.classList.toggle("bad", Boolean(unreachable || failure));
  banner.hidden = !texts.length;
  const more = texts.length > 2 ? [`and ${texts.length - 2} more`] : [];
  const key = JSON.stringify(texts);
  if (banner.key !== key)
    fill(
      banner,
      [...texts.slice(0, 2), ...more].map((text) => el("div", {}, text)),
    );
  banner.key = key;
}

function showRuns() {
  const list = byId("runs");
  list.hidden = page.runs.length < 2;
  const chosen = compared();
  const now = current()?.name;
  const { view } = state();
  const order = context().order;
  const key = JSON.stringify([page.runs.map((run) => [run.name, run.step, run.reward, lifeOf(run, page.live)]), chosen, now, view]);
  if (list.hidden || list.key === key) return;
  list.key = key;
  const focused = document.activeElement?.dataset?.run;
  fill(
    list,
    el("h2", {}, "Runs"),
    page.runs.map((run) => runRow(run, chosen, now, view, order)),
  );
  if (focused) list.querySelector(`[data-run="${CSS.escape(focused)}"]`)?.focus();
}

function runRow(run, chosen, now, view, order) {
  const on = chosen.includes(run.name);
  const facts = [
    known(run.step) && `step ${whole(run.step)}`,
    known(run.reward) && `reward ${short(run.reward)}`,
    LIVES[lifeOf(run, page.live)],
  ].filter(Boolean);
  const texts = [
    el("span", { class: "name", title: run.folder }, run.name),
    el("span", { class: "facts" }, facts.join(" · ")),
  ];
  if (view !== "curves") {
    const pick = () => change({ run: run.name, open: "", offset: "" }, { step: true });
    return el(
      "button",
      { type: "button", class: "run", "data-run": run.name, "aria-pressed": String(run.name === now), onclick: pick },
      texts,
    );
  }
  const toggle = () => {
    const names = on ? chosen.filter((name) => name !== run.name) : [...chosen, run.name];
    change({ runs: names.join(","), run: on ? parameter("run") : run.name });
  };
  const box = el("input", { type: "checkbox", "data-run": run.name, onchange: toggle });
  box.checked = on;
  return el(
    "label",
    { class: `run swatch c${order.indexOf(run.name) % 8}` },
    box,
    el("span", { class: "texts" }, texts),
  );
}

function keyed(event) {
  if (event.ctrlKey || event.metaKey || event.altKey) return;
  const field = event.target.closest?.("input, select, textarea");
  if (field && field.type !== "checkbox") {
    if (event.key === "Escape" || (event.key === "Enter" && field.tagName === "INPUT")) {
      field.blur();
      page.shown?.key?.(event.key, true);
    }
    return;
  }
  if (byId("keys").open) return;
  const views = Object.keys(VIEWS);
  if (event.key === "?") byId("keys").showModal();
  else if (event.key === "t") nextTheme();
  else if (["1", "2", "3"].includes(event.key)) change({}, { view: views[Number(event.key) - 1], step: true });
  else if (event.key === "Enter" && event.target.closest?.("button, a, summary, label")) return;
  else if (!page.shown?.key?.(event.key, false)) return;
  event.preventDefault();
}

startTheme();
whenThemeChanges(() => page.shown?.recolour?.());
whenReachable((now, why) => {
  unreachable = now ? "" : `The server does not answer (${why}). What is shown may be old; the page tries again.`;
  document.body.classList.toggle("stale", !now);
  showBanner();
});
whenChanged(() => {
  show();
  page.shown?.update(context())?.catch(failed);
});
byId("help").addEventListener("click", () => byId("keys").showModal());
byId("keys").addEventListener("click", (event) => event.target === byId("keys") && byId("keys").close());
addEventListener("keydown", keyed);
setInterval(() => document.hidden || look(), EVERY);
document.addEventListener("visibilitychange", () => document.hidden || look());
look();
