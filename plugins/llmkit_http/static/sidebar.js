// The list of conversations: choose, rename, export, delete; on narrow screens it slides in.

import { $, h, iconButton, toast } from "./dom.js";
import { isRunning, state, stop } from "./state.js";
import { deleteConversation, exportConversation, loadConversations, restoreConversation, saveConversation } from "./store.js";

let open; // called with a conversation that was chosen, or null where it was deleted
let menuFor;

export function setUpSidebar(onopen) {
  open = onopen;
  const menu = $("#item-menu");
  menu.addEventListener("click", (event) => {
    const action = event.target.dataset?.action;
    if (!action) return;
    menu.hidePopover();
    ({ rename, export: download, delete: remove })[action](menuFor);
  });
  menu.addEventListener("keydown", (event) => {
    const items = [...menu.children];
    const step = { ArrowDown: 1, ArrowUp: -1 }[event.key];
    if (!step) return;
    event.preventDefault();
    items[(items.indexOf(document.activeElement) + step + items.length) % items.length].focus();
  });
  $("#open-sidebar").addEventListener("click", () => slide(true));
  $("#close-sidebar").addEventListener("click", () => slide(false));
  $("#scrim").addEventListener("click", () => slide(false));
  $("#sidebar").addEventListener("keydown", (event) => { if (event.key === "Escape") slide(false); });
}

export function slide(inside) {
  const narrow = matchMedia("(max-width: 760px)").matches;
  document.body.classList.toggle("sidebar-open", inside && narrow);
  $("#open-sidebar").setAttribute("aria-expanded", String(inside && narrow));
  if (!narrow) return;
  $("main").inert = inside;
  if (inside) $("#close-sidebar").focus();
  else if ($("#sidebar").contains(document.activeElement)) $("#open-sidebar").focus();
}

/** A conversation as it is in memory, where it is shown or written: that may be ahead of what is kept. */
function inMemory(kept) {
  if (kept.id === state.conversation?.id) return state.conversation;
  return state.running.get(kept.id)?.conversation ?? kept;
}

export function showConversations() {
  const conversations = loadConversations().map(inMemory);
  const list = $("#conversations");
  const focused = list.contains(document.activeElement) ? document.activeElement.closest("li").dataset.id : null;
  list.replaceChildren(...conversations.map(item));
  if (focused) list.querySelector(`[data-id="${CSS.escape(focused)}"] button`)?.focus();
  $("#no-conversations").hidden = conversations.length > 0;
}

function item(conversation) {
  const current = conversation.id === state.conversation?.id;
  const title = conversation.title || "Untitled";
  const choose = h("button", {
    type: "button", class: "choose", title, "aria-current": current ? "true" : null,
    onclick: () => { slide(false); if (!current) open(conversation); },
  }, title);
  const more = iconButton("more", `More for ${title}`, () => showMenu(more, conversation));
  more.setAttribute("aria-haspopup", "menu");
  const row = h("li", { "data-id": conversation.id }, choose, more);
  row.classList.toggle("current", current);
  row.classList.toggle("running", isRunning(conversation));
  return row;
}

function showMenu(button, conversation) {
  menuFor = conversation;
  const menu = $("#item-menu");
  menu.showPopover({ source: button });
  const box = button.getBoundingClientRect();
  menu.style.top = `${Math.min(box.bottom + 4, innerHeight - menu.offsetHeight - 8)}px`;
  menu.style.left = `${Math.min(box.left, innerWidth - menu.offsetWidth - 8)}px`;
  menu.firstElementChild.focus();
}

function rename(conversation) {
  const row = $("#conversations").querySelector(`[data-id="${CSS.escape(conversation.id)}"]`);
  const field = h("input", { "aria-label": "Name of the conversation", maxlength: 120 });
  field.value = conversation.title;
  let ended = false;
  const end = (save) => {
    if (ended) return;
    ended = true;
    if (save && field.value.trim()) {
      Object.assign(conversation, { title: field.value.trim(), renamed: true });
      saveConversation(conversation);
      if (conversation.id === state.conversation?.id) $("#title").textContent = conversation.title;
    }
    showConversations();
    $("#conversations").querySelector(`[data-id="${CSS.escape(conversation.id)}"] button`)?.focus();
  };
  field.addEventListener("keydown", (event) => {
    if (event.key === "Enter") end(true);
    if (event.key === "Escape") { event.stopPropagation(); end(false); }
  });
  field.addEventListener("blur", () => end(true));
  row.replaceChildren(field);
  field.select();
}

function download(conversation) {
  const url = URL.createObjectURL(new Blob([exportConversation(conversation)], { type: "application/json" }));
  const name = (conversation.title || "conversation").replace(/[^\p{L}\p{N}]+/gu, "-").replace(/^-|-$/g, "").toLowerCase();
  h("a", { href: url, download: `${name || "conversation"}.json` }).click();
  setTimeout(() => URL.revokeObjectURL(url), 10_000);
}

function remove(conversation) {
  deleteConversation(conversation);
  stop(conversation);
  if (conversation === state.conversation) open(null);
  else showConversations();
  toast("Deleted.", "Undo", () => { restoreConversation(conversation); open(conversation); });
}
