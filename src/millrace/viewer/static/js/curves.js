// The view of curves: small charts of one run or of several, and the advisories.

import { axisFormat, base, chart, line, palette, smoothed, swatch, tip } from "./charts.js";
import { el, fill, put, settled } from "./dom.js";
import { short, whole } from "./format.js";
import { chartsOf, metricsOf, points, words } from "./metrics.js";
import { change, parameter } from "./state.js";

const GROUP = "curves";
const MOST_KEYS = 4; // runs whose last values stand above a chart
const SHOWN_ADVICE = 3;
const SMOOTHING = [
  ["1", "raw"],
  ["5", "5 steps"],
  ["20", "20 steps"],
  ["100", "100 steps"],
];
const view = { root: null, charts: new Map(), layout: "", drawn: "", datas: null, context: null, pointed: "" };

function mount(root) {
  view.root = root;
  view.layout = view.drawn = "";
  const choose = (event) => change({ smooth: event.target.value === "1" ? "" : event.target.value });
  const select = el(
    "select",
    { id: "smooth", onchange: choose },
    SMOOTHING.map(([value, text]) => el("option", { value }, text)),
  );
  select.value = parameter("smooth") || "1";
  put(
    root,
    el("section", { class: "advice", id: "advice", "aria-label": "Advisories", hidden: true }),
    el(
      "div",
      { class: "bar" },
      el("div", { class: "legend", id: "legend" }),
      el("label", { class: "push" }, "Smoothing ", select),
    ),
    el("div", { id: "charts" }),
  );
}

function unmount() {
  for (const one of view.charts.values()) one.dispose();
  view.charts.clear();
}

async function update(context) {
  view.context = context;
  if (!context.runs.length) {
    fill(
      view.root.querySelector("#charts"),
      el("p", { class: "empty" }, "There is no run here, and so no curves. Fleet shows the engines."),
    );
    return;
  }
  const names = context.compared;
  const datas = await Promise.all(names.map(metricsOf));
  if (context !== view.context || !view.root.isConnected) return;
  view.datas = datas;
  draw();
  if (datas.some((data) => data.partial)) moreSoon();
}

/** While the rest of a long run is being fetched, its outline is shown. */
const moreSoon = settled(() => {
  if (view.root.isConnected) update(view.context).catch(() => {}); // the banner says why
}, 50);

function draw() {
  const { context, datas } = view;
  if (!datas) return;
  const smooth = Number(parameter("smooth")) || 1;
  const drawn = JSON.stringify([
    context.compared,
    datas.map((data) => [data.epoch, data.changed]),
    smooth,
    datas.map((data) => data.advice.length),
  ]);
  if (drawn === view.drawn) return;
  view.drawn = drawn;
  const several = datas.length > 1;
  const wanted = chartsOf(datas);
  const box = view.root.querySelector("#charts");
  const layout = JSON.stringify(wanted.map((one) => one.section ?? one.title));
  if (layout !== view.layout) lay(box, wanted, layout);
  const colours = palette();
  const ofRun = (name) => colours.series[context.order.indexOf(name) % colours.series.length];
  for (const one of wanted)
    if (!one.section) drawOne(view.charts.get(one.title), one, { datas, several, smooth, colours, ofRun });
  const legend = several ? context.compared.map((name) => el("span", { class: "key" }, swatch(ofRun(name)), name)) : [];
  fill(view.root.querySelector("#legend"), legend);
  showAdvice(several);
  globalThis.echarts.connect(GROUP);
}

/** Make the elements of the charts. */
function lay(box, wanted, layout) {
  unmount();
  view.layout = layout;
  fill(box);
  let grid = null;
  for (const one of wanted) {
    if (one.section) {
      grid = el("div", { class: "grid" });
      put(box, el("h2", {}, one.section), grid);
      continue;
    }
    const pointed = () => (view.pointed = one.title);
    const canvas = el("div", {
      class: "canvas",
      role: "img",
      "aria-label": `Chart: ${one.title}`,
      onmouseenter: pointed,
    });
    const keys = el("div", { class: "keys" });
    put(
      grid,
      el(
        "figure",
        { class: "chart" },
        el("figcaption", {}, el("b", {}, one.title), el("span", { class: "unit" }, one.unit), keys),
        canvas,
      ),
    );
    const made = chart(canvas);
    made.chart.group = GROUP;
    view.charts.set(one.title, { ...made, keys });
  }
  if (!wanted.length)
    put(box, el("p", { class: "empty" }, "The run has not finished a step yet. Curves appear when it has."));
}

function drawOne(slot, one, given) {
  const { colours, several } = given;
  const options = base(colours);
  const lines = linesOf(one, given);
  options.series = lines.map((each) => each.series);
  if (one.zero || one.stacked) options.yAxis.min = (value) => Math.min(0, value.min);
  const labels = lines.filter((each) => each.label);
  if (!one.stacked && !one.zero) options.yAxis.axisLabel.formatter = axisFormat(labels);
  options.tooltip.formatter = (shown) => (view.pointed === one.title ? tooltip(shown, lines) : ""); // others show the line alone
  slot.chart.setOption(options, { notMerge: true });
  fill(slot.keys, several ? compared(one, labels) : labels.map((each) => key(each, labels.length > 1)));
}

/** The keys of a chart that compares runs: their last values, or what its strokes mean. */
function compared(one, labels) {
  const columns = [...new Set(labels.map((each) => each.column))];
  if (columns.length < 2)
    return (labels.length > MOST_KEYS ? [] : labels).map((each) =>
      el("span", { class: "key", title: each.label }, swatch(each.colour), el("b", {}, short(each.points.at(-1)[1]))),
    );
  return columns.map((column, index) =>
    el("span", { class: "key" }, el("i", { class: index ? "stroke dashed" : "stroke" }), words(column).toLowerCase()),
  );
}

function key(each, named) {
  const last = each.points.at(-1);
  return el(
    "span",
    { class: "key", title: words(each.column) },
    named && swatch(each.colour),
    named && el("span", {}, each.label),
    el("b", {}, last ? short(last[1]) : ""),
  );
}

/** The lines of a chart: by column for one run, by run for several. */
function linesOf(one, { datas, several, smooth, colours, ofRun }) {
  const made = [];
  const columns = several && one.together ? [one.together] : one.columns;
  datas.forEach((data, number) => {
    const run = view.context.compared[number];
    columns.forEach((column, index) => {
      const raw = points(data, column);
      if (!raw.length && !(one.stacked && !several)) return;
      const colour = several ? ofRun(run) : colours.series[index % colours.series.length];
      const marks = Boolean(one.marked?.includes(column));
      const stacked = one.stacked && !several;
      const dashed = several && index > 0;
      const label = several
        ? columns.length > 1
          ? `${run}: ${words(column).toLowerCase()}`
          : run
        : words(column).toLowerCase();
      const id = `${run}/${column}`;
      if (smooth > 1 && !marks && !stacked) {
        made.push({
          series: { ...line(`${label} raw`, raw, colour, { strength: 0.22, id: `${id}/raw` }), silent: true },
        });
        made.push({
          series: line(label, smoothed(raw, smooth), colour, { id, dashed }),
          label,
          colour,
          points: raw,
          column,
        });
      } else {
        made.push({
          series: line(label, raw, colour, { id, dashed, marks, area: stacked }),
          label,
          colour,
          points: raw,
          column,
        });
      }
    });
  });
  return made;
}

function tooltip(shown, lines) {
  const list = [shown].flat();
  const byId = new Map(lines.filter((each) => each.label).map((each) => [each.series.id, each]));
  const rows = list
    .filter((item) => byId.has(item.seriesId))
    .map((item) => [byId.get(item.seriesId).colour, byId.get(item.seriesId).label, short(item.value[1])]);
  return tip(`step ${whole(list[0]?.axisValue)}`, rows);
}

/** List the advisories: the newest of each kind, with how often it came. */
function showAdvice(several) {
  const box = view.root.querySelector("#advice");
  const found = new Map();
  view.datas.forEach((data, number) => {
    for (const one of data.advice) {
      const name = JSON.stringify([number, one.kind, one.engine ?? null]);
      const before = found.get(name);
      found.delete(name);
      found.set(name, { ...one, run: view.context.compared[number], times: (before?.times ?? 0) + 1 });
    }
  });
  const list = [...found.values()].sort((a, b) => b.step - a.step);
  box.hidden = !list.length;
  box.classList.toggle("single", !several);
  const row = (one) =>
    el(
      "div",
      { class: "advisory" },
      el(
        "span",
        { class: "when" },
        several && el("span", { class: "name" }, one.run),
        `step ${whole(one.step)}`,
        one.times > 1 && ` ×${one.times}`,
      ),
      el("span", { class: "kind" }, String(one.kind ?? "").replaceAll("_", " ")),
      el("span", { class: "what" }, one.text ?? "", one.do && el("span", { class: "do" }, ` → ${one.do}`)),
    );
  const hidden = list.slice(SHOWN_ADVICE);
  const wasOpen = box.querySelector("details")?.open;
  fill(
    box,
    list.slice(0, SHOWN_ADVICE).map(row),
    hidden.length > 0 && el("details", { open: wasOpen }, el("summary", {}, `${hidden.length} more`), hidden.map(row)),
  );
}

function recolour() {
  view.drawn = "";
  draw();
}

export const curves = { mount, update, unmount, recolour };
