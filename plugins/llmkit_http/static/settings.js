// The dialogs: sampling and the API key; and the theme.

import { getKey, setKey } from "./api.js";
import { $, setIcon } from "./dom.js";
import { state } from "./state.js";
import { DEFAULTS, saveSettings } from "./store.js";

const THEMES = { auto: "System theme", light: "Light theme", dark: "Dark theme" };

export function setUpSettings(onkey) {
  const dialog = $("#settings");
  const form = dialog.querySelector("form");
  const fields = [...form.querySelectorAll("input")];
  const fill = () => {
    for (const field of fields) field.value = field.name === "api_key" ? getKey() : state.settings[field.name] ?? "";
  };
  $("#open-settings").addEventListener("click", () => { fill(); dialog.showModal(); });
  $("#reset-settings").addEventListener("click", () => {
    state.settings = DEFAULTS;
    saveSettings(state.settings);
    fill();
  });
  form.addEventListener("input", ({ target }) => {
    if (target.name === "api_key" || !target.validity.valid) return;
    const { [target.name]: _, ...others } = state.settings;
    const value = target.type === "number" ? target.valueAsNumber : target.value;
    state.settings = target.value === "" ? others : { ...others, [target.name]: value };
    saveSettings(state.settings);
  });
  dialog.addEventListener("close", () => {
    const key = form.elements.api_key.value.trim();
    if (key === getKey()) return;
    setKey(key);
    onkey();
  });
  closeOutside(dialog);

  const asking = $("#key");
  asking.addEventListener("close", () => {
    if (!$("#key-input").value.trim()) return;
    setKey($("#key-input").value.trim());
    onkey();
  });
  setUpTheme();
}

/** Ask for an API key, with what the server said of the one it got. */
export function askKey(reason) {
  $("#key-error").textContent = getKey() ? reason : "";
  $("#key-input").value = "";
  if (!$("#key").open) $("#key").showModal();
}

function closeOutside(dialog) {
  dialog.addEventListener("mousedown", (event) => { if (event.target === dialog) dialog.close(); });
}

function setUpTheme() {
  const button = $("#theme");
  const root = document.documentElement;
  const show = () => {
    setIcon(button, root.dataset.theme);
    button.querySelector("span").textContent = THEMES[root.dataset.theme];
  };
  button.addEventListener("click", () => {
    const names = Object.keys(THEMES);
    root.dataset.theme = names[(names.indexOf(root.dataset.theme) + 1) % names.length];
    localStorage.setItem("llmkit.theme", root.dataset.theme);
    show();
  });
  if (!(root.dataset.theme in THEMES)) root.dataset.theme = "auto";
  show();
}
