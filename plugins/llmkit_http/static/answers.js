// Getting answers: sends a conversation, writes the answer into it as it comes, keeps what came when it breaks off.

import { streamChat, streamCompletion } from "./api.js";
import { isRunning, sampling, state } from "./state.js";
import { requestMessages, saveConversation } from "./store.js";

const KEEP_EVERY = 1000; // milliseconds between savings of an answer that is still coming
const COMPLETION_TOKENS = 128; // a base model goes on forever; OpenAI's own default of 16 is not even a sentence

/** Answer the last message of a chat. `changed(conversation)` is called whenever there is something new to show. */
export async function answer(conversation, changed) {
  const message = { role: "assistant", content: "", state: "streaming" };
  let messages = requestMessages(conversation);
  conversation.messages.push(message);
  await run(conversation, message, changed, async (signal, add) => {
    for (;;) {
      try {
        return await add(streamChat({ ...sampling(), model: conversation.model, messages }, signal));
      } catch (error) {
        const shorter = error.code === "context_length_exceeded" && !message.content && withoutOldest(messages);
        if (!shorter) {
          delete message.leftOut; // nothing was answered
          throw error;
        }
        message.leftOut = (message.leftOut ?? 0) + messages.length - shorter.length;
        messages = shorter;
      }
    }
  });
}

/** Continue the text of a conversation of kind completion. */
export async function complete(conversation, changed) {
  const prompt = conversation.text;
  const part = {
    get content() { return conversation.text.slice(prompt.length); },
    set content(text) { conversation.text = prompt + text; },
  };
  conversation.parts.push(prompt.length);
  await run(conversation, part, changed, (signal, add) => {
    const body = { max_tokens: COMPLETION_TOKENS, ...sampling(), model: conversation.model, prompt };
    return add(streamCompletion(body, signal));
  });
  if (!part.content) conversation.parts.pop();
  conversation.state = part.state;
  conversation.error = part.error;
  changed(conversation);
}

/** Do `work`, whose pieces go into `target.content`, while `conversation` counts as running. */
async function run(conversation, target, changed, work) {
  if (isRunning(conversation)) return;
  const controller = new AbortController();
  state.running.set(conversation.id, { controller, conversation });
  conversation.updated = Date.now();
  let kept = 0;
  const add = async (pieces) => {
    for await (const piece of pieces) {
      if (piece.text) target.content += piece.text;
      if (piece.finish) target.state = piece.finish === "length" ? "length" : "done";
      if (Date.now() - kept > KEEP_EVERY) {
        saveConversation(conversation);
        kept = Date.now();
      }
      changed(conversation);
    }
  };
  saveConversation(conversation);
  changed(conversation);
  try {
    await work(controller.signal, add);
  } catch (error) {
    target.state = controller.signal.aborted ? "stopped" : "error";
    if (!controller.signal.aborted) Object.assign(target, { error: error.message, status: error.status });
  } finally {
    state.running.delete(conversation.id);
    saveConversation(conversation);
    changed(conversation);
  }
}

/** Messages without the oldest question and its answer, the system message kept; null where only one is left. */
function withoutOldest(messages) {
  const first = messages[0].role === "system" ? 1 : 0;
  const next = messages.findIndex((message, index) => index > first && message.role === "user");
  return next < 0 ? null : [...messages.slice(0, first), ...messages.slice(next)];
}
