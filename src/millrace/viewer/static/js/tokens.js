// The tokens of a sequence, coloured by one of their figures, which a tooltip shows all of.

import { get } from "./api.js";
import { byId, el, fill, put } from "./dom.js";
import { fixed, known, percent, signed, whole } from "./format.js";
import { change, parameter } from "./state.js";

const MODES = [
  ["", "logprob"],
  ["gap", "engine − trainer"],
  ["mask", "trained on"],
  ["version", "version"],
];
const LEVELS = 9; // of a scale, beside none
const LOWEST = -5; // nats: the logprob with the strongest colour
const AT_ONCE = 3000; // tokens that are added before the page may draw
const SMALLEST_GAP = 0.01; // nats: the least that the strongest colour of the gap stands for
const view = { tokens: null, key: "", spans: [], drawing: 0 };

/** Show the tokens of the sequence that the hash names; the main one is the last. */
export async function showTokens(body, place, data) {
  const last = data.sequences.length - 1;
  const asked = Number.parseInt(parameter("seq"), 10);
  const number = asked >= 0 && asked <= last ? asked : last;
  const key = JSON.stringify([place, number]);
  if (view.key !== key || !body.querySelector(".tokens")) {
    fill(body, el("p", { class: "empty" }, "…"));
    view.key = key;
    const tokens = await get("api/tokens", { ...place, sequence: number });
    if (view.key !== key) return;
    view.tokens = prepared(tokens);
    lay(body, data, number, last);
  }
  paint(body);
}

export function closeTokens() {
  view.key = "";
  view.drawing += 1;
  view.spans = [];
  view.tokens = null;
  byId("token-tip")?.remove();
}

/** Add to the tokens what the colours need: their versions and gaps, and the scale of the gaps. */
function prepared(tokens) {
  const count = tokens.pieces.length;
  const versions = new Array(count).fill(null);
  for (const [version, start, end] of tokens.versions) versions.fill(version, start, end);
  const gaps =
    tokens.trainer_logprobs &&
    tokens.pieces.map((_, index) =>
      tokens.mask[index] ? tokens.logprobs[index] - tokens.trainer_logprobs[index] : null,
    );
  const sizes = (gaps ?? [])
    .filter(known)
    .map(Math.abs)
    .sort((a, b) => a - b);
  const widest = Math.max(SMALLEST_GAP, sizes[Math.floor(sizes.length * 0.99)] ?? 0);
  const order = [...new Set(versions.filter((version, index) => known(version) && tokens.mask[index]))].sort(
    (a, b) => a - b,
  );
  return { ...tokens, versionOf: versions, gaps, widest, order };
}

function lay(body, data, number, last) {
  const name = (index) => (index === last ? "main" : `branch ${index + 1}`);
  const sequences =
    data.sequences.length > 1 &&
    el(
      "label",
      {},
      "Sequence ",
      el(
        "select",
        { id: "sequence", onchange: (event) => change({ seq: event.target.value }) },
        data.sequences.map((one, index) =>
          el(
            "option",
            { value: String(index), selected: index === number },
            `${name(index)} · ${whole(one.length)} tokens · ${(one.end ?? "").replaceAll("_", " ")}`,
          ),
        ),
      ),
    );
  const modes = el(
    "div",
    { class: "choice", role: "radiogroup", "aria-label": "Colour of the tokens" },
    MODES.map(([mode, title]) =>
      el(
        "button",
        {
          type: "button",
          role: "radio",
          "data-mode": mode,
          disabled: mode === "gap" && !view.tokens.gaps,
          title: mode === "gap" && !view.tokens.gaps ? "the sample was not trained on" : title,
          onclick: () => change({ colour: mode }),
        },
        title,
      ),
    ),
  );
  fill(body, el("div", { class: "token-bar" }, modes, sequences, el("div", { class: "legend", id: "token-legend" })));
  const box = el("div", { class: "tokens", onmouseover: over, onmouseleave: () => byId("token-tip")?.remove() });
  put(body, box);
  view.spans = [];
  add(box, 0, ++view.drawing);
}

/** Add the tokens, some at a time, so that a long sequence does not stop the page. */
function add(box, start, drawing) {
  if (drawing !== view.drawing || !view.tokens) return;
  const { pieces } = view.tokens;
  const mode = modeNow();
  const part = document.createDocumentFragment();
  const end = Math.min(pieces.length, start + AT_ONCE);
  for (let index = start; index < end; index += 1) {
    const span = document.createElement("span");
    write(span, pieces[index]);
    span.className = classOf(index, mode);
    span.dataset.i = index;
    view.spans.push(span);
    part.append(span);
  }
  box.append(part);
  if (end < pieces.length) requestAnimationFrame(() => add(box, end, drawing));
}

/** Write a token's text, with a sign before its first line break. */
function write(span, piece) {
  const cut = piece.indexOf("\n");
  if (cut < 0) span.textContent = piece;
  else span.append(piece.slice(0, cut), document.createElement("i"), piece.slice(cut));
}

function modeNow() {
  const mode = parameter("colour");
  return MODES.some(([name]) => name === mode) && !(mode === "gap" && !view.tokens.gaps) ? mode : "";
}

function paint(body) {
  const mode = modeNow();
  for (const button of body.querySelectorAll("[role=radio]"))
    button.setAttribute("aria-checked", String(button.dataset.mode === mode));
  view.spans.forEach((span, index) => {
    const wanted = classOf(index, mode);
    if (span.className !== wanted) span.className = wanted;
  });
  legend(byId("token-legend"), mode);
}

const level = (share) => Math.max(0, Math.min(LEVELS, Math.round(LEVELS * share)));

function classOf(index, mode) {
  const { mask, logprobs, gaps, versionOf, order, widest, pieces } = view.tokens;
  const shape = pieces[index] === "" ? " none" : "";
  if (!mask[index]) return `given${shape}`;
  if (mode === "mask") return `made own${shape}`;
  if (mode === "version") return `made ver v${order.indexOf(versionOf[index]) % 8}${shape}`;
  if (mode === "gap")
    return `made ${gaps[index] < 0 ? "under" : "over"} l${level(Math.abs(gaps[index]) / widest)}${shape}`;
  return `made rare l${level(logprobs[index] / LOWEST)}${shape}`;
}

function legend(box, mode) {
  const { tokens } = view;
  const scale = (kind) =>
    el(
      "span",
      { class: "scale", "aria-hidden": "true" },
      Array.from({ length: LEVELS + 1 }, (_, index) => el("i", { class: `${kind} l${index}` })),
    );
  const down = (kind) => {
    const made = scale(kind);
    made.classList.add("reversed");
    return made;
  };
  const given = el("span", { class: "key" }, el("span", { class: "given" }, "grey"), "not generated");
  const own = tokens.mask.reduce((sum, one) => sum + one, 0);
  const parts = {
    "": () => ["0", scale("rare"), `${LOWEST} nats or less`.replace("-", "−")],
    gap: () => [
      `−${fixed(tokens.widest, 3)} trainer likelier`,
      down("under"),
      scale("over"),
      `engine likelier +${fixed(tokens.widest, 3)} nats`,
    ],
    mask: () => [
      el(
        "span",
        { class: "key" },
        el("i", { class: "box own" }),
        `trained on: ${whole(own)} of ${whole(tokens.mask.length)} tokens`,
      ),
    ],
    version: () =>
      tokens.order.map((version, index) =>
        el("span", { class: "key" }, el("i", { class: `box ver v${index % 8}` }), whole(version)),
      ),
  };
  fill(box, parts[mode](), given);
}

function over(event) {
  const span = event.target.closest("[data-i]");
  const index = span?.dataset.i;
  byId("token-tip")?.remove();
  if (index === undefined) return;
  const at = Number(index);
  const { ids, mask, logprobs, trainer_logprobs: trained, gaps, versionOf, pieces } = view.tokens;
  const row = (name, value) => value !== null && el("tr", {}, el("td", {}, name), el("td", {}, value));
  const box = el(
    "div",
    { class: "tip-box tip", id: "token-tip", role: "tooltip" },
    el(
      "div",
      { class: "tip-head mono" },
      pieces[at] === "" ? "part of the next character" : JSON.stringify(pieces[at]),
    ),
    el(
      "table",
      {},
      row("token", `${ids[at]} at ${whole(at)}`),
      mask[at]
        ? [
            row("logprob, engine", `${fixed(logprobs[at], 4)} (${percent(Math.exp(logprobs[at]), 1)})`),
            row(
              "logprob, trainer",
              trained ? `${fixed(trained[at], 4)} (${percent(Math.exp(trained[at]), 1)})` : "not trained",
            ),
            gaps && row("engine − trainer", signed(gaps[at], 4)),
            row("version", known(versionOf[at]) ? whole(versionOf[at]) : "unknown"),
          ]
        : row("", "not generated: prompt, tool or template"),
    ),
  );
  document.body.append(box);
  const target = span.getClientRects()[0] ?? span.getBoundingClientRect();
  const below = target.bottom + 6 + box.offsetHeight < innerHeight;
  box.style.left = `${Math.max(6, Math.min(target.left, innerWidth - box.offsetWidth - 8))}px`;
  box.style.top = `${below ? target.bottom + 6 : target.top - box.offsetHeight - 6}px`;
}
