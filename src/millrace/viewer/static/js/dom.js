// Elements. Text goes in as text nodes alone: nothing that a model wrote is ever read as HTML.

/** Make an element. Attributes that begin with "on" are listeners; null and false leave one out. */
export function el(tag, attributes = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (value === null || value === undefined || value === false) continue;
    if (name.startsWith("on")) made.addEventListener(name.slice(2), value);
    else if (name === "value") made.value = value;
    else made.setAttribute(name, value === true ? "" : String(value));
  }
  put(made, ...children);
  return made;
}

/** Append children: nodes, texts, or lists of them. */
export function put(parent, ...children) {
  for (const child of children.flat(Infinity)) {
    if (child === null || child === undefined || child === false) continue;
    parent.append(child instanceof Node ? child : document.createTextNode(String(child)));
  }
  return parent;
}

/** Replace all children. */
export function fill(parent, ...children) {
  parent.replaceChildren();
  return put(parent, ...children);
}

export const byId = (id) => document.getElementById(id);

/** The colour that a CSS variable has now, as canvas understands it. */
export function colour(name) {
  const probe = byId("probe") ?? document.body.appendChild(el("span", { id: "probe", hidden: true }));
  probe.style.color = `var(--${name})`;
  return getComputedStyle(probe).color;
}

/** A colour with another opacity, from 0 to 1. */
export function faded(rgb, alpha) {
  const parts = rgb.match(/[\d.]+/g).slice(0, 3);
  return `rgba(${parts.join(",")},${alpha})`;
}

/** Call `work` once calls have ceased for some milliseconds. */
export function settled(work, milliseconds = 250) {
  let timer = 0;
  return (...given) => {
    clearTimeout(timer);
    timer = setTimeout(() => work(...given), milliseconds);
  };
}
