// The view of samples: filters, a table of one page, and the sample that is open beside it.

import { get, lines } from "./api.js";
import { byId, el, fill, put, settled } from "./dom.js";
import { fixed, known, seconds, short, signed, whole } from "./format.js";
import { closeSample, openSample, recolourSample, sampleKey } from "./sample.js";
import { change, parameter } from "./state.js";

const LIMIT = 100;
const RANGES = [["step", "step"], ["reward", "reward"], ["tokens", "tokens"], ["version", "version"], ["gap", "gap"]];
const TEXTS = [["group", "group"], ["problem", "problem"]];
const SELECTS = [["status", "status"], ["end", "end"]];
const FILTERS = [...RANGES.flatMap(([name]) => [`${name}_min`, `${name}_max`]), ...TEXTS.map(([name]) => name), ...SELECTS.map(([name]) => name)];
const versions = (row) => (row.oldest_version === row.newest_version || !known(row.newest_version) ? whole(row.newest_version) : `${row.oldest_version}–${row.newest_version}`);
// column, title, class, cell
const COLUMNS = [
  ["step", "step", "num", (row) => whole(row.step)],
  ["sample", "sample", "id", (row) => row.sample],
  ["problem", "problem", "id wide", (row) => row.problem],
  ["reward", "reward", "num", (row) => rewardCell(row.reward)],
  ["advantage", "adv", "num", (row) => signed(row.advantage, 2)],
  ["tokens", "tokens", "num", (row) => whole(row.tokens)],
  ["prompt_tokens", "prompt", "num wide", (row) => whole(row.prompt_tokens)],
  ["turns", "turns", "num wide", (row) => whole(row.turns)],
  ["tool_calls", "tools", "num wide", (row) => el("span", {}, whole(row.tool_calls), row.tool_errors > 0 && el("span", { class: "bad", title: `${row.tool_errors} failed` }, ` ${row.tool_errors}✕`))],
  ["end", "end", "", (row) => endCell(row)],
  ["newest_version", "version", "num wide", versions],
  ["gap", "gap", "num wide", (row) => short(row.gap)],
  ["seconds", "seconds", "num wide", (row) => seconds(row.seconds)],
];
const view = { root: null, context: null, rows: [], matched: 0, marked: -1, asked: "", shown: "", search: null, order: "", choices: "" };

function rewardCell(reward) {
  const inner = el("i");
  inner.style.width = `${100 * Math.max(0, Math.min(1, reward ?? 0))}%`;
  return el("span", { class: "reward" }, el("span", { class: "track" }, inner), fixed(reward, 2));
}

function endCell(row) {
  const failed = row.status !== "finished";
  const limit = /limit|full/.test(row.end ?? "");
  return el("span", { class: failed ? "bad" : limit ? "warn" : "" }, (failed ? row.status : row.end ?? "").replaceAll("_", " "));
}

function mount(root) {
  view.root = root;
  view.shown = view.asked = view.choices = "";
  put(root,
    el("form", { class: "filters", id: "filters", role: "search", "aria-label": "Filters", onsubmit: (event) => event.preventDefault() },
      el("label", { class: "text" }, el("input", { type: "search", id: "q", "aria-label": "Text in conversations", placeholder: "search conversations  ( / )", autocomplete: "off", value: parameter("q"), oninput: settled((event) => ask({ q: event.target.value.trim() }), 400) })),
      RANGES.map(([name, title]) => el("fieldset", { class: "range" }, el("legend", {}, title), bound(name, "min", title), "–", bound(name, "max", title))),
      TEXTS.map(([name, title]) => el("label", {}, el("span", {}, title), el("input", { type: "text", name, "aria-label": title, autocomplete: "off", value: parameter(name), oninput: settled((event) => ask({ [name]: event.target.value.trim() })) }))),
      SELECTS.map(([name, title]) => el("label", {}, el("span", {}, title), el("select", { name, "aria-label": title, onchange: (event) => ask({ [name]: event.target.value }) }, el("option", { value: "" }, "any")))),
      el("button", { type: "button", class: "quiet", id: "clear", onclick: clear }, "Clear")),
    el("div", { class: "split", id: "split" },
      el("section", { class: "list", "aria-label": "Samples" }, el("div", { class: "scroll", id: "rows" }), el("div", { class: "pager", id: "pager" })),
      el("section", { class: "open", id: "open", "aria-label": "Sample", hidden: true })));
}

function bound(name, end, title) {
  const field = `${name}_${end}`;
  return el("input", { type: "text", inputmode: "decimal", name: field, "aria-label": `${title}, ${end === "min" ? "at least" : "at most"}`, autocomplete: "off", value: parameter(field), oninput: settled((event) => ask({ [field]: event.target.value.trim() })) });
}

/** Change filters, which leads to the first page. */
const ask = (changes) => change({ ...changes, offset: "" });

function clear() {
  change(Object.fromEntries(["q", "sort", "offset", ...FILTERS].map((name) => [name, ""])));
}

function filters() {
  return Object.fromEntries(FILTERS.map((name) => [name, parameter(name)]));
}

async function update(context) {
  view.context = context;
  if (!context.run) {
    fill(byId("rows"), el("p", { class: "empty" }, "There is no run here, and so no samples."));
    return;
  }
  syncFields();
  const run = context.run.name;
  openedAs(run);
  if (parameter("q")) return searchFor(run);
  endSearch();
  const asked = { run, ...filters(), sort: parameter("sort"), offset: parameter("offset"), limit: LIMIT };
  view.asked = JSON.stringify(asked);
  try {
    const answer = await get("api/samples", asked);
    if (JSON.stringify(asked) !== view.asked || !view.root.isConnected) return;
    const rows = answer.rows.map((row) => Object.fromEntries(answer.columns.map((name, index) => [name, row[index]])));
    showRows(rows, answer.matched, note(answer), answer.problems);
    await showChoices(run, answer);
    if (answer.filling) fillingSoon();
  } catch (error) {
    failed(error, view.asked === JSON.stringify(asked));
  }
}

/** While files are being read, more rows come often. */
const fillingSoon = settled(() => view.root.isConnected && update(view.context), 300);

function failed(error, current) {
  if (!current || !view.root.isConnected || ["TypeError", "TimeoutError", "AbortError"].includes(error.name)) return; // the banner says why
  view.shown = "";
  fill(byId("rows"), el("p", { class: "empty bad" }, error.message));
  fill(byId("pager"));
}

function note(answer) {
  if (!answer.files) return answer.filling ? "…" : "The run has written no samples yet.";
  if (answer.filling) return `reading files: ${whole(answer.indexed)} of ${whole(answer.files)}`;
  return "";
}

/** Bring the fields to what the hash says, but not the one that is being written in. */
function syncFields() {
  for (const field of byId("filters").elements) {
    const name = field.id === "q" ? "q" : field.name;
    if (name && field !== document.activeElement && field.tagName !== "SELECT") field.value = parameter(name);
    if (name && field.tagName === "SELECT" && [...field.options].some((one) => one.value === parameter(name))) field.value = parameter(name);
    if (name) field.classList.toggle("set", Boolean(parameter(name)));
  }
}

async function showChoices(run, answer) {
  const key = JSON.stringify([run, answer.indexed, answer.total]);
  if (key === view.choices || !answer.total) return;
  view.choices = key;
  const choices = await get("api/choices", { run });
  for (const [name] of SELECTS) {
    const select = byId("filters").elements[name];
    const wanted = ["", ...new Set([...choices[name], ...(parameter(name) ? [parameter(name)] : [])])];
    if (JSON.stringify([...select.options].map((one) => one.value)) === JSON.stringify(wanted)) continue;
    fill(select, wanted.map((value) => el("option", { value }, value ? value.replaceAll("_", " ") : "any")));
    select.value = parameter(name);
  }
}

const nameOf = (row) => `${row.step}/${row.sample}`;

function showRows(rows, matched, text, problems = []) {
  const sort = parameter("sort") || "-step";
  const open = parameter("open");
  const key = JSON.stringify([rows, matched, text, problems, sort, open, parameter("offset")]);
  if (key === view.shown) return;
  const before = view.rows[view.marked];
  view.shown = key;
  view.rows = rows;
  view.matched = matched;
  const wanted = open || (before && nameOf(before));
  view.marked = rows.findIndex((row) => nameOf(row) === wanted);
  const box = byId("rows");
  const top = box.scrollTop;
  fill(box,
    el("table", { class: "data rows", "aria-rowcount": matched },
      el("thead", {}, el("tr", {}, COLUMNS.map((column) => heading(column, sort)))),
      el("tbody", {}, rows.map(rowOf))),
    !rows.length && el("p", { class: "empty" }, text || (matched ? "This page is past the last sample." : "No sample has all of this.")));
  box.scrollTop = top;
  mark(view.marked);
  pager(matched, rows.length, text, problems);
}

function heading([name, title, kind], sort) {
  const column = sort.replace("-", "");
  const on = column === name;
  const down = sort.startsWith("-");
  const next = on ? (down ? name : `-${name}`) : `-${name}`;
  const pick = () => change({ sort: next === "-step" ? "" : next, offset: "" });
  return el("th", { class: kind, scope: "col", "aria-sort": on ? (down ? "descending" : "ascending") : "none" },
    el("button", { type: "button", onclick: pick }, title, el("span", { class: "arrow", "aria-hidden": "true" }, on ? (down ? "↓" : "↑") : "")));
}

function rowOf(row, index) {
  const pick = () => {
    mark(index);
    open();
  };
  return el("tr", { onclick: pick, "data-name": nameOf(row) }, COLUMNS.map(([, , kind, cell]) => el("td", { class: kind }, cell(row))));
}

function pager(matched, count, text, problems) {
  const offset = Number(parameter("offset")) || 0;
  const last = Math.floor(Math.max(0, matched - 1) / LIMIT) * LIMIT;
  const to = (where) => change({ offset: where ? String(where) : "" });
  const searching = Boolean(parameter("q"));
  const step = (title, sign, where, off) => el("button", { type: "button", class: "quiet", "aria-label": title, title, disabled: off, onclick: () => to(where) }, sign);
  fill(byId("pager"),
    el("span", { class: "num" }, searching ? `${whole(matched)} found` : matched ? `${whole(offset + 1)}–${whole(offset + count)} of ${whole(matched)}` : "none"),
    !searching && [step("First page", "⇤", 0, offset === 0), step("Previous page (p)", "←", Math.max(0, offset - LIMIT), offset === 0), step("Next page (n)", "→", offset + LIMIT, offset >= last), step("Last page", "⇥", last, offset >= last)],
    text && el("span", { class: "note" }, text),
    problems.map((problem) => el("span", { class: "warn", title: problem }, problem)));
}

// ---- the search in texts

async function searchFor(run) {
  const asked = JSON.stringify([run, parameter("q"), filters()]);
  if (view.search?.asked === asked) {
    if (view.search.rows) showFound();
    return;
  }
  endSearch();
  const search = { asked, rows: [], read: 0, files: 0, done: false, problems: [], control: new AbortController() };
  view.search = search;
  showFound();
  try {
    for await (const found of lines("api/search", { run, q: parameter("q"), ...filters() }, search.control.signal)) {
      if (view.search !== search) return;
      if (found.columns) search.columns = found.columns;
      if (found.problem) search.problems.push(found.problem);
      if (found.rows === undefined) continue;
      const names = search.columns;
      search.rows.push(...found.rows.map((row) => Object.fromEntries(names.map((name, index) => [name, row[index]]))));
      Object.assign(search, { read: found.read, files: found.files, full: found.full });
      showSoon();
    }
    search.done = true;
  } catch (error) {
    if (view.search !== search) return;
    search.stopped = search.control.signal.aborted;
    if (!search.stopped) search.problems.push("the search broke off; change the text to search again");
    search.done = true;
  }
  showFound();
}

const showSoon = settled(() => showFound(), 60);

function showFound() {
  const search = view.search;
  if (!search || !view.root.isConnected) return;
  const sort = parameter("sort") || "-step";
  const column = sort.replace("-", "");
  const sign = sort.startsWith("-") ? -1 : 1;
  const least = (value) => (known(value) ? 0 : 1);
  const order = (a, b) => least(a[column]) - least(b[column]) || (a[column] < b[column] ? -sign : a[column] > b[column] ? sign : 0);
  const progress = search.full ? `the first ${whole(search.rows.length)}; narrow the search for others`
    : search.done ? (search.stopped ? `stopped after ${whole(search.read)} of ${whole(search.files)} files` : `all ${whole(search.files)} files searched`)
      : `searching: ${whole(search.read)} of ${whole(search.files)} files, newest first (Esc stops)`;
  showRows([...search.rows].sort(order), search.rows.length, progress, search.problems.slice(0, 2));
}

function endSearch() {
  view.search?.control.abort();
  view.search = null;
}

// ---- the open sample

function mark(index) {
  view.marked = index;
  const body = byId("rows").querySelector("tbody");
  const before = body?.querySelector(".marked");
  before?.classList.remove("marked");
  before?.removeAttribute("aria-selected");
  const row = body?.rows[index];
  row?.classList.add("marked");
  row?.setAttribute("aria-selected", "true");
  row?.scrollIntoView({ block: "nearest" });
}

function open() {
  const row = view.rows[view.marked];
  if (row) change({ open: nameOf(row), run: view.context.run.name, seq: "" }, { step: !parameter("open") });
}

function openedAs(run) {
  const name = parameter("open");
  const pane = byId("open");
  pane.hidden = !name;
  byId("split").classList.toggle("has-open", Boolean(name));
  if (!name) return closeSample();
  const cut = name.indexOf("/");
  return openSample(pane, { run, step: name.slice(0, cut), sample: name.slice(cut + 1), beside });
}

/** Go to the sample before or after the marked one. */
function beside(by) {
  const next = view.marked + by;
  const offset = Number(parameter("offset")) || 0;
  if (next >= view.rows.length && !parameter("q") && offset + view.rows.length < view.matched) return change({ offset: String(offset + LIMIT) });
  if (next < 0 || next >= view.rows.length) return undefined;
  mark(next);
  return parameter("open") ? open() : undefined;
}

/** Handle a key; returns whether it meant something here. */
function key(name, fromField) {
  const offset = Number(parameter("offset")) || 0;
  if (name === "Escape") {
    if (view.search && !view.search.done) view.search.control.abort();
    else if (!fromField && parameter("open")) change({ open: "", seq: "" });
    return true;
  }
  if (name === "j") beside(1);
  else if (name === "k") beside(-1);
  else if (name === "Enter" && fromField) mark(Math.max(0, view.marked)); // from a field to the first row
  else if (name === "Enter") open();
  else if (name === "/") byId("q").select();
  else if (name === "n" && offset + LIMIT < view.matched && !parameter("q")) change({ offset: String(offset + LIMIT) });
  else if (name === "p" && offset) change({ offset: offset > LIMIT ? String(offset - LIMIT) : "" });
  else return sampleKey(name);
  return true;
}

function unmount() {
  endSearch();
  closeSample();
}

export const samples = { mount, update, unmount, key, recolour: recolourSample };
