// The view of engines: a table, what happened lately, and a lane for each engine over time.

import { get } from "./api.js";
import { el, fill, put } from "./dom.js";
import { clock, known, percent, seconds, short, whole } from "./format.js";
import { lifeOf, news } from "./life.js";
import { disposeLanes, drawLanes, recolourLanes } from "./timeline.js";

const EVENTS = 40;
const view = { root: null, context: null };

function mount(root) {
  view.root = root;
  put(
    root,
    el(
      "section",
      { "aria-label": "Engines" },
      el("h2", {}, "Engines", el("span", { class: "unit", id: "as-of" })),
      el("div", { class: "scroll", id: "engines" }),
    ),
    el("section", { "aria-label": "Timeline", id: "timeline-box" }),
    el(
      "section",
      { "aria-label": "Events" },
      el("h2", {}, "Latest events"),
      el("div", { id: "events", class: "events" }),
    ),
  );
}

async function update(context) {
  view.context = context;
  const { live, run } = context;
  const [now, past] = await Promise.all([live ? get("fleet") : null, run ? get("api/fleet", { run: run.name }) : null]);
  if (context !== view.context || !view.root.isConnected) return;
  show(now, past, run);
  const box = view.root.querySelector("#timeline-box");
  box.hidden = !run;
  if (run) await drawLanes(box, run.name, past.at);
}

function show(now, past, run) {
  const silent = !now && run && lifeOf(run, false) === "silent";
  const engines = now ? now.engines : (past?.engines ?? []).map((one) => ({ ...one, silent }));
  const of = view.root.querySelector("#as-of");
  const parts = [];
  const newest = now?.newest_version ?? past?.newest_version;
  if (known(newest)) parts.push(`newest version ${whole(newest)}`);
  if (now?.size) {
    const asleep = engines.filter((one) => one.asleep.length).length;
    parts.push(`${now.size.serving} of ${now.size.wanted} serving${asleep ? `, ${asleep} asleep` : ""}`);
    parts.push(`${whole(now.waiting)} requests waiting`);
  }
  if (!now && past?.at)
    parts.push(lifeOf(run, false) === "fresh" ? `by events.jsonl, until ${clock(past.at)}` : `the run: ${news(run, false)}`);
  if (!now && run?.ended?.reason) parts.push(run.ended.reason);
  fill(of, parts.join(" · "));
  const box = view.root.querySelector("#engines");
  if (!engines.length)
    fill(
      box,
      el("p", { class: "empty" }, now ? "The engines are being started." : "The run's events name no engine yet."),
    );
  else fill(box, table(now ? LIVE : PAST, engines));
  const events = (now?.events?.length ? now.events.map((one) => ({ ...one.fields, ...one })) : (past?.events ?? []))
    .slice(-EVENTS)
    .reverse();
  const list = view.root.querySelector("#events");
  const key = JSON.stringify(events.map((one) => [one.at, one.kind, one.engine, one.times]));
  if (list.key !== key) fill(list, events.length ? events.map(event) : el("p", { class: "empty" }, "None yet."));
  list.key = key;
}

const number = (read, form = whole) => ({
  class: "num",
  cell: (engine) => (known(read(engine)) ? form(read(engine)) : ""),
});
const LIVE = [
  ["engine", { cell: name }],
  ["state", { cell: stateOf }],
  ["version", number((e) => e.version)],
  ["lag", number((e) => e.lag)],
  ["running", number((e) => e.load?.running_requests)],
  ["queue", number((e) => e.load?.waiting_requests)],
  ["tok/s", number((e) => e.load && (e.load.running_requests ? e.load.tokens_per_second : 0))],
  ["KV cache", { cell: (e) => (e.load?.max_tokens ? bar(e.load.used_tokens / e.load.max_tokens) : "") }],
  ["cache hits", number((e) => e.cache_hit_share, percent)],
  ["restarts", number((e) => e.restarts)],
  ["", { class: "note", cell: (e) => e.reason ?? (e.silence && `no load: ${e.silence}`) ?? "" }],
];
const PAST = [
  ["engine", { cell: name }],
  ["state", { cell: stateOf }],
  ["version", number((e) => e.version)],
  ["lag", number((e) => e.lag)],
  ["requests", number((e) => e.requests)],
  ["failed", number((e) => e.failures)],
  ["tokens out", number((e) => e.output_tokens)],
  ["cache hits", number((e) => e.cache_hit_share, percent)],
  ["restarts", number((e) => e.restarts)],
  ["", { class: "note", cell: (e) => e.reason ?? "" }],
];

function table(columns, engines) {
  return el(
    "table",
    { class: "data" },
    el(
      "thead",
      {},
      el(
        "tr",
        {},
        columns.map(([title, column]) => el("th", { class: column.class, scope: "col" }, title)),
      ),
    ),
    el(
      "tbody",
      {},
      engines.map((engine) =>
        el(
          "tr",
          {},
          columns.map(([, column]) => el("td", { class: column.class }, column.cell(engine))),
        ),
      ),
    ),
  );
}

function name(engine) {
  return el("span", { title: engine.url ?? "" }, engine.name);
}

function stateOf(engine) {
  const asleep = engine.asleep?.length && engine.state === "ready";
  const text = asleep ? "asleep" : engine.state.replaceAll("_", " ");
  const was = engine.silent && !["gone", "left", "dead"].includes(engine.state); // the run was cut off, perhaps
  const kind = was ? "gone" : asleep ? "asleep" : engine.state;
  return el("span", { class: `state s-${kind}` }, el("i", { class: "dot" }), was ? `no news, was ${text}` : text);
}

/** A share as a small bar with its percentage. */
export function bar(share) {
  const inner = el("i");
  inner.style.width = `${Math.max(0, Math.min(100, 100 * share))}%`;
  return el(
    "span",
    { class: "meter" },
    el("span", { class: `track${share > 0.9 ? " full" : ""}` }, inner),
    el("span", { class: "num" }, percent(share)),
  );
}

const HIDDEN = new Set(["at", "kind", "engine", "fields", "times"]);

function event(one) {
  const facts = Object.entries(one).filter(([field, value]) => !HIDDEN.has(field) && known(value));
  const bad = /(_failed|retry)$/.test(one.kind) || ["dead", "quarantined"].includes(one.state);
  const value = (field, of) =>
    field.endsWith("seconds")
      ? seconds(of)
      : field === "nbytes"
        ? `${short(of)}B`
        : typeof of === "number"
          ? short(of)
          : String(of).split("\n")[0];
  return el(
    "div",
    { class: `event${bad ? " bad" : ""}` },
    el("time", {}, clock(one.at)),
    el("span", { class: "who" }, one.engine ?? "fleet"),
    el("span", { class: "kind" }, one.kind.replaceAll("_", " ") + (one.times ? ` ×${one.times}` : "")),
    el(
      "span",
      { class: "facts" },
      facts.map(([field, of]) =>
        el("span", {}, el("span", { class: "field" }, field.replace(/_seconds$/, "")), ` ${value(field, of)}`),
      ),
    ),
  );
}

export const fleet = { mount, update, unmount: disposeLanes, recolour: recolourLanes };
