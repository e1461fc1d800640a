// The view for base models: one text, which the model continues where it ends. What it wrote is tinted.

import { $, h } from "./dom.js";
import { isRunning } from "./state.js";
import { saveConversation } from "./store.js";

const STATES = { stopped: "Stopped.", length: "", done: "The model ended the text here." };

/** Show a conversation of kind completion in `view`; only what changed is touched while an answer is coming. */
export function showCompletion(view, conversation) {
  let page = view.querySelector(".page");
  if (!page || page.conversation !== conversation) {
    page = createPage(conversation);
    view.replaceChildren(page, h("p", { class: "error", role: "alert" }));
  }
  const running = isRunning(conversation);
  const area = page.querySelector("textarea");
  if (area.value !== conversation.text) area.value = conversation.text;
  area.readOnly = running;
  tint(page, conversation);
  view.querySelector(".error").textContent = running ? "" : conversation.error ?? "";
  view.classList.toggle("empty", false);
  $("#undo").disabled = $("#again").disabled = running || conversation.parts.length === 0;
  $("#completion-state").textContent = running ? "Writing…" : STATES[conversation.state] ?? "";
}

function createPage(conversation) {
  const area = h("textarea", {
    "aria-label": "Text to continue", placeholder: "Begin a text, and let the model continue it.", spellcheck: "false",
  });
  const page = h("div", { class: "page" }, h("div", { class: "tint", "aria-hidden": "true" }), area);
  page.conversation = conversation;
  area.addEventListener("input", () => {
    conversation.text = area.value;
    conversation.parts = conversation.parts.filter((start) => start < area.value.length);
    conversation.state = conversation.error = undefined;
    saveConversation(conversation);
    showCompletion(page.parentElement, conversation);
  });
  return page;
}

/** Behind the transparent text area lies the same text, with the last generated part marked. It gives the height. */
function tint(page, { text, parts }) {
  const start = parts.at(-1) ?? text.length;
  page.querySelector(".tint").replaceChildren(text.slice(0, start), h("mark", {}, text.slice(start)), "\n");
}

/** Take back the last part that the model wrote. */
export function undo(conversation) {
  const start = conversation.parts.pop();
  if (start === undefined) return;
  conversation.text = conversation.text.slice(0, start);
  conversation.state = conversation.error = undefined;
  saveConversation(conversation);
}
