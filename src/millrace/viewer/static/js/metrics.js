// The metrics of runs, kept as columns and fetched as they grow; and which charts are drawn of them.

import { get } from "./api.js";
import { known } from "./format.js";

const runs = new Map();
const nothing = () => ({ epoch: 0, count: 0, columns: {}, advice: [], changed: 0, outline: null, sketched: 0 });

/**
 * Fetch what is new of a run, and return its columns and advisories. A long run comes in parts: until it is whole, the
 * columns are its outline, and `partial` is true.
 */
export async function metricsOf(name) {
  const had = runs.get(name) ?? nothing();
  const { epoch, count, sketched } = had;
  const answer = await get("api/metrics", { run: name, epoch, count, sketched });
  const made = { ...(answer.epoch === had.epoch ? had : nothing()), epoch: answer.epoch, advice: answer.advice };
  if (answer.sketch) Object.assign(made, { outline: derived(answer.sketch), sketched: answer.total });
  made.rows = answer.start === 0 ? {} : (had.rows ?? {});
  for (const [column, values] of Object.entries(answer.columns)) {
    const before = made.rows[column] ?? new Array(answer.start).fill(null);
    made.rows[column] = before.slice(0, answer.start).concat(values);
  }
  made.count = answer.count;
  made.partial = answer.count < answer.total;
  const whole = !made.partial || !made.outline;
  made.columns = whole ? derived(made.rows) : made.outline;
  const grown = whole && (answer.start === 0 || answer.count !== had.count);
  made.changed = had.changed + (grown || answer.sketch ? 1 : 0);
  runs.set(name, made);
  return made;
}

/** Add the columns that follow from others. */
function derived(columns) {
  const { tokens, samples_finished: done, tool_calls: calls } = columns;
  const limits = Object.keys(columns).filter((name) => /^ends\..*(limit|full)$/.test(name));
  if (limits.length)
    columns.samples_at_limit = columns[limits[0]].map((_, index) =>
      limits.reduce((sum, name) => sum + (columns[name][index] ?? 0), 0),
    );
  const each = (values, by) => values.map((value, index) => (by[index] > 0 ? value / by[index] : null));
  if (tokens && done) columns.tokens_per_sample = each(tokens, done);
  if (calls && done) columns.tool_calls_per_sample = each(calls, done);
  return columns;
}

/** The points of a column: pairs of step and value. */
export function points(data, column) {
  const steps = data.columns.step ?? [];
  const values = data.columns[column] ?? [];
  const made = [];
  for (let index = 0; index < values.length; index += 1)
    if (known(values[index])) made.push([steps[index], values[index]]);
  return made;
}

const PHASES = ["rollout", "judge", "train", "publish", "sleep", "evaluation"].map((name) => `${name}_seconds`);

// title, unit, columns (the first is shown alone when several runs are compared), and more
const CHARTS = [
  { section: "Learning" },
  {
    title: "Reward",
    unit: "training samples; accuracy held out",
    columns: ["reward", "accuracy"],
    marked: ["accuracy"],
    always: true,
  },
  { title: "Parts of the reward", unit: "means, before weights", prefix: "rewards." },
  {
    title: "Groups with signal",
    unit: "rewards differ",
    columns: ["groups_with_signal"],
    zero: true,
    always: true,
  },
  { title: "Judge's grade", unit: "mean", columns: ["grade"] },
  { section: "Policy" },
  { title: "Loss", unit: "", columns: ["loss"], always: true },
  { title: "KL", unit: "nats, sampling policy to trained", columns: ["kl"], zero: true, always: true },
  { title: "Entropy", unit: "nats", columns: ["entropy"] },
  { title: "Gap", unit: "mean |engine − trainer| logprob, nats", columns: ["logprob_gap"], zero: true },
  { title: "Clip fraction", unit: "of tokens", columns: ["clip_fraction"], zero: true },
  { title: "Gradient norm", unit: "", columns: ["grad_norm"], zero: true },
  { title: "Learning rate", unit: "", columns: ["lr"], zero: true },
  { section: "Rollouts" },
  { title: "Length", unit: "tokens generated per sample", columns: ["tokens_per_sample"], zero: true },
  { title: "How samples end", unit: "samples", prefix: "ends.", stacked: true, together: "samples_at_limit" },
  { title: "Staleness", unit: "versions behind, mean", columns: ["staleness"], zero: true },
  { title: "Tool calls", unit: "per sample", columns: ["tool_calls_per_sample"], zero: true },
  { title: "Branches", unit: "sequences per sample", columns: ["branches"] },
  { title: "Samples lost", unit: "failed, aborted", columns: ["samples_failed", "samples_aborted"], zero: true },
  { section: "Time" },
  { title: "Seconds of a step", unit: "by phase", columns: PHASES, stacked: true, together: "step_seconds" },
  { title: "Tokens per second", unit: "while engines generate", columns: ["tokens_per_second"], zero: true },
];
const NAMED = new Set(CHARTS.flatMap((chart) => [...(chart.columns ?? []), chart.together].filter(Boolean)));
const PREFIXES = CHARTS.map((chart) => chart.prefix).filter(Boolean);
const PLAIN = new Set(["step", "weight_version", "tokens", "tool_calls", "samples_finished", "step_seconds"]);

/** Whether a column has figures other than 0. That of a chart which is `always` there may be 0. */
const moves = (datas, column, always = false) =>
  datas.some((data) => (data.columns[column] ?? []).some((value) => known(value) && (always || value !== 0)));

/** The sections and charts that these runs have figures for. Columns that the page does not know come last. */
export function chartsOf(datas) {
  const made = [];
  for (const chart of CHARTS) {
    if (chart.section) made.push(chart);
    else if (chart.prefix) {
      const names = [...new Set(datas.flatMap((data) => Object.keys(data.columns)))].filter(
        (name) => name.startsWith(chart.prefix) && moves(datas, name),
      );
      if (names.length > 1 || (names.length && chart.together)) made.push({ ...chart, columns: names });
    } else {
      const columns = chart.columns.filter((column) => moves(datas, column, chart.always));
      if (columns.length) made.push({ ...chart, columns });
    }
  }
  const others = [...new Set(datas.flatMap((data) => Object.keys(data.columns)))].filter(
    (name) =>
      !NAMED.has(name) && !PLAIN.has(name) && !PREFIXES.some((prefix) => name.startsWith(prefix)) && moves(datas, name),
  );
  if (others.length)
    made.push(
      { section: "Other figures" },
      ...others.map((name) => ({ title: words(name), unit: "", columns: [name], zero: true })),
    );
  return made.filter((one, index) => !one.section || (made[index + 1] && !made[index + 1].section));
}

/** A column's name for people. */
export function words(column) {
  const text = column
    .replace(/^(rewards|ends)\./, "")
    .replace(/_seconds$/, "")
    .replaceAll("_", " ");
  return text.charAt(0).toUpperCase() + text.slice(1);
}
