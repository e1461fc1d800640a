// Markdown as models write it: blocks here, what stands within a line in inline.js. It builds elements and sets text;
// no HTML is ever parsed, so whatever a model or a user writes stays text.
//
// Blocks: headings, paragraphs, fenced code, lists (nested, numbered, tasks), quotes, tables, rules. A line break within
// a paragraph is kept, as poems need. Indented code is not taken as such: models indent for other reasons.

import { copyButton, h } from "./dom.js";
import { inline } from "./inline.js";

const FENCE = /^( {0,3})(`{3,}|~{3,})\s*([^`]*)$/;
const HEADING = /^ {0,3}(#{1,6})[ \t]+(.*?)[ \t]*#*$/;
const RULE = /^ {0,3}([-*_])[ \t]*(?:\1[ \t]*){2,}$/;
const QUOTE = /^ {0,3}> ?/;
const ITEM = /^( *)([-*+]|\d{1,9}[.)])(?:[ \t]+(.*)|)$/;
const TABLE_RULE = /^ {0,3}\|?[ \t]*:?-+:?[ \t]*(\|[ \t]*:?-+:?[ \t]*)*\|?[ \t]*$/;
const DEEPEST = 12; // quotes and lists within each other; beyond it they are text

/** Show `text` in `container`. What the first blocks show is kept while only the end of the text grows. */
export function renderMarkdown(container, text) {
  const blocks = parse(text.replace(/\r\n?/g, "\n").split("\n"), 0);
  const shown = container.children;
  blocks.forEach((block, index) => {
    const source = JSON.stringify(block);
    if (shown[index]?.source === source) return;
    const element = build(block);
    element.source = source;
    if (shown[index]) shown[index].replaceWith(element);
    else container.append(element);
  });
  while (shown.length > blocks.length) container.lastElementChild.remove();
}

// ---- lines to blocks

function parse(lines, depth) {
  const blocks = [];
  let at = 0;
  while (at < lines.length) {
    const line = lines[at];
    const taken =
      fence(lines, at, blocks) || heading(line, blocks) || rule(line, blocks) || quote(lines, at, blocks, depth) ||
      list(lines, at, blocks, depth) || table(lines, at, blocks) || paragraph(lines, at, blocks, depth);
    at += taken;
  }
  return blocks;
}

// Each of these adds the block that begins at a line and gives the number of lines it takes, 0 if there is none.

function fence(lines, at, blocks) {
  const open = FENCE.exec(lines[at]);
  if (!open) return 0;
  const [, indent, mark, info] = open;
  const code = [];
  let next = at + 1;
  for (; next < lines.length; next++) {
    const line = lines[next].trim();
    if (line.length >= mark.length && line === mark[0].repeat(line.length)) break;
    code.push(lines[next].startsWith(indent) ? lines[next].slice(indent.length) : lines[next]);
  }
  blocks.push({ type: "code", language: info.trim().split(/\s/)[0], text: code.join("\n") });
  return next + 1 - at;
}

function heading(line, blocks) {
  const match = HEADING.exec(line);
  if (match) blocks.push({ type: "heading", level: match[1].length, text: match[2] });
  return match ? 1 : 0;
}

function rule(line, blocks) {
  if (!RULE.test(line)) return 0;
  blocks.push({ type: "rule" });
  return 1;
}

function quote(lines, at, blocks, depth) {
  if (depth >= DEEPEST) return 0;
  let next = at;
  while (next < lines.length && QUOTE.test(lines[next])) next++;
  if (next > at) {
    const inner = lines.slice(at, next).map((line) => line.replace(QUOTE, ""));
    blocks.push({ type: "quote", blocks: parse(inner, depth + 1) });
  }
  return next - at;
}

function list(lines, at, blocks, depth) {
  const first = ITEM.exec(lines[at]);
  if (!first || depth >= DEEPEST) return 0;
  const indent = first[1].length;
  const kind = (marker) => (/\d/.test(marker) ? "ordered" : marker);
  const items = [];
  let loose = false;
  let next = at;
  const itemAt = (index) => {
    const item = ITEM.exec(lines[index] ?? "");
    const fits = item && item[1].length >= indent && item[1].length <= indent + 3 && kind(item[2]) === kind(first[2]);
    return fits && !RULE.test(lines[index]) ? item : null;
  };
  for (;;) {
    const item = itemAt(next);
    if (!item) break;
    // What belongs to the item is indented; a line right below it that begins nothing new does too.
    const content = [item[3] ?? ""];
    const inside = item[1].length + 2;
    let blank = false;
    for (next++; next < lines.length; next++) {
      const line = lines[next];
      const deep = /^ */.exec(line)[0].length;
      if (!line.trim()) blank = true;
      else if (deep >= inside) {
        if (blank) loose ||= !ITEM.test(line);
        blank = false;
      } else if (blank || itemAt(next) || begins(lines, next)) break;
      content.push(line.slice(Math.min(deep, item[1].length + item[2].length + 1)));
    }
    while (content.length > 1 && !content.at(-1).trim()) content.pop();
    if (blank && itemAt(next)) loose = true;
    const task = /^\[([ xX])\] +/.exec(content[0]);
    if (task) content[0] = content[0].slice(task[0].length);
    items.push({ task: task && task[1] !== " " ? "done" : task ? "open" : null, blocks: parse(content, depth + 1) });
  }
  if (!items.length) return 0;
  const ordered = /\d/.test(first[2]);
  blocks.push({ type: "list", ordered, start: ordered ? parseInt(first[2], 10) : 1, loose, items });
  return next - at;
}

function table(lines, at, blocks) {
  if (!lines[at].includes("|") || !TABLE_RULE.test(lines[at + 1] ?? "")) return 0;
  const head = cells(lines[at]);
  const rules = cells(lines[at + 1]);
  if (head.length !== rules.length) return 0;
  const align = rules.map((cell) => (cell.endsWith(":") ? (cell.startsWith(":") ? "center" : "right") : "left"));
  const rows = [];
  let next = at + 2;
  for (; next < lines.length && lines[next].includes("|") && lines[next].trim(); next++) {
    const row = cells(lines[next]);
    rows.push(head.map((_, column) => row[column] ?? ""));
  }
  blocks.push({ type: "table", head, align, rows });
  return next - at;
}

function cells(line) {
  const inner = line.trim().replace(/^\|/, "").replace(/(^|[^\\])\|$/, "$1");
  return inner.split(/(?<!\\)\|/).map((cell) => cell.trim().replaceAll("\\|", "|"));
}

function paragraph(lines, at, blocks) {
  let next = at;
  const text = [];
  while (next < lines.length && lines[next].trim() && (next === at || !begins(lines, next))) text.push(lines[next++].trim());
  if (text.length) blocks.push({ type: "paragraph", text: text.join("\n") });
  return Math.max(next - at, 1);
}

/** Does another block begin at this line, in the middle of a paragraph? */
function begins(lines, at) {
  const line = lines[at];
  const item = ITEM.exec(line);
  return FENCE.test(line) || HEADING.test(line) || RULE.test(line) || QUOTE.test(line) ||
    Boolean(item?.[3] && (!/\d/.test(item[2]) || parseInt(item[2], 10) === 1 || ITEM.test(lines[at - 1])));
}

// ---- blocks to elements

function build(block) {
  switch (block.type) {
    case "code": return codeBlock(block);
    case "heading": return h(`h${Math.min(block.level + 2, 6)}`, {}, ...inline(block.text));
    case "rule": return h("hr");
    case "quote": return h("blockquote", {}, ...block.blocks.map(build));
    case "list": return listElement(block);
    case "table": return tableElement(block);
    default: return h("p", {}, ...inline(block.text));
  }
}

function codeBlock({ language, text }) {
  return h("figure", { class: "code" },
    h("figcaption", {}, h("span", {}, language), copyButton(() => text, "Copy code")),
    h("pre", { tabindex: "0" }, h("code", {}, text)));
}

function listElement({ ordered, start, loose, items }) {
  const properties = ordered && start !== 1 ? { start } : {};
  return h(ordered ? "ol" : "ul", properties, ...items.map(({ task, blocks }) => {
    const content = blocks.flatMap((block) => (block.type === "paragraph" && !loose ? inline(block.text) : [build(block)]));
    if (!task) return h("li", {}, ...content);
    const box = h("input", { type: "checkbox", disabled: true, checked: task === "done", "aria-label": task });
    return h("li", { class: "task" }, box, " ", ...content);
  }));
}

function tableElement({ head, align, rows }) {
  const row = (tag, values) => h("tr", {}, ...values.map((value, i) => h(tag, { class: align[i] }, ...inline(value))));
  return h("div", { class: "table", tabindex: "0" },
    h("table", {}, h("thead", {}, row("th", head)), h("tbody", {}, ...rows.map((values) => row("td", values)))));
}
