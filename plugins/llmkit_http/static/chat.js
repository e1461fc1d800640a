// The view of a chat: its messages, their buttons, editing a message, the system prompt.

import { copyButton, h, iconButton } from "./dom.js";
import { renderMarkdown } from "./markdown.js";
import { isRunning } from "./state.js";
import { saveConversation } from "./store.js";

const shown = new WeakMap(); // message -> its element, for as long as both are there
const STATES = {
  stopped: "Stopped.",
  length: "Cut off at the longest answer that is allowed, or the end of the model's context.",
};

/**
 * Show a conversation in `view`. `actions`: regenerate(), resend(message, text) and askKey().
 * Elements of messages that are there already are kept.
 */
export function showChat(view, conversation, actions) {
  const list = view.querySelector(".messages");
  if (!list || list.conversation !== conversation) {
    const fresh = h("div", { class: "messages", role: "log", "aria-label": "Messages" });
    fresh.conversation = conversation;
    view.replaceChildren(systemPrompt(conversation), fresh);
    return showChat(view, conversation, actions);
  }
  list.setAttribute("aria-busy", String(isRunning(conversation)));
  const elements = conversation.messages.map((message) => {
    if (!shown.has(message)) shown.set(message, element(message, conversation, actions));
    const article = shown.get(message);
    article.update(message === conversation.messages.at(-1));
    return article;
  });
  elements.forEach((article, index) => {
    if (list.children[index] !== article) list.insertBefore(article, list.children[index] ?? null);
  });
  while (list.children.length > elements.length) list.lastElementChild.remove();
  view.classList.toggle("empty", conversation.messages.length === 0);
  return undefined;
}

function systemPrompt(conversation) {
  const area = h("textarea", { rows: 2, placeholder: "How the model should behave", "aria-label": "System prompt" });
  area.value = conversation.system;
  const details = h("details", { class: "system", open: Boolean(conversation.system) },
    h("summary", {}, "System prompt"), h("div", { class: "grow" }, area));
  area.addEventListener("input", () => {
    conversation.system = area.value;
    if (conversation.messages.length) saveConversation(conversation);
  });
  return details;
}

function element(message, conversation, actions) {
  return message.role === "user" ? userMessage(message, conversation, actions) : assistantMessage(message, conversation, actions);
}

function leftOutNotice(count) {
  if (!count) return "";
  const what = count === 1 ? "message is" : `${count} messages are`;
  return `The conversation no longer fits the model's context: the oldest ${what} left out.`;
}

function userMessage(message, conversation, actions) {
  const text = h("div", { class: "text" }, message.content);
  const buttons = h("div", { class: "actions" },
    iconButton("edit", "Edit", () => edit()), copyButton(() => message.content));
  const article = h("article", { class: "user", "aria-label": "You" }, text, buttons);
  article.update = () => { buttons.firstChild.disabled = isRunning(conversation); };

  function edit() {
    const area = h("textarea", { "aria-label": "Edit the message" });
    area.value = message.content;
    const close = () => { article.classList.remove("editing"); article.replaceChildren(text, buttons); buttons.firstChild.focus(); };
    const send = () => { if (area.value.trim() && !isRunning(conversation)) actions.resend(message, area.value.trim()); };
    area.addEventListener("keydown", (event) => {
      if (event.key === "Escape") { event.stopPropagation(); close(); }
      if (event.key === "Enter" && !event.shiftKey && !event.isComposing) { event.preventDefault(); send(); }
    });
    article.classList.add("editing");
    article.replaceChildren(h("div", { class: "grow" }, area),
      h("div", { class: "buttons" },
        h("button", { type: "button", class: "quiet", onclick: close }, "Cancel"),
        h("button", { type: "button", class: "primary", onclick: send }, "Send")));
    area.focus();
    area.setSelectionRange(area.value.length, area.value.length);
  }
  return article;
}

function assistantMessage(message, conversation, actions) {
  const notice = h("p", { class: "hint" });
  const text = h("div", { class: "text markdown" });
  const foot = h("div", { class: "foot" });
  const article = h("article", { class: "assistant", "aria-label": "Model" }, notice, text, foot);
  let drawn; // what was drawn last: text, state, whether the message is the last one
  article.update = (last) => {
    const running = isRunning(conversation);
    const now = JSON.stringify([message.content, message.state, last, running]);
    if (now === drawn) return;
    drawn = now;
    notice.textContent = leftOutNotice(message.leftOut);
    renderMarkdown(text, message.content);
    // An answer that a reload cut off is still marked as streaming.
    const state = message.state === "streaming" && !(running && last) ? "stopped" : message.state;
    article.classList.toggle("waiting", state === "streaming" && !message.content);
    article.classList.toggle("writing", state === "streaming");
    foot.replaceChildren(...footer(state, last && !running));
  };

  function footer(state, canRegenerate) {
    const parts = [];
    if (state === "error") {
      parts.push(h("p", { class: "error", role: "alert" }, message.error,
        ...(message.status === 401 ? [" ", h("button", { type: "button", class: "link", onclick: actions.askKey }, "Enter a key")] : [])));
    } else if (STATES[state]) parts.push(h("p", { class: "hint" }, STATES[state]));
    if (state === "streaming") return parts;
    const buttons = [];
    if (message.content) buttons.push(copyButton(() => message.content));
    if (canRegenerate) {
      const failed = state === "error";
      buttons.push(iconButton("retry", "Regenerate", actions.regenerate, failed ? "Try again" : ""));
    }
    return [...parts, h("div", { class: "actions" }, ...buttons)];
  }
  return article;
}
