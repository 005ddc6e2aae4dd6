// A conversation as turns. All text is a model's or a tool's, and goes in as text.

import { el } from "./dom.js";

const ROLES = {
  assistant: "model",
  system: "system",
  user: "user",
  tool: "tool",
  function: "tool",
  developer: "system",
};

/** The turns of a conversation. `none` is shown if there are none. */
export function conversation(messages, none = "The sample has no conversation.") {
  if (!messages.length) return el("p", { class: "empty" }, none);
  return el("ol", { class: "turns" }, messages.map(turn));
}

function turn(message) {
  const role = ROLES[message.role] ?? "other";
  const failed = message.error === true;
  const calls = Array.isArray(message.tool_calls) ? message.tool_calls : [];
  const texts = contents(message.content);
  return el(
    "li",
    { class: `turn ${role}${failed ? " failed" : ""}` },
    el(
      "div",
      { class: "role" },
      role === "other" ? String(message.role) : role,
      message.name && el("span", { class: "of" }, String(message.name)),
      failed && el("span", { class: "bad" }, "error"),
    ),
    el(
      "div",
      { class: "said" },
      message.reasoning &&
        el(
          "details",
          { class: "reasoning", open: true },
          el("summary", {}, "reasoning"),
          el("div", { class: "prose" }, String(message.reasoning)),
        ),
      texts,
      calls.map(call),
      !message.reasoning && !texts.length && !calls.length && el("span", { class: "dim" }, "empty"),
    ),
  );
}

/** The parts of a message's content: texts, and what stands for images. */
function contents(content) {
  if (content === null || content === undefined || content === "") return [];
  if (typeof content === "string") return [el("div", { class: "prose" }, content)];
  const parts = Array.isArray(content) ? content : [content];
  return parts.map((part) => {
    if (typeof part === "string") return el("div", { class: "prose" }, part);
    if (part?.type === "text") return el("div", { class: "prose" }, String(part.text));
    if (part?.type === "image" || part?.type === "image_url") return el("div", { class: "image" }, "an image");
    return el("pre", {}, JSON.stringify(part, null, 1));
  });
}

function call(one) {
  const called = one?.function ?? one ?? {};
  return el(
    "div",
    { class: "call" },
    el("span", { class: "callee" }, String(called.name ?? "?")),
    el("pre", {}, parameters(called.arguments)),
  );
}

/** The arguments of a call, as few lines as they need. */
function parameters(given) {
  let value = given;
  if (typeof given === "string") {
    try {
      value = JSON.parse(given);
    } catch {
      return given; // as the model wrote it
    }
  }
  if (value === null || typeof value !== "object") return String(value ?? "");
  const entries = Object.entries(value);
  const text = (part) => (typeof part === "string" ? part : JSON.stringify(part));
  if (entries.length === 1 && !text(entries[0][1]).includes("\n")) return `${entries[0][0]}: ${text(entries[0][1])}`;
  return entries
    .map(([name, part]) => (text(part).includes("\n") ? `${name}:\n${text(part)}` : `${name}: ${text(part)}`))
    .join("\n");
}

/** How many messages all conversations begin with. */
export function differing(conversations) {
  const whole = conversations.filter((one) => one.length);
  if (whole.length < 2) return 0;
  const most = Math.min(...whole.map((one) => one.length));
  let count = 0;
  while (count < most && whole.every((one) => JSON.stringify(one[count]) === JSON.stringify(whole[0][count])))
    count += 1;
  return whole.length === conversations.length ? count : 0;
}
