// What the browser keeps: conversations, one entry each so that two tabs do not overwrite each other's, and settings.
//
// A conversation: {id, title, renamed, kind: "chat" | "completion", model, updated, system, messages} or, of kind
// completion, {…, text, parts: [start of each generated part]}. A message: {role, content, state, error, leftOut};
// state is done, length, stopped, error, or streaming while its answer is coming.

import { toast } from "./dom.js";

const PREFIX = "llmkit.chat.";

export function newConversation(kind, model) {
  const id = Date.now().toString(36) + Math.random().toString(36).slice(2, 8);
  const common = { id, title: "", kind, model, updated: Date.now() };
  return kind === "chat" ? { ...common, system: "", messages: [] } : { ...common, text: "", parts: [] };
}

export function isEmpty(conversation) {
  return conversation.kind === "chat" ? conversation.messages.length === 0 : conversation.text === "";
}

/** All conversations, the newest first. */
export function loadConversations() {
  const found = [];
  for (const name of Object.keys(localStorage)) {
    if (!name.startsWith(PREFIX)) continue;
    const conversation = read(name);
    if (conversation?.id) found.push(conversation);
  }
  return found.sort((a, b) => b.updated - a.updated);
}

export function loadConversation(id) {
  return read(PREFIX + id);
}

const deleted = new WeakSet(); // an answer may still be coming to one of them

export function saveConversation(conversation) {
  if (deleted.has(conversation)) return;
  if (!conversation.renamed) conversation.title = titleOf(conversation);
  write(PREFIX + conversation.id, conversation);
}

export function deleteConversation(conversation) {
  deleted.add(conversation);
  localStorage.removeItem(PREFIX + conversation.id);
}

export function restoreConversation(conversation) {
  deleted.delete(conversation);
  saveConversation(conversation);
}

export function onOtherTab(listener) {
  addEventListener("storage", (event) => {
    if (event.key?.startsWith(PREFIX)) listener(event.key.slice(PREFIX.length));
  });
}

export const DEFAULTS = { temperature: 0.8 }; // plain sampling from a small model wanders; this stays lively
export const loadSettings = () => read("llmkit.settings") ?? DEFAULTS;
export const saveSettings = (settings) => write("llmkit.settings", settings);
export const lastModel = () => localStorage.getItem("llmkit.model");
export const rememberModel = (model) => localStorage.setItem("llmkit.model", model);

/** The conversation as a file that `llmkit chat --load` reads: what a chat completion request holds. */
export function exportConversation(conversation) {
  const { model, kind, text } = conversation;
  const value = kind === "chat" ? { model, messages: requestMessages(conversation) } : { model, text };
  return JSON.stringify(value, null, 2) + "\n";
}

/** The messages of a request: without answers that never came. */
export function requestMessages({ system, messages }) {
  const said = messages.filter((message) => message.role === "user" || message.content);
  return [
    ...(system.trim() ? [{ role: "system", content: system }] : []),
    ...said.map(({ role, content }) => ({ role, content })),
  ];
}

function titleOf(conversation) {
  const text = conversation.kind === "chat" ? conversation.messages[0]?.content ?? "" : conversation.text;
  const line = text.trim().split("\n", 1)[0];
  return line.length > 60 ? line.slice(0, 57).trimEnd() + "…" : line;
}

function read(name) {
  try {
    return JSON.parse(localStorage.getItem(name));
  } catch {
    return null; // not ours
  }
}

function write(name, value) {
  try {
    localStorage.setItem(name, JSON.stringify(value));
  } catch {
    toast("The browser's storage is full, so this conversation is not kept: export it, or delete others.");
  }
}
