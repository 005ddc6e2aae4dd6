// Questions to the server. Each has a deadline, and the page says so while the server does not answer.

const DEADLINE = 30000; // ms
let reachable = true;
const listeners = new Set();

export const whenReachable = (listener) => listeners.add(listener);

function reached(now, why = "") {
  if (now === reachable && now) return;
  reachable = now;
  for (const listener of listeners) listener(now, why);
}

/** The URL of a route. Empty parameters are left out. */
export function urlOf(path, parameters = {}) {
  const given = Object.entries(parameters).filter(([, value]) => value !== "" && value !== null && value !== undefined);
  const query = new URLSearchParams(given).toString();
  return query ? `${path}?${query}` : path;
}

/** What a route answers. Throws an Error with the server's message, or an AbortError if `signal` ended it. */
export async function get(path, parameters = {}, signal = null) {
  const ends = [AbortSignal.timeout(DEADLINE), ...(signal ? [signal] : [])];
  let response;
  let answer;
  try {
    response = await fetch(urlOf(path, parameters), { signal: AbortSignal.any(ends), cache: "no-store" });
    answer = await response.json();
  } catch (error) {
    if (signal?.aborted) throw error;
    reached(false, error.name === "TimeoutError" ? "it did not answer in time" : "there is no connection");
    throw error;
  }
  reached(true);
  if (!response.ok) throw new Error(answer.error ?? `the server answered ${response.status}`);
  return answer;
}

/** The objects of a route that answers with JSON lines, as they come. */
export async function* lines(path, parameters, signal) {
  const response = await fetch(urlOf(path, parameters), { signal, cache: "no-store" });
  if (!response.ok) throw new Error((await response.json()).error);
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    const parts = (rest + value).split("\n");
    rest = parts.pop();
    for (const part of parts) yield JSON.parse(part);
  }
}
