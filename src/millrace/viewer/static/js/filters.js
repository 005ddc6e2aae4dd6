// The filters of the samples' table: fields that the hash keeps.

import { get } from "./api.js";
import { byId, el, fill, settled } from "./dom.js";
import { change, parameter } from "./state.js";

const RANGES = [
  ["step", "step"],
  ["reward", "reward"],
  ["tokens", "tokens"],
  ["version", "version"],
  ["gap", "gap"],
];
const TEXTS = [
  ["group", "group"],
  ["problem", "problem"],
];
const SELECTS = [
  ["status", "status"],
  ["end", "end"],
];
const FILTERS = [
  ...RANGES.flatMap(([name]) => [`${name}_min`, `${name}_max`]),
  ...TEXTS.map(([name]) => name),
  ...SELECTS.map(([name]) => name),
];
let choicesKey = "";

/** The form with all filters. */
export function filterForm() {
  choicesKey = "";
  return el(
    "form",
    {
      class: "filters",
      id: "filters",
      role: "search",
      "aria-label": "Filters",
      onsubmit: (event) => event.preventDefault(),
    },
    el(
      "label",
      { class: "text" },
      el("input", {
        type: "search",
        id: "q",
        "aria-label": "Text in conversations",
        placeholder: "search texts  ( / )",
        autocomplete: "off",
        value: parameter("q"),
        oninput: settled((event) => ask({ q: event.target.value.trim() }), 400),
      }),
    ),
    RANGES.map(([name, title]) =>
      el(
        "fieldset",
        { class: "range" },
        el("legend", {}, title),
        bound(name, "min", title),
        "–",
        bound(name, "max", title),
      ),
    ),
    TEXTS.map(([name, title]) =>
      el(
        "label",
        {},
        el("span", {}, title),
        el("input", {
          type: "text",
          name,
          "aria-label": title,
          autocomplete: "off",
          value: parameter(name),
          oninput: settled((event) => ask({ [name]: event.target.value.trim() })),
        }),
      ),
    ),
    SELECTS.map(([name, title]) =>
      el(
        "label",
        {},
        el("span", {}, title),
        el(
          "select",
          { name, "aria-label": title, onchange: (event) => ask({ [name]: event.target.value }) },
          el("option", { value: "" }, "any"),
        ),
      ),
    ),
    el("button", { type: "button", class: "quiet", id: "clear", onclick: clear }, "Clear"),
  );
}

function bound(name, end, title) {
  const field = `${name}_${end}`;
  return el("input", {
    type: "text",
    inputmode: "decimal",
    name: field,
    "aria-label": `${title}, ${end === "min" ? "at least" : "at most"}`,
    autocomplete: "off",
    value: parameter(field),
    oninput: settled((event) => ask({ [field]: event.target.value.trim() })),
  });
}

/** Change filters, which leads to the first page. */
const ask = (changes) => change({ ...changes, offset: "" });

function clear() {
  change(Object.fromEntries(["q", "sort", "offset", ...FILTERS].map((name) => [name, ""])));
}

/** The values of all filters but the text. */
export function filters() {
  return Object.fromEntries(FILTERS.map((name) => [name, parameter(name)]));
}

/** Bring the fields to what the hash says, but not the one that is being written in. */
export function syncFields() {
  for (const field of byId("filters").elements) {
    const name = field.id === "q" ? "q" : field.name;
    if (name && field !== document.activeElement && field.tagName !== "SELECT") field.value = parameter(name);
    if (name && field.tagName === "SELECT" && [...field.options].some((one) => one.value === parameter(name)))
      field.value = parameter(name);
    if (name) field.classList.toggle("set", Boolean(parameter(name)));
  }
}

/** Offer the values that the samples have. */
export async function showChoices(run, answer) {
  const key = JSON.stringify([run, answer.indexed, answer.total]);
  if (key === choicesKey || !answer.total) return;
  choicesKey = key;
  const choices = await get("api/choices", { run });
  for (const [name] of SELECTS) {
    const select = byId("filters").elements[name];
    const wanted = ["", ...new Set([...choices[name], ...(parameter(name) ? [parameter(name)] : [])])];
    if (JSON.stringify([...select.options].map((one) => one.value)) === JSON.stringify(wanted)) continue;
    fill(
      select,
      wanted.map((value) => el("option", { value }, value ? value.replaceAll("_", " ") : "any")),
    );
    select.value = parameter(name);
  }
}
