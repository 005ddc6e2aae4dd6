// Light, dark, or as the system. The choice stays in the browser.

import { byId } from "./dom.js";

const ORDER = ["system", "light", "dark"];
const SIGNS = { system: "◐", light: "☀", dark: "☾" };
const NAMES = { system: "follow the system", light: "light", dark: "dark" };
const KEY = "millrace.theme";
const listeners = new Set();
let chosen = ORDER.includes(stored()) ? stored() : "system";

function stored() {
  try {
    return localStorage.getItem(KEY);
  } catch {
    return null; // the browser keeps nothing for this page
  }
}

function apply() {
  document.documentElement.dataset.theme = chosen;
  const button = byId("theme");
  button.textContent = SIGNS[chosen];
  button.setAttribute("aria-label", `Colours: ${NAMES[chosen]}`);
  for (const listener of listeners) listener();
}

export const whenThemeChanges = (listener) => listeners.add(listener);

export function nextTheme() {
  chosen = ORDER[(ORDER.indexOf(chosen) + 1) % ORDER.length];
  try {
    localStorage.setItem(KEY, chosen);
  } catch {
    // it lasts until the page is left
  }
  apply();
}

export function startTheme() {
  byId("theme").addEventListener("click", nextTheme);
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", apply);
  apply();
}
