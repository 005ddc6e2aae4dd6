// One sample beside the table: its figures, conversation, tokens, group and branches.

import { get } from "./api.js";
import { swatch } from "./charts.js";
import { el, fill } from "./dom.js";
import { fixed, known, seconds, short, signed, whole } from "./format.js";
import { conversation, differing } from "./messages.js";
import { change, parameter } from "./state.js";
import { closeTokens, showTokens } from "./tokens.js";
import { closeTree, showTree } from "./tree.js";

const TABS = [
  ["", "Conversation", "c"],
  ["tokens", "Tokens", "v"],
  ["group", "Group", "g"],
  ["branches", "Branches", "b"],
];
const PARTS = ["queue", "generate", "tools", "reward"]; // of the time, in the order of their colours
const OTHER = "other"; // what no part accounts for
const LEAST_OTHER = 0.005; // of the sample's seconds
const view = { pane: null, of: null, key: "", data: null, tab: null, drawn: "" };

/** Show a sample. `of`: run, step, sample, and `beside`, which goes to another one. */
export async function openSample(pane, of) {
  const key = JSON.stringify([of.run, of.step, of.sample]);
  view.of = of;
  if (view.pane !== pane || view.key !== key) {
    closeParts();
    Object.assign(view, { pane, key, data: null, drawn: "" });
    if (!pane.childElementCount) fill(pane, el("p", { class: "empty" }, "…"));
    try {
      const data = await get("api/sample", { run: of.run, step: of.step, sample: of.sample });
      if (view.key !== key) return;
      view.data = data;
      frame();
    } catch (error) {
      if (view.key !== key) return;
      view.key = "";
      fill(
        pane,
        el("div", { class: "head" }, el("div", { class: "title" }, el("h2", {}, of.sample), closeButton())),
        el("p", { class: "empty bad" }, error.message),
      );
      return;
    }
  }
  if (view.data) await showTab();
}

export function closeSample() {
  closeParts();
  view.pane?.replaceChildren();
  Object.assign(view, { pane: null, key: "", data: null, drawn: "" });
}

function closeParts() {
  closeTokens();
  closeTree();
}

const closeButton = () =>
  el(
    "button",
    {
      type: "button",
      class: "quiet",
      "aria-label": "Close the sample",
      title: "Close (Esc)",
      onclick: () => change({ open: "", seq: "" }),
    },
    "✕",
  );

function frame() {
  const { data, of, pane } = view;
  const move = (sign, by, title) =>
    el("button", { type: "button", class: "quiet", "aria-label": title, title, onclick: () => of.beside(by) }, sign);
  const tabs = TABS.filter(([name]) => name !== "branches" || data.sequences.length > 1).filter(
    ([name]) => name !== "tokens" || data.sequences.length,
  );
  fill(
    pane,
    el(
      "div",
      { class: "head" },
      el(
        "div",
        { class: "title" },
        el("h2", {}, data.sample),
        el("span", { class: "unit" }, `step ${whole(data.step)} · group ${data.group} · ${data.problem}`),
        el("span", { class: "push" }),
        move("↑", -1, "Previous sample (k)"),
        move("↓", 1, "Next sample (j)"),
        closeButton(),
      ),
      figures(data),
      data.reason && el("p", { class: "reason bad" }, data.reason),
      timings(data),
      el(
        "div",
        { class: "tabs", role: "tablist", "aria-label": "Parts of the sample" },
        tabs.map(([name, title, letter]) => tab(name, title, letter)),
      ),
    ),
    el("div", { class: "body", id: "sample-body", role: "tabpanel" }),
  );
  pane.querySelector("#sample-body").scrollTop = 0;
}

function tab(name, title, letter) {
  const count = name === "branches" ? ` ${view.data.sequences.length}` : "";
  return el(
    "button",
    {
      type: "button",
      role: "tab",
      "data-tab": name,
      title: `${title} (${letter})`,
      onclick: () => change({ tab: name }),
    },
    title,
    count && el("span", { class: "count" }, count),
  );
}

function figures(data) {
  const parts = Object.entries(data.rewards ?? {});
  const one = (name, value, kind = "") =>
    el("div", { class: "figure" }, el("dt", {}, name), el("dd", { class: kind }, value));
  const span =
    data.oldest_version === data.newest_version
      ? whole(data.newest_version)
      : `${data.oldest_version}–${data.newest_version}`;
  const ended = data.status === "finished" ? (data.end ?? "finished") : data.status;
  return el(
    "dl",
    { class: "figures" },
    one("reward", fixed(data.reward, 3), "strong"),
    one(
      "advantage",
      known(data.advantage) ? signed(data.advantage, 3) : "not trained",
      !known(data.advantage) ? "dim" : data.advantage < 0 ? "neg" : data.advantage > 0 ? "pos" : "",
    ),
    parts.map(([name, value]) => one(name, fixed(value, 3))),
    one("answer", data.answer ?? "—", "text"),
    one(
      "ended",
      ended.replaceAll("_", " "),
      data.status !== "finished" ? "bad" : /limit|full/.test(ended) ? "warn" : "",
    ),
    one("turns", whole(data.turns)),
    one(
      "tool calls",
      el(
        "span",
        {},
        whole(data.tool_calls),
        data.tool_errors > 0 && el("span", { class: "bad" }, ` ${data.tool_errors} failed`),
      ),
    ),
    one("generated", `${whole(data.tokens)} tokens`),
    one("prompt", whole(data.prompt_tokens)),
    one("versions", span || "—"),
    one("gap", known(data.gap) ? `${short(data.gap)} nats` : "—"),
    Object.entries(data.counts ?? {})
      .filter(([name, count]) => count && name !== "tool_calls")
      .map(([name, count]) => one(name.replaceAll("_", " "), whole(count))),
  );
}

/** The sample's seconds as one bar. */
function timings(data) {
  const place = (name) => (PARTS.includes(name) ? PARTS.indexOf(name) : PARTS.length);
  const entries = Object.entries(data.timings ?? {})
    .filter(([, value]) => value > 0)
    .sort(([a], [b]) => place(a) - place(b) || a.localeCompare(b));
  if (!known(data.seconds)) return null;
  const named = entries.reduce((sum, [, value]) => sum + value, 0);
  const total = Math.max(data.seconds, named) || 1;
  if (total - named > LEAST_OTHER * total) entries.push([OTHER, total - named]);
  const colourOf = (name) => `var(--${name === OTHER ? "line" : `c${PARTS.includes(name) ? [7, 0, 2, 1][place(name)] : 4}`})`;
  const titleOf = (name) => (name === OTHER ? "the trainer's process encoded texts, or was busy with something else" : "");
  const piece = ([name, value]) => {
    const made = el("i", { title: `${name} ${seconds(value)}` });
    made.style.width = `${(100 * value) / total}%`;
    made.style.background = colourOf(name);
    return made;
  };
  return el(
    "div",
    { class: "timings" },
    el("span", { class: "num" }, seconds(data.seconds)),
    el("div", { class: "stack", "aria-hidden": "true" }, entries.map(piece)),
    el(
      "span",
      { class: "legend" },
      entries.map(([name, value]) =>
        el("span", { class: "key", title: titleOf(name) }, swatch(colourOf(name)), name.replaceAll("_", " "), el("b", {}, seconds(value))),
      ),
    ),
  );
}

async function showTab() {
  const { data, pane, of, key } = view;
  const wanted = parameter("tab");
  const exists = pane.querySelector(`[data-tab="${CSS.escape(wanted)}"]`);
  const name = exists ? wanted : "";
  for (const button of pane.querySelectorAll("[role=tab]"))
    button.setAttribute("aria-selected", String(button.dataset.tab === name));
  const body = pane.querySelector("#sample-body");
  const drawn = JSON.stringify([key, name, name === "tokens" ? [parameter("seq"), parameter("colour")] : ""]);
  if (drawn === view.drawn) return;
  view.drawn = drawn;
  if (name !== "tokens") closeTokens();
  if (name !== "branches") closeTree();
  const place = { run: of.run, step: of.step, sample: of.sample };
  try {
    if (name === "tokens") await showTokens(body, place, data);
    else if (name === "group") await showGroup(body, place, data);
    else if (name === "branches") showTree(body, data, (number) => change({ tab: "tokens", seq: String(number) }));
    else fill(body, conversation(data.messages));
  } catch (error) {
    if (drawn === view.drawn) fill(body, el("p", { class: "empty bad" }, error.message));
    view.drawn = "";
  }
}

async function showGroup(body, place, data) {
  fill(body, el("p", { class: "empty" }, "…"));
  const rows = await get("api/group", { run: place.run, step: place.step, group: data.group });
  if (parameter("tab") !== "group" || view.data !== data) return;
  rows.sort((a, b) => b.reward - a.reward || a.sample.localeCompare(b.sample));
  const shared = differing(rows.map((row) => row.messages));
  const column = (row) =>
    el(
      "article",
      { class: `member${row.sample === data.sample ? " this" : ""}` },
      el(
        "header",
        {},
        el(
          "button",
          { type: "button", class: "link", onclick: () => change({ open: `${row.step}/${row.sample}` }) },
          row.sample,
        ),
        el("span", { class: "num strong" }, fixed(row.reward, 2)),
        el("span", { class: `num ${row.advantage < 0 ? "neg" : row.advantage > 0 ? "pos" : ""}` }, signed(row.advantage, 2)),
        el(
          "span",
          { class: "unit" },
          `${whole(row.tokens)} tok · ${(row.status === "finished" ? (row.end ?? "") : row.status).replaceAll("_", " ")}`,
        ),
      ),
      row.reason && el("p", { class: "reason bad" }, row.reason),
      conversation(row.messages.slice(shared), shared ? "The same as the others." : undefined),
    );
  fill(
    body,
    shared > 0 &&
      el(
        "details",
        { class: "shared" },
        el(
          "summary",
          {},
          shared === 1 ? "The message that all have in common" : `The ${shared} messages that all have in common`,
        ),
        conversation(rows[0].messages.slice(0, shared)),
      ),
    el("div", { class: "members" }, rows.map(column)),
  );
  const own = body.querySelector(".this");
  const members = body.querySelector(".members");
  if (own && own.offsetLeft + own.offsetWidth > members.offsetLeft + members.clientWidth)
    members.scrollLeft = own.offsetLeft - members.offsetLeft;
}

/** Handle a key of the open sample; returns whether it meant something. */
export function sampleKey(name) {
  const found = TABS.find(([, , letter]) => letter === name);
  if (!found || !view.pane) return false;
  change({ tab: found[0] });
  return true;
}

export function recolourSample() {
  if (parameter("tab") !== "branches" || !view.data) return;
  view.drawn = "";
  showTab();
}
