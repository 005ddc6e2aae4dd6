// Numbers and times as text.

const grouped = new Intl.NumberFormat("en-US", { maximumFractionDigits: 0 });

export const known = (value) => value !== null && value !== undefined && !Number.isNaN(value);

/** An integer with separators. */
export const whole = (value) => (known(value) ? grouped.format(value) : "");

/** A number with three or four digits that matter. */
export function short(value) {
  if (!known(value)) return "";
  const size = Math.abs(value);
  if (size === 0) return "0";
  if (size >= 1e9) return `${trimmed(value / 1e9)}G`;
  if (size >= 1e6) return `${trimmed(value / 1e6)}M`;
  if (size >= 1e4) return `${trimmed(value / 1e3)}k`;
  if (size >= 1000) return grouped.format(value);
  if (size < 1e-3) return value.toExponential(1).replace("e-", "e−").replace(/^-/, "−");
  return trimmed(value).replace("-", "−");
}

function trimmed(value) {
  const size = Math.abs(value);
  return String(Number(value.toFixed(size >= 100 ? 0 : size >= 10 ? 1 : size >= 1 ? 2 : 4)));
}

/** A number with a fixed count of digits, for a column. */
export const fixed = (value, digits = 3) => (known(value) ? value.toFixed(digits).replace("-", "−") : "");

/** The same with a sign. */
export const signed = (value, digits = 3) =>
  known(value)
    ? `${Number(value.toFixed(digits)) > 0 ? "+" : Number(value.toFixed(digits)) < 0 ? "−" : ""}${Math.abs(value).toFixed(digits)}`
    : "";

export const percent = (value, digits = 0) => (known(value) ? `${(100 * value).toFixed(digits)}%` : "");

/** Seconds as a text of two units at most. */
export function seconds(value) {
  if (!known(value)) return "";
  if (value < 0.0995) return `${(1000 * value).toFixed(value < 0.00995 ? 1 : 0)} ms`;
  if (value < 99.5) return `${value.toFixed(value < 9.95 ? 2 : 1)} s`;
  if (value < 5400) return `${Math.round(value / 60)} min`;
  if (value < 172800) return `${(value / 3600).toFixed(1)} h`;
  return `${(value / 86400).toFixed(1)} d`;
}

/** How long ago a Unix time was. */
export function ago(at) {
  const passed = Date.now() / 1000 - at;
  return passed < 2 ? "now" : passed < 60 ? `${Math.round(passed)} s ago` : `${seconds(Math.max(100, passed))} ago`;
}

/** The time of day of a Unix time. */
export const clock = (at) => new Date(1000 * at).toLocaleTimeString("en-GB");

/** The time of day of a Unix time, with the day unless it is today. */
export function moment(at) {
  const day = new Date(1000 * at);
  const today = day.toDateString() === new Date().toDateString();
  return today ? clock(at) : `${day.toLocaleDateString("en-GB", { day: "numeric", month: "short" })} ${clock(at)}`;
}
