// Whether a run goes on, has ended, or was cut off.

import { ago, moment } from "./format.js";

const SILENT = 120; // seconds without a step or an event, after which a run may have been cut off

/** Whether a run goes on ("fresh"), has "ended" or "failed", or is "silent". `live`: the page is the run's own. */
export function lifeOf(run, live) {
  if (live) return "fresh";
  if (run.ended) return run.ended.reason ? "failed" : "ended";
  return Date.now() / 1000 - (run.changed_at ?? 0) < SILENT ? "fresh" : "silent";
}

/** The same in words. */
export function news(run, live) {
  const life = lifeOf(run, live);
  if (life === "fresh") return ago(run.changed_at);
  const at = run.ended?.at ?? run.changed_at;
  const words = { ended: "ended", failed: "ended by an error", silent: "no news since" }[life];
  return `${run.ended?.reason === "interrupted" ? "interrupted" : words} ${moment(at)}, ${ago(at)}`;
}
