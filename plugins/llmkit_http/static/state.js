// What the page knows: the models, the conversation that is shown, the answers that are being written.

import { loadSettings } from "./store.js";

export const state = {
  models: [], // as the server lists them
  model: null, // the one that is chosen
  conversation: null, // the one that is shown
  settings: loadSettings(),
  running: new Map(), // id of a conversation -> {controller, conversation} while its answer is coming
};

export const kindOf = (model) => (model?.has_chat_template === false ? "completion" : "chat");
export const isRunning = (conversation) => state.running.has(conversation.id);
export const stop = (conversation) => state.running.get(conversation.id)?.controller.abort();

/** The sampling parameters that are set, as a request has them. */
export function sampling() {
  const { stop: text, ...numbers } = state.settings;
  return { ...numbers, ...(text ? { stop: [text] } : {}) };
}
