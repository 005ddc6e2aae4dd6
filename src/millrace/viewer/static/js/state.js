// What is shown, which the URL's hash keeps: #VIEW?NAME=VALUE&...

const VIEWS = ["curves", "fleet", "samples"];
const listeners = new Set();
let parsed = null;

function parse() {
  const [view, query] = location.hash.slice(1).split("?", 2);
  return { view: VIEWS.includes(view) ? view : "curves", parameters: new URLSearchParams(query ?? "") };
}

export const state = () => (parsed ??= parse());
export const parameter = (name) => state().parameters.get(name) ?? "";

/** The hash of a view with some parameters changed. An empty value removes one. */
export function hashOf(view, changes = {}) {
  const parameters = new URLSearchParams(state().parameters);
  for (const [name, value] of Object.entries(changes)) {
    if (value === "" || value === null || value === undefined) parameters.delete(name);
    else parameters.set(name, value);
  }
  const query = parameters.toString();
  return `#${view}${query ? `?${query}` : ""}`;
}

/** Change parameters, and the view if one is given. `step`: whether the browser's Back returns to before. */
export function change(changes, { view = state().view, step = false } = {}) {
  const hash = hashOf(view, changes);
  if (hash === location.hash) return;
  history[step ? "pushState" : "replaceState"](null, "", hash);
  told();
}

export const whenChanged = (listener) => listeners.add(listener);

function told() {
  parsed = null;
  for (const listener of listeners) listener();
}

addEventListener("hashchange", told);
addEventListener("popstate", told);
