// The page: finds the models, shows a conversation in the view of its kind, and ties the controls to it.

import { answer, complete } from "./answers.js";
import { listModels } from "./api.js";
import { showChat } from "./chat.js";
import { showCompletion, undo } from "./completion.js";
import { $, announce, h, setIcon } from "./dom.js";
import { askKey, setUpSettings } from "./settings.js";
import { setUpSidebar, showConversations, slide } from "./sidebar.js";
import { isRunning, kindOf, state, stop } from "./state.js";
import { isEmpty, lastModel, loadConversation, loadConversations, newConversation, onOtherTab, rememberModel } from "./store.js";

const NEAR = 80; // pixels from the end at which the view follows what is written

const CONTINUE_KEYS = /Mac|iPhone|iPad/.test(navigator.userAgent) ? "⌘ ↵" : "Ctrl ↵";

const scroller = $("#scroller");
const input = $("#input");
let following = true;
let frame = 0;

// ---- showing

/** Show what changed in a conversation, at the next frame; other conversations only show in the list. */
function changed(conversation) {
  if (conversation !== state.conversation) {
    if (!isRunning(conversation)) showConversations();
    return;
  }
  frame ||= requestAnimationFrame(() => { frame = 0; show(); });
}

let wasRunning = false;

function show() {
  const conversation = state.conversation;
  const chat = conversation.kind === "chat";
  const running = isRunning(conversation);
  $("#composer").hidden = !chat;
  $("#completion-tools").hidden = chat;
  if (chat) showChat($("#view"), conversation, { regenerate, resend, askKey: () => askKey("") });
  else showCompletion($("#view"), conversation);
  document.body.classList.toggle("completing", !chat);
  showSend(running);
  const title = conversation.title || (chat ? "New chat" : "New text");
  $("#title").textContent = isEmpty(conversation) && !conversation.renamed ? "" : title;
  document.title = isEmpty(conversation) ? "llmkit" : `${title} · llmkit`;
  if (running !== wasRunning) {
    wasRunning = running;
    announce(running ? "The model is writing" : "The answer has ended");
    showConversations();
  }
  if (following) scroller.scrollTop = scroller.scrollHeight;
  showLatest();
}

function showSend(running) {
  const send = $("#send");
  setIcon(send, running ? "stop" : "send");
  send.setAttribute("aria-label", running ? "Stop" : "Send");
  send.title = running ? "Stop (Esc)" : "Send (Enter)";
  send.disabled = !running && (!input.value.trim() || !state.model);
  const go = $("#continue");
  go.replaceChildren(running ? "Stop " : "Continue ", h("kbd", {}, running ? "Esc" : CONTINUE_KEYS));
  go.disabled = !state.model;
}

function showLatest() {
  $("#latest").hidden = scroller.scrollHeight - scroller.scrollTop - scroller.clientHeight < NEAR;
}

// ---- conversations

function open(conversation) {
  state.conversation = conversation ?? newConversation(kindOf(state.model), state.model?.id);
  const model = state.models.find(({ id }) => id === state.conversation.model);
  if (model && kindOf(model) === state.conversation.kind) choose(model);
  // The model may be gone, or another one be wanted: one of the kind answers from now on.
  else if (state.model && kindOf(state.model) === state.conversation.kind) state.conversation.model = state.model.id;
  else choose(state.models.find((other) => kindOf(other) === state.conversation.kind) ?? state.model);
  location.replace(`#${isEmpty(state.conversation) ? "" : state.conversation.id}`);
  following = true;
  wasRunning = isRunning(state.conversation);
  cancelAnimationFrame(frame);
  frame = 0;
  show();
  showConversations();
  focusText();
}

/** Put the cursor where text is written, unless that would bring up a phone's keyboard. */
function focusText() {
  if (matchMedia("(hover: hover)").matches) (state.conversation.kind === "chat" ? input : $(".page textarea"))?.focus();
}

function choose(model) {
  state.model = model ?? null;
  if (!model) return;
  rememberModel(model.id);
  $("#model").value = model.id;
  const same = kindOf(model) === state.conversation?.kind;
  if (same) state.conversation.model = model.id;
  $("#new-label").textContent = kindOf(model) === "chat" ? "New chat" : "New text";
}

function begin(work) {
  following = true;
  announce("");
  return work(state.conversation, changed);
}

function sendMessage() {
  const text = input.value.trim();
  const conversation = state.conversation;
  if (!text || isRunning(conversation) || !state.model) return;
  conversation.messages.push({ role: "user", content: text, state: "done" });
  input.value = "";
  grow();
  begin(answer);
  location.replace(`#${conversation.id}`);
}

function regenerate() {
  const { messages } = state.conversation;
  if (isRunning(state.conversation)) return;
  if (messages.at(-1)?.role === "assistant") messages.pop();
  begin(answer);
  focusText();
}

function resend(message, text) {
  const { messages } = state.conversation;
  messages.splice(messages.indexOf(message));
  messages.push({ role: "user", content: text, state: "done" });
  begin(answer);
  focusText();
}

function continueText() {
  if (isRunning(state.conversation)) return stop(state.conversation);
  if (state.conversation.text && state.model) begin(complete);
  location.replace(`#${state.conversation.id}`);
  return undefined;
}

// ---- controls

/** The message box is as high as its text, up to a limit that the style sets. */
function grow() {
  input.style.height = "auto";
  input.style.height = `${input.scrollHeight}px`;
  showSend(isRunning(state.conversation));
}

function setUpControls() {
  $("#composer").addEventListener("submit", (event) => {
    event.preventDefault();
    if (isRunning(state.conversation)) stop(state.conversation);
    else sendMessage();
  });
  input.addEventListener("input", grow);
  input.addEventListener("keydown", (event) => {
    if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
    event.preventDefault();
    sendMessage();
  });
  document.addEventListener("keydown", (event) => {
    if (event.key === "Escape" && isRunning(state.conversation) && !$("dialog[open]")) stop(state.conversation);
    if (event.key === "Enter" && (event.ctrlKey || event.metaKey) && state.conversation.kind === "completion") {
      event.preventDefault();
      if (!isRunning(state.conversation)) continueText();
    }
  });
  $("#new").addEventListener("click", () => { slide(false); open(null); });
  $("#continue").addEventListener("click", continueText);
  $("#undo").addEventListener("click", () => { undo(state.conversation); show(); });
  $("#again").addEventListener("click", () => { undo(state.conversation); continueText(); });
  $("#model").addEventListener("change", ({ target }) => {
    choose(state.models.find(({ id }) => id === target.value));
    if (kindOf(state.model) !== state.conversation.kind) open(null);
  });
  $("#latest").addEventListener("click", () => { following = true; scroller.scrollTo({ top: scroller.scrollHeight }); });
  scroller.addEventListener("scroll", () => {
    following = scroller.scrollHeight - scroller.scrollTop - scroller.clientHeight < NEAR;
    showLatest();
  });
  onOtherTab((id) => {
    const conversation = state.conversation;
    if (id === conversation.id && !isRunning(conversation)) {
      const kept = loadConversation(id);
      if (kept) return open(kept);
    }
    return showConversations();
  });
}

// ---- the beginning

/** The models, however long the server takes to have them. */
async function findModels() {
  for (;;) {
    try {
      state.models = await listModels();
      return true;
    } catch (error) {
      if (error.status === 401) {
        askKey(error.message);
        return false;
      }
      const loading = error.status === 503;
      $("#view").replaceChildren(h("p", { class: "status", role: "status" }, loading ? "The model is being loaded…" : error.message));
      await new Promise((resolve) => { setTimeout(resolve, loading ? 700 : 3000); });
    }
  }
}

async function start() {
  if (!(await findModels())) return;
  const select = $("#model");
  select.replaceChildren(...state.models.map(({ id }) => h("option", { value: id }, id)));
  select.disabled = state.models.length < 2;
  choose(state.models.find(({ id }) => id === lastModel()) ?? state.models[0]);
  open(loadConversations().find(({ id }) => `#${id}` === location.hash) ?? state.conversation);
}

setUpControls();
setUpSidebar(open);
setUpSettings(start);
state.conversation = newConversation("chat", null);
showSend(false);
showConversations();
start();
