// Markdown as DOM nodes. There is no HTML in it: what looks like markup is text. Links ask before they open, and
// images are links. Time is linear in the text's length, whatever the text is.

import { askedLink, button, copyText, h } from "./dom.js";

const DEEPEST = 8; // quotes and lists within each other
const FENCE = /^ {0,3}(`{3,}|~{3,})\s*([^`\n]*)$/;
const ITEM = /^( {0,12})([-*+]|\d{1,9}[.)])(?: +|$)/;
const RULE = /^ {0,3}([-*_])(?: *\1){2,} *$/;
const HEADING = /^ {0,3}(#{1,6}) +(.*)$/;
const DIVIDER = /^ *\|?(?: *:?-+:? *\|)+ *(?::?-+:? *)?$/;
const PUNCTUATION = /[!-/:-@[-`{-~]/;

// --- blocks --------------------------------------------------------------------------------------

// Cuts a text into its outermost blocks, as source: a block that is complete does not change when text is added.
export function blocks(text) {
  const lines = text.replace(/\r\n?/g, "\n").split("\n");
  const out = [];
  for (let i = 0; i < lines.length; ) {
    const begin = i;
    if (!lines[i].trim()) {
      i++;
      continue;
    }
    i = blockEnd(lines, i);
    out.push(lines.slice(begin, i).join("\n"));
  }
  return out;
}

function blockEnd(lines, i) {
  const fence = FENCE.exec(lines[i]);
  if (fence) {
    for (let j = i + 1; j < lines.length; j++) {
      const close = FENCE.exec(lines[j]);
      if (close && close[1][0] === fence[1][0] && close[1].length >= fence[1].length && !close[2]) return j + 1;
    }
    return lines.length;
  }
  if (HEADING.test(lines[i]) || RULE.test(lines[i])) return i + 1;
  if (/^ {0,3}>/.test(lines[i])) return while_(lines, i, (line) => line.trim() && !FENCE.test(line));
  if (ITEM.test(lines[i])) return listEnd(lines, i);
  if (isTable(lines, i)) return while_(lines, i, (line) => line.includes("|"));
  return while_(lines, i, (line, at) => line.trim() && (at === i || !interrupts(lines, at)));
}

const interrupts = (lines, i) =>
  FENCE.test(lines[i]) || HEADING.test(lines[i]) || RULE.test(lines[i]) || /^ {0,3}>/.test(lines[i]) ||
  /^ {0,3}([-*+]|1[.)]) +\S/.test(lines[i]) || isTable(lines, i);

const isTable = (lines, i) => lines[i].includes("|") && i + 1 < lines.length && DIVIDER.test(lines[i + 1]);

function while_(lines, i, holds) {
  while (i < lines.length && holds(lines[i], i)) i++;
  return i;
}

function listEnd(lines, i) {
  const ordered = (line) => /\d/.test(ITEM.exec(line)[2]);
  const first = ordered(lines[i]);
  let fence = null;
  for (; i < lines.length; i++) {
    const found = FENCE.exec(lines[i].trimStart());
    if (found && (!fence || found[1].startsWith(fence))) fence = fence ? null : found[1];
    if (fence || lines[i].trim() || !lines[i + 1]) continue;
    const isItem = ITEM.test(lines[i + 1]) && ordered(lines[i + 1]) === first;
    if (!isItem && !/^ {2,}/.test(lines[i + 1])) return i;
  }
  return i;
}

function block(source, depth) {
  const lines = source.split("\n");
  const fence = FENCE.exec(lines[0]);
  if (fence) {
    const close = lines.length > 1 ? FENCE.exec(lines.at(-1)) : null;
    const closed = close && close[1][0] === fence[1][0] && close[1].length >= fence[1].length && !close[2];
    return codeBlock(lines.slice(1, closed ? -1 : undefined).join("\n"), fence[2].trim());
  }
  const heading = HEADING.exec(lines[0]);
  if (heading) return h(`h${Math.min(6, heading[1].length + 2)}`, {}, inline(heading[2].replace(/ +#+ *$/, "")));
  if (RULE.test(lines[0])) return h("hr");
  if (/^ {0,3}>/.test(lines[0]) && depth < DEEPEST) {
    return h("blockquote", {}, nested(lines.map((line) => line.replace(/^ {0,3}> ?/, "")).join("\n"), depth));
  }
  if (ITEM.test(lines[0]) && depth < DEEPEST) return list(lines, depth);
  if (isTable(lines, 0)) return table(lines);
  return h("p", {}, inline(lines.map((line) => line.trim()).join("\n")));
}

const nested = (text, depth) => blocks(text).map((one) => block(one, depth + 1));

export function codeBlock(text, language) {
  const copy = button("Copy", { class: "quiet", onclick: () => copyText(text, copy) }, "copy");
  const head = h("figcaption", {}, h("span", {}, language.slice(0, 40) || "text"), copy);
  const label = `Code${language ? `, ${language.slice(0, 40)}` : ""}`;
  return h("figure", { class: "code" }, head, h("pre", { tabindex: "0", role: "region", "aria-label": label }, h("code", {}, text)));
}

function list(lines, depth) {
  const first = ITEM.exec(lines[0]);
  const ordered = /\d/.test(first[2]);
  const items = [];
  let loose = false;
  for (const line of lines) {
    const item = ITEM.exec(line);
    if (item && item[1].length < first[1].length + 2) {
      items.push({ width: item[0].length, lines: [line.slice(item[0].length)] });
    } else {
      const { width, lines: own } = items.at(-1);
      loose ||= !line.trim();
      own.push(line.slice(Math.min(width, line.length - line.trimStart().length)));
    }
  }
  const nodes = items.map(({ lines: own }) => {
    const task = /^\[([ xX])\] +/.exec(own[0]);
    if (task) own[0] = own[0].slice(task[0].length);
    const parts = nested(own.join("\n"), depth);
    const inner = !loose && parts[0]?.tagName === "P" ? [...parts[0].childNodes, ...parts.slice(1)] : parts;
    return h("li", {}, task && h("span", { class: "task" }, task[1] === " " ? "☐ " : "☑ "), inner);
  });
  return ordered ? h("ol", { start: Number.parseInt(first[2], 10) }, nodes) : h("ul", {}, nodes);
}

function table(lines) {
  const cells = (line) => line.trim().replace(/^\|/, "").replace(/\|$/, "").split("|").slice(0, 50);
  const align = cells(lines[1]).map((cell) => {
    const [left, right] = [cell.trim().startsWith(":"), cell.trim().endsWith(":")];
    return right ? (left ? "centre" : "right") : "left";
  });
  const row = (line, tag) =>
    h("tr", {}, cells(line).map((cell, i) => h(tag, { class: align[i] ?? "left" }, inline(cell.trim()))));
  const body = lines.slice(2).map((line) => row(line, "td"));
  return h("div", { class: "wide", tabindex: "0", role: "region", "aria-label": "Table" },
    h("table", {}, h("thead", {}, row(lines[0], "th")), h("tbody", {}, body)));
}

// --- within a block ------------------------------------------------------------------------------

export function safeUrl(text) {
  try {
    const url = new URL(text.trim());
    return ["http:", "https:", "mailto:"].includes(url.protocol) ? url.href : null;
  } catch {
    return null; // not absolute: there is nothing that it could be relative to
  }
}

const PAIRS = [["**", "strong"], ["__", "strong"], ["~~", "s"], ["*", "em"], ["_", "em"]];

function inline(text, depth = 0, absent = new Set()) {
  const out = [];
  let plain = "";
  const flush = () => {
    if (plain) out.push(plain);
    plain = "";
  };
  // Where a mark stands next; one that is found to be absent is not looked for again.
  const next = (mark, from) => {
    if (absent.has(mark)) return -1;
    const at = text.indexOf(mark, from);
    if (at < 0) absent.add(mark);
    return at;
  };
  for (let i = 0; i < text.length; ) {
    const found = piece(text, i, depth, next);
    if (found) {
      flush();
      out.push(found.node);
      i = found.end;
    } else if (text[i] === "\\" && PUNCTUATION.test(text[i + 1] ?? "")) {
      plain += text[i + 1];
      i += 2;
    } else {
      const word = /[\p{L}\p{N}\s,;.?'"()-]+/uy;
      word.lastIndex = i;
      const run = text.startsWith("http", i) ? null : word.exec(text);
      const link = run ? run[0].search(/\bhttps?$/) : -1;
      const piece = run ? (link > 0 ? run[0].slice(0, link) : run[0]) : text[i];
      plain += piece;
      i += piece.length;
    }
  }
  flush();
  return out.flatMap((part) => (typeof part === "string" ? lines(part) : [part]));
}

const lines = (text) => text.split("\n").flatMap((line, i) => (i ? [h("br"), line] : [line]));

// What begins at i, where it is more than text: {node, end}.
function piece(text, i, depth, next) {
  const char = text[i];
  if (char === "`") return code(text, i, next);
  if (depth > DEEPEST) return null;
  if (char === "[" || (char === "!" && text[i + 1] === "[")) return bracketed(text, i, depth, next);
  if (char === "h" && /^https?:\/\//.test(text.slice(i, i + 8)) && !/\w/.test(text[i - 1] ?? "")) return bare(text, i);
  for (const [mark, tag] of PAIRS) {
    if (!text.startsWith(mark, i)) continue;
    const begin = i + mark.length;
    if (/\s/.test(text[begin] ?? " ") || text[begin] === mark[0]) return null;
    if (mark[0] === "_" && /\w/.test(text[i - 1] ?? "")) return null;
    for (let end = next(mark, begin + 1), tries = 0; end > 0 && tries < 8; end = next(mark, end + 1), tries++) {
      const within = mark.length === 1 && (text[end + 1] === mark || text[end - 1] === mark);
      const inWord = mark[0] === "_" && /\w/.test(text[end + mark.length] ?? "");
      if (/\s/.test(text[end - 1]) || within || inWord) continue;
      return { node: h(tag, {}, inline(text.slice(begin, end), depth + 1)), end: end + mark.length };
    }
    return null;
  }
  return null;
}

function code(text, i, next) {
  let begin = i;
  while (text[begin] === "`") begin++;
  const mark = text.slice(i, begin);
  const end = mark.length < 9 ? next(mark, begin) : -1;
  if (end < 0 || text[end + mark.length] === "`") return { node: mark, end: begin };
  const inner = text.slice(begin, end).replace(/\n/g, " ");
  return { node: h("code", {}, /^ .*[^ ].* $/.test(inner) ? inner.slice(1, -1) : inner), end: end + mark.length };
}

const LONGEST_LINK = 2000;

function bracketed(text, i, depth, next) {
  const begin = text[i] === "!" ? i + 2 : i + 1;
  const middle = next("](", begin);
  if (middle < 0 || middle - begin > LONGEST_LINK) return null;
  const end = next(")", middle);
  if (end < 0 || end - middle > LONGEST_LINK) return null;
  const said = text.slice(begin, middle);
  const url = safeUrl(text.slice(middle + 2, end).trim().split(/\s/)[0].replace(/^<|>$/g, ""));
  if (url === null) return null;
  const words = text[i] === "!" ? [`Image: ${said || url}`] : inline(said, DEEPEST + 1);
  return { node: askedLink(url, words), end: end + 1 };
}

function bare(text, i) {
  const found = /^[^\s<>"`]+/.exec(text.slice(i, i + LONGEST_LINK))[0].replace(/[.,;:!?'*_~)\]]+$/, "");
  const url = safeUrl(found);
  return url === null ? null : { node: askedLink(url, found), end: i + found.length };
}

// --- growing texts -------------------------------------------------------------------------------

// Shows a text in a node. Where the node shows an earlier part of it, blocks that have not changed stay.
export function show(node, text) {
  const now = blocks(text);
  const before = node.shownBlocks ?? [];
  let same = 0;
  while (same < now.length && now[same] === before[same]) same++;
  while (node.childNodes.length > same) node.lastChild.remove();
  for (const source of now.slice(same)) node.append(block(source, 0));
  node.shownBlocks = now;
}
