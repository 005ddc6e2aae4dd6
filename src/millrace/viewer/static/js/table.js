// The table of samples: its columns, rows, and the pager below it.

import { byId, el, fill } from "./dom.js";
import { fixed, known, seconds, short, signed, whole } from "./format.js";
import { change, parameter } from "./state.js";

export const LIMIT = 100; // rows of a page
const versions = (row) =>
  row.oldest_version === row.newest_version || !known(row.newest_version)
    ? whole(row.newest_version)
    : `${row.oldest_version}–${row.newest_version}`;
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
  [
    "tool_calls",
    "tools",
    "num wide",
    (row) =>
      el(
        "span",
        {},
        whole(row.tool_calls),
        row.tool_errors > 0 && el("span", { class: "bad", title: `${row.tool_errors} failed` }, ` ${row.tool_errors}✕`),
      ),
  ],
  ["end", "end", "", (row) => endCell(row)],
  ["newest_version", "version", "num wide", versions],
  ["gap", "gap", "num wide", (row) => short(row.gap)],
  ["seconds", "seconds", "num wide", (row) => seconds(row.seconds)],
];

export const nameOf = (row) => `${row.step}/${row.sample}`;
export const offsetNow = () => Number(parameter("offset")) || 0;
export const sortNow = () => parameter("sort") || "-step";

function rewardCell(reward) {
  const inner = el("i");
  inner.style.width = `${100 * Math.max(0, Math.min(1, reward ?? 0))}%`;
  return el("span", { class: "reward" }, el("span", { class: "track" }, inner), fixed(reward, 2));
}

function endCell(row) {
  const failed = row.status !== "finished";
  const limit = /limit|full/.test(row.end ?? "");
  return el(
    "span",
    { class: failed ? "bad" : limit ? "warn" : "" },
    (failed ? row.status : (row.end ?? "")).replaceAll("_", " "),
  );
}

/** The table of some rows. `pick` gets the index of a row that is chosen. */
export function table(rows, matched, pick) {
  return el(
    "table",
    { class: "data rows", "aria-rowcount": matched },
    el("thead", {}, el("tr", {}, COLUMNS.map(heading))),
    el(
      "tbody",
      {},
      rows.map((row, index) => rowOf(row, () => pick(index))),
    ),
  );
}

function heading([name, title, kind]) {
  const sort = sortNow();
  const column = sort.replace("-", "");
  const on = column === name;
  const down = sort.startsWith("-");
  const next = on ? (down ? name : `-${name}`) : `-${name}`;
  const pick = () => change({ sort: next === "-step" ? "" : next, offset: "" });
  return el(
    "th",
    { class: kind, scope: "col", "aria-sort": on ? (down ? "descending" : "ascending") : "none" },
    el(
      "button",
      { type: "button", onclick: pick },
      title,
      el("span", { class: "arrow", "aria-hidden": "true" }, on ? (down ? "↓" : "↑") : ""),
    ),
  );
}

function rowOf(row, pick) {
  return el(
    "tr",
    { onclick: pick, "data-name": nameOf(row) },
    COLUMNS.map(([, , kind, cell]) => el("td", { class: kind }, cell(row))),
  );
}

/** Show below the table where its rows are among all. */
export function pager(matched, count, text, problems) {
  const offset = offsetNow();
  const last = Math.floor(Math.max(0, matched - 1) / LIMIT) * LIMIT;
  const to = (where) => change({ offset: where ? String(where) : "" });
  const searching = Boolean(parameter("q"));
  const step = (title, sign, where, off) =>
    el(
      "button",
      { type: "button", class: "quiet", "aria-label": title, title, disabled: off, onclick: () => to(where) },
      sign,
    );
  fill(
    byId("pager"),
    el(
      "span",
      { class: "num" },
      searching
        ? `${whole(matched)} found`
        : matched
          ? `${whole(offset + 1)}–${whole(offset + count)} of ${whole(matched)}`
          : "none",
    ),
    !searching && [
      step("First page", "⇤", 0, offset === 0),
      step("Previous page (p)", "←", Math.max(0, offset - LIMIT), offset === 0),
      step("Next page (n)", "→", offset + LIMIT, offset >= last),
      step("Last page", "⇥", last, offset >= last),
    ],
    text && el("span", { class: "note" }, text),
    problems.map((problem) => el("span", { class: "warn", title: problem }, problem)),
  );
}
