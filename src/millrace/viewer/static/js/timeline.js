// A lane for each engine: what it did when, and the versions that were sent to it.

import { get } from "./api.js";
import { TIP_BOX, chart, font, palette, swatch, tip } from "./charts.js";
import { colour, el, fill, put, settled } from "./dom.js";
import { clock, seconds } from "./format.js";

const LEGS = ["begin", "load", "attest", "commit"];
const STATES = ["generating", "ready", "paused", "asleep", "loading", "suspect", "draining", "quarantined", "dead", "gone"];
const NAMES = { ready: "idle", loading: "starting, catching up", gone: "not running" };
const MARGIN = 0.5; // of the window, fetched on each side of it
const view = { run: "", box: null, made: null, data: null, window: null, fetched: null, key: "" };

const stateColours = () => Object.fromEntries(STATES.map((name) => [name, colour(`lane-${name}`)]));
const legColours = () => Object.fromEntries(LEGS.map((name) => [name, colour(`leg-${name}`)]));

/** Fetch and draw the lanes of a run. The part that the reader has zoomed to stays. */
export async function drawLanes(box, run, last) {
  if (view.box !== box || view.run !== run) {
    disposeLanes();
    Object.assign(view, { box, run, data: null, window: null, fetched: null, key: "" });
    fill(
      box,
      el("h2", {}, "Timeline", el("span", { class: "unit", id: "span" })),
      el("div", { class: "legend", id: "lane-legend" }),
      el("div", { class: "lanes", id: "lanes", role: "img", "aria-label": "Timeline of the engines" }),
    );
  }
  if (!view.data || view.data.last !== last) await refresh(); // last: the time of the newest event
}

async function refresh() {
  const { run, window: shown } = view;
  const asked = shown
    ? { start: shown[0] - MARGIN * (shown[1] - shown[0]), end: shown[1] + MARGIN * (shown[1] - shown[0]) }
    : {};
  const data = await get("api/timeline", { run, ...asked });
  if (run !== view.run || !view.box?.isConnected) return;
  const key = JSON.stringify([data.last, asked, data.lanes.length]);
  if (key === view.key) return;
  view.key = key;
  view.data = data;
  draw();
}

function draw() {
  const { data, box } = view;
  if (!data) return;
  const element = box.querySelector("#lanes");
  if (!data.lanes.length) {
    fill(element, el("p", { class: "empty" }, "The run has no events yet."));
    return;
  }
  const height = data.lanes.length <= 8 ? 40 : data.lanes.length <= 24 ? 28 : 18;
  element.style.height = `${data.lanes.length * height + 74}px`;
  if (!view.made) {
    fill(element);
    view.made = chart(element);
    view.made.chart.on("datazoom", settled(zoomed, 200));
  }
  view.made.chart.resize();
  const states = stateColours();
  const legs = legColours();
  const items = itemsOf(data, states, legs);
  view.made.chart.setOption(options(data, items), { replaceMerge: ["series"] });
  fill(
    box.querySelector("#span"),
    `${clock(data.first)} – ${clock(data.last)} · ${seconds(data.last - data.first)} · scroll to zoom, drag to move`,
  );
  legend(box.querySelector("#lane-legend"), items, states, legs);
}

// The heights of what is drawn in a lane, as parts of it: from where, and how high.
const ROWS = { state: [-0.36, 0.5], publish: [0.2, 0.16], gone: [-0.14, 0.06] };

/** The rectangles: [lane, start, end, row, colour, what, note]. */
function itemsOf(data, states, legs) {
  const made = [];
  data.lanes.forEach((lane, index) => {
    for (const [kind, start, end, reason] of lane.spans)
      made.push([
        index,
        start,
        end,
        kind === "gone" ? "gone" : "state",
        states[kind] ?? states.suspect,
        NAMES[kind] ?? kind,
        reason ?? "",
      ]);
    for (const [start, end] of lane.busy) made.push([index, start, end, "state", states.generating, "generating", ""]);
    for (const publish of lane.publishes) {
      let at = publish.start;
      const note = `version ${publish.version}${publish.reason ? `, failed: ${publish.reason}` : ""}`;
      for (const leg of LEGS) {
        const end = at + publish.legs[leg];
        if (publish.legs[leg] > 0)
          made.push([index, at, end, "publish", publish.reason ? states.dead : legs[leg], leg, note]);
        at = end;
      }
      if (publish.pause > 0)
        made.push([index, Math.max(publish.start, at - publish.pause), at, "state", states.paused, "paused", note]);
    }
  });
  return made;
}

function options(data, items) {
  const colours = palette();
  const label = { color: colours.muted, fontSize: 11, fontFamily: font() };
  const zoom = { xAxisIndex: 0, filterMode: "none", minValueSpan: 200 };
  return {
    animation: false,
    grid: { left: 96, right: 16, top: 6, bottom: 62 },
    xAxis: {
      type: "time",
      min: 1000 * data.first,
      max: 1000 * data.last,
      axisLine: { lineStyle: { color: colours.line } },
      axisLabel: { ...label, hideOverlap: true, formatter: (at) => clock(at / 1000) },
      splitLine: { show: true, lineStyle: { color: colours.line } },
    },
    yAxis: {
      type: "category",
      inverse: true,
      data: data.lanes.map((lane) => lane.engine),
      axisTick: { show: false },
      axisLine: { show: false },
      axisLabel: { ...label, color: colours.text, width: 86, overflow: "truncate" },
      splitLine: { show: false },
    },
    dataZoom: [
      { type: "inside", ...zoom },
      {
        type: "slider",
        ...zoom,
        height: 18,
        bottom: 8,
        showDetail: false,
        brushSelect: false,
        borderColor: colours.line,
        fillerColor: colours.faint,
        backgroundColor: "transparent",
        handleStyle: { color: colours.muted, borderColor: colours.muted },
        moveHandleStyle: { color: colours.line },
        dataBackground: { lineStyle: { opacity: 0 }, areaStyle: { opacity: 0 } },
        selectedDataBackground: { lineStyle: { opacity: 0 }, areaStyle: { opacity: 0 } },
      },
    ],
    tooltip: {
      trigger: "item",
      ...TIP_BOX,
      formatter: (shown) => tooltip(items[shown.dataIndex], data),
    },
    series: [
      {
        id: "spans",
        type: "custom",
        renderItem: rectangle(items),
        encode: { x: [1, 2], y: 0 },
        data: items.map((one) => [one[0], 1000 * one[1], 1000 * one[2]]),
        clip: true,
      },
    ],
  };
}

const rectangle = (items) => (parameters, api) => {
  const [, , , row, fillColour] = items[parameters.dataIndex];
  const lane = api.value(0);
  const [left, middle] = api.coord([api.value(1), lane]);
  const [right] = api.coord([api.value(2), lane]);
  const band = api.size([0, 1])[1];
  const [top, height] = ROWS[row];
  const least = row === "publish" ? 1.5 : 1;
  const shape = { x: left, y: middle + top * band, width: Math.max(least, right - left), height: height * band };
  const shown = globalThis.echarts.graphic.clipRectByRect(shape, parameters.coordSys);
  return shown && { type: "rect", shape: shown, style: { fill: fillColour } };
};

function tooltip([lane, start, end, row, dot, what, note], data) {
  const rows = [
    [null, row === "publish" ? "leg of a publish" : "for", seconds(end - start)],
    [null, "from", clock(start)],
  ];
  const made = tip([swatch(dot), `${data.lanes[lane].engine}: ${what}`], rows);
  if (note) put(made, el("div", { class: "tip-note" }, note));
  return made;
}

function legend(element, items, states, legs) {
  const present = new Set(items.map((item) => item[5]));
  const key = JSON.stringify([...present].sort());
  if (element.key === key + states.ready) return;
  element.key = key + states.ready;
  const of = (name, dot) =>
    present.has(NAMES[name] ?? name) && el("span", { class: "key" }, swatch(dot), NAMES[name] ?? name);
  const sent = LEGS.map((name) => of(name, legs[name])).filter(Boolean);
  fill(
    element,
    STATES.map((name) => of(name, states[name])),
    sent.length > 0 && el("span", { class: "key unit" }, "publish:"),
    sent,
  );
}

function zoomed() {
  const { made, data } = view;
  if (!made || !data) return;
  const { startValue, endValue, start, end } = made.chart.getOption().dataZoom[0];
  const whole = start < 0.01 && end > 99.99;
  view.window = whole ? null : [startValue / 1000, endValue / 1000];
  refresh().catch(() => {}); // the banner says why
}

export function disposeLanes() {
  view.made?.dispose();
  Object.assign(view, { made: null, box: null, run: "" });
}

export const recolourLanes = () => draw();
