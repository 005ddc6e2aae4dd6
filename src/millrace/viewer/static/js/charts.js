// What all charts have in common: colours, axes, and tooltips that are made of elements.

import { colour, el, faded } from "./dom.js";
import { fixed, short } from "./format.js";

const COLOURS = 8;

/** The colours that charts are drawn with now. */
export function palette() {
  return {
    series: Array.from({ length: COLOURS }, (_, index) => colour(`c${index}`)),
    text: colour("text"),
    muted: colour("muted"),
    line: colour("line"),
    panel: colour("panel"),
    bad: colour("bad"),
    good: colour("good"),
    warn: colour("warn"),
    faint: colour("faint"),
  };
}

/** A chart in an element, which keeps the element's size. `dispose` ends it. */
export function chart(element) {
  const made = globalThis.echarts.init(element, null, { renderer: "canvas" });
  const observer = new ResizeObserver(() => made.resize());
  observer.observe(element);
  const dispose = () => {
    observer.disconnect();
    made.dispose();
  };
  return { chart: made, dispose };
}

/** The box of a tooltip, which the page's own styles draw. */
export const TIP_BOX = {
  appendTo: "body",
  className: "tip",
  transitionDuration: 0,
  padding: 0,
  backgroundColor: "transparent",
  borderWidth: 0,
  extraCssText: "box-shadow:none",
};

export const font = () => getComputedStyle(document.body).fontFamily;

/** The options of every chart with two axes. */
export function base(colours) {
  const label = { color: colours.muted, fontSize: 11, fontFamily: font() };
  const line = { lineStyle: { color: colours.line } };
  return {
    animation: false,
    textStyle: { fontFamily: font() },
    grid: { left: 46, right: 14, top: 12, bottom: 24 },
    xAxis: {
      type: "value",
      min: "dataMin",
      max: "dataMax",
      minInterval: 1,
      splitNumber: 5,
      axisLine: line,
      axisTick: { show: false },
      splitLine: { show: false },
      axisLabel: { ...label, hideOverlap: true, formatter: short },
      axisPointer: {
        snap: true,
        lineStyle: { color: faded(colours.muted, 0.6), width: 1, type: "solid" },
        label: { show: false },
      },
    },
    yAxis: {
      type: "value",
      scale: true,
      splitNumber: 4,
      axisLine: { show: false },
      axisTick: { show: false },
      splitLine: { lineStyle: { color: colours.line, width: 1 } },
      axisLabel: { ...label, formatter: short },
    },
    tooltip: {
      trigger: "axis",
      confine: false,
      ...TIP_BOX,
      axisPointer: { type: "line" },
    },
  };
}

/** How an axis writes its numbers: with enough digits to tell its marks apart. */
export function axisFormat(lines) {
  let least = Infinity;
  let most = -Infinity;
  for (const { points } of lines) {
    for (const [, value] of points) {
      if (value < least) least = value;
      if (value > most) most = value;
    }
  }
  const size = Math.max(Math.abs(least), Math.abs(most));
  if (least === most) return short;
  const digits = Math.ceil(-Math.log10((most - least) / 4));
  if (!(size < 1e4 && size >= 1 && digits > 1)) return short;
  return (value) => fixed(value, Math.min(6, digits));
}

/** The content of a tooltip: a heading, and rows of a colour, a name and a value. */
export function tip(heading, rows) {
  return el(
    "div",
    { class: "tip-box" },
    el("div", { class: "tip-head" }, heading),
    el(
      "table",
      {},
      rows.map(([dot, name, value]) => el("tr", {}, el("td", {}, swatch(dot), name), el("td", {}, value))),
    ),
  );
}

export function swatch(colourOfIt) {
  const dot = el("i", { class: "dot" });
  if (colourOfIt) dot.style.background = colourOfIt;
  return dot;
}

/** The options of a line. `points`: pairs. `strength`: its opacity. */
export function line(
  name,
  points,
  colourOfIt,
  { dashed = false, strength = 1, marks = false, id = name, area = false } = {},
) {
  return {
    id,
    name,
    type: "line",
    data: points,
    showSymbol: marks || points.length < 2,
    symbol: "circle",
    symbolSize: marks ? 5 : 4,
    sampling: points.length > 2000 ? "lttb" : undefined,
    connectNulls: true,
    emphasis: { disabled: true },
    itemStyle: { color: faded(colourOfIt, strength) },
    lineStyle: { color: faded(colourOfIt, strength), width: 1.6, type: dashed ? [4, 3] : "solid" },
    ...(area
      ? { stack: "sum", areaStyle: { color: faded(colourOfIt, 0.55) }, lineStyle: { width: 0 }, showSymbol: false }
      : {}),
  };
}

/** An exponential mean over about `steps` points, with the bias of the start taken out. */
export function smoothed(points, steps) {
  if (steps < 2) return points;
  const keep = 1 - 2 / (steps + 1);
  let sum = 0;
  let weight = 0;
  return points.map(([x, y]) => {
    sum = keep * sum + (1 - keep) * y;
    weight = keep * weight + (1 - keep);
    return [x, sum / weight];
  });
}
