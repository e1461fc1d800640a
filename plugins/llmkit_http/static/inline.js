// Markdown within a line: code, bold, italic, struck out, links. It gives nodes; see markdown.js.

import { h } from "./dom.js";

// In order of precedence: what is matched first is not looked into for what follows, but for its own content. The
// limits keep a long text with many openings and no closing from being searched to its end for each.
const CODE = /(`+)(?!`)([\s\S]*?[^`])\1(?!`)/y;
const ESCAPE = /\\([!-/:-@[-`{-~])/y;
const LINK = /!?\[((?:[^\[\]\\]|\\.|\[[^\[\]]*\])*)\]\(\s*<?((?:[^\s()<>\\]|\\.|\([^\s()]*\))*)>?(?:\s+["'(][^"')]*["')])?\s*\)/y;
const AUTOLINK = /<?(https?:\/\/[^\s<>"']+)>?/y;
const BOTH = /([*_])\1\1(?=[^\s*_])([\s\S]{0,1000}?\S)\1\1\1(?!\1)/y;
const STRONG = /([*_])\1(?=\S)([\s\S]{0,1000}?\S)\1\1(?!\1)/y;
const EMPHASIS = /([*_])(?=[^\s*_])((?:(?!\1)[\s\S]|\1\1(?:(?!\1)[\s\S])+\1\1)*?[^\s])\1(?!\1)/y;
const STRUCK = /~~(?=\S)([\s\S]{0,1000}?\S)~~/y;
const PLAIN = /[^\\`*_~!\[<h\n]+|[\s\S]/y; // up to what may begin something
const WORD = /[\p{L}\p{N}]/u;
const DEEPEST = 6;

export function inline(text, depth = 0) {
  const nodes = [];
  let plain = "";
  let at = 0;
  const flush = () => { if (plain) nodes.push(plain); plain = ""; };
  const match = (pattern) => { pattern.lastIndex = at; return pattern.exec(text); };
  const inner = (content) => (depth < DEEPEST ? inline(content, depth + 1) : [content]);
  // An underscore within a word is only that: snake_case
  const afterWord = () => at > 0 && WORD.test(text[at - 1]);
  const apart = (found) => found && (found[1] !== "_" || !(afterWord() || WORD.test(text[at + found[0].length] ?? "")));
  while (at < text.length) {
    let found;
    let node = null;
    if (text[at] === "\n") {
      found = ["\n"];
      node = h("br");
    } else if ((found = match(ESCAPE))) {
      plain += found[1];
      at += found[0].length;
      continue;
    } else if ((found = match(CODE))) node = h("code", {}, found[2].replace(/^ ([\s\S]*[^ ][\s\S]*) $/, "$1"));
    else if ((found = match(LINK))) node = link(found[2].replace(/\\(.)/g, "$1"), inner(found[1]));
    else if (!afterWord() && (found = match(AUTOLINK))) {
      const [, url] = found;
      const tail = found[0].startsWith("<") ? "" : /[.,:;!?*_~)\]]*$/.exec(url)[0];
      const address = tail.startsWith(")") && url.includes("(") ? url : url.slice(0, url.length - tail.length);
      found = [found[0].startsWith("<") ? found[0] : address];
      node = link(address, [address]);
    } else if (apart((found = match(BOTH)))) node = h("em", {}, h("strong", {}, ...inner(found[2])));
    else if (apart((found = match(STRONG)))) node = h("strong", {}, ...inner(found[2]));
    else if (apart((found = match(EMPHASIS)))) node = h("em", {}, ...inner(found[2]));
    else if ((found = match(STRUCK))) node = h("del", {}, ...inner(found[1]));
    if (!node) {
      found = match(PLAIN);
      plain += found[0];
    } else {
      flush();
      nodes.push(node);
    }
    at += found[0].length;
  }
  flush();
  return nodes;
}

/** A link out of the page; of other schemes than these only the text is left. Images are links too: none is loaded. */
function link(address, content) {
  let url;
  try {
    url = new URL(address);
  } catch {
    url = null; // relative addresses mean nothing here
  }
  if (!url || !["http:", "https:", "mailto:"].includes(url.protocol)) return h("span", {}, ...content);
  return h("a", { href: url.href, target: "_blank", rel: "noopener noreferrer nofollow" }, ...content);
}
