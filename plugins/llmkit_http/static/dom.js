// Small helpers to build elements. Text is only ever set as text: nothing here parses HTML.

export const $ = (selector) => document.querySelector(selector);

/** An element with properties (`class`, `on…` listeners, attributes) and children (nodes or strings). */
export function h(tag, properties = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (value === undefined || value === null || value === false) continue;
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else element.setAttribute(name, value === true ? "" : value);
  }
  element.append(...children);
  return element;
}

const SVG = "http://www.w3.org/2000/svg";

export function icon(name) {
  const svg = document.createElementNS(SVG, "svg");
  svg.setAttribute("aria-hidden", "true");
  const use = document.createElementNS(SVG, "use");
  use.setAttribute("href", `#i-${name}`);
  svg.append(use);
  return svg;
}

export function setIcon(button, name) {
  button.querySelector("use").setAttribute("href", `#i-${name}`);
}

/** A button with an icon alone, or with `text` beside it. */
export function iconButton(name, label, onclick, text = "") {
  const properties = { type: "button", class: text ? "quiet" : "icon-button", onclick };
  if (!text) Object.assign(properties, { "aria-label": label, title: label });
  return h("button", properties, icon(name), ...(text ? [h("span", {}, text)] : []));
}

/** A button that copies what `text()` gives, and shows for a moment that it did. */
export function copyButton(text, label = "Copy") {
  const button = iconButton("copy", label, async () => {
    const copied = await copy(text());
    setIcon(button, copied ? "check" : "close");
    announce(copied ? "Copied" : "The browser does not allow copying");
    setTimeout(() => setIcon(button, "copy"), 1500);
  });
  return button;
}

async function copy(text) {
  try {
    await navigator.clipboard.writeText(text);
    return true;
  } catch {
    // The clipboard needs https or localhost; a page from another machine over http has the old way only.
    const area = h("textarea", { class: "unseen" });
    area.value = text;
    document.body.append(area);
    area.select();
    const copied = document.execCommand("copy");
    area.remove();
    return copied;
  }
}

/** Say something to those who listen to the page. */
export function announce(text) {
  $("#announce").textContent = text;
}

let toastTimer;

/** A line at the lower edge for a few seconds, with one action at most. */
export function toast(text, action, onaction) {
  const box = $("#toast");
  box.replaceChildren(text);
  if (action) box.append(h("button", { type: "button", onclick: () => { box.hidden = true; onaction(); } }, action));
  box.hidden = false;
  clearTimeout(toastTimer);
  toastTimer = setTimeout(() => { box.hidden = true; }, 7000);
}
