// The view of samples: filters, a table of one page, and the sample that is open beside it.

import { get } from "./api.js";
import { byId, el, fill, put, settled } from "./dom.js";
import { filterForm, filters, showChoices, syncFields } from "./filters.js";
import { whole } from "./format.js";
import { closeSample, openSample, recolourSample, sampleKey } from "./sample.js";
import { Search } from "./search.js";
import { change, parameter } from "./state.js";
import { LIMIT, nameOf, offsetNow, pager, sortNow, table } from "./table.js";

const view = {
  root: null,
  context: null,
  rows: [],
  matched: 0,
  marked: -1,
  asked: "",
  shown: "",
  search: null,
};

function mount(root) {
  view.root = root;
  view.shown = view.asked = "";
  put(
    root,
    filterForm(),
    el(
      "div",
      { class: "split", id: "split" },
      el(
        "section",
        { class: "list", "aria-label": "Samples" },
        el("div", { class: "scroll", id: "rows" }),
        el("div", { class: "pager", id: "pager" }),
      ),
      el("section", { class: "open", id: "open", "aria-label": "Sample", hidden: true }),
    ),
  );
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

function showRows(rows, matched, text, problems = []) {
  const open = parameter("open");
  const key = JSON.stringify([rows, matched, text, problems, sortNow(), open, offsetNow()]);
  if (key === view.shown) return;
  const before = view.rows[view.marked];
  view.shown = key;
  view.rows = rows;
  view.matched = matched;
  const wanted = open || (before && nameOf(before));
  view.marked = rows.findIndex((row) => nameOf(row) === wanted);
  const box = byId("rows");
  const top = box.scrollTop;
  fill(
    box,
    table(rows, matched, pick),
    !rows.length &&
      el(
        "p",
        { class: "empty" },
        text || (matched ? "This page is past the last sample." : "No sample has all of this."),
      ),
  );
  box.scrollTop = top;
  mark(view.marked, !before); // a link leads to its sample
  pager(matched, rows.length, text, problems);
}

async function searchFor(run) {
  const parameters = { run, q: parameter("q"), ...filters() };
  const asked = JSON.stringify(parameters);
  if (view.search?.asked !== asked) {
    endSearch();
    view.search = new Search(asked, parameters, showFound);
  }
  showFound(view.search);
}

function showFound(search) {
  if (search !== view.search || !view.root.isConnected) return;
  showRows(search.sorted(sortNow()), search.rows.length, search.progress, search.problems.slice(0, 2));
}

function endSearch() {
  view.search?.stop();
  view.search = null;
}

// ---- the open sample

function pick(index) {
  mark(index);
  open();
}

/** Mark a row. `move`: whether it is scrolled to. */
function mark(index, move = true) {
  view.marked = index;
  const body = byId("rows").querySelector("tbody");
  const before = body?.querySelector(".marked");
  before?.classList.remove("marked");
  before?.removeAttribute("aria-selected");
  const row = body?.rows[index];
  row?.classList.add("marked");
  row?.setAttribute("aria-selected", "true");
  if (move) row?.scrollIntoView({ block: "nearest" });
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
  const offset = offsetNow();
  if (next >= view.rows.length && !parameter("q") && offset + view.rows.length < view.matched)
    return change({ offset: String(offset + LIMIT) });
  if (next < 0 || next >= view.rows.length) return undefined;
  mark(next);
  return parameter("open") ? open() : undefined;
}

/** Handle a key; returns whether it meant something here. */
function key(name, fromField) {
  const offset = offsetNow();
  if (name === "Escape") {
    if (view.search && !view.search.done) view.search.stop();
    else if (!fromField && parameter("open")) change({ open: "", seq: "" });
    return true;
  }
  if (name === "j") beside(1);
  else if (name === "k") beside(-1);
  else if (name === "Enter" && fromField)
    mark(Math.max(0, view.marked)); // from a field to the first row
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
