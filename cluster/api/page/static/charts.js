// Small charts: a figure over the last minutes.

import { h, replace, s, say } from "./dom.js";

const WIDTH = 240, HEIGHT = 44, SPAN = 300; // of the drawing; seconds that it shows

// A tile with a figure and its course. `words(value)` says it.
export function tile(label, words, unit) {
  const value = h("span", { class: "number" }, "–");
  const note = h("span", { class: "note" });
  const area = s("path", { class: "area" });
  const line = s("path", { class: "line" });
  const svg = s("svg", { class: "spark", viewBox: `0 0 ${WIDTH} ${HEIGHT}`, preserveAspectRatio: "none", "aria-hidden": "true" }, area, line);
  const node = h("section", { class: "tile" }, h("h2", {}, label), h("p", { class: "value" }, value, unit && h("span", { class: "unit" }, unit)), note, svg);
  // `points`: [seconds since the epoch, value], oldest first.
  node.show = (now, points, most, remark = "") => {
    say(value, words(now));
    say(note, remark);
    const end = points.at(-1)?.[0] ?? 0;
    const top = Math.max(most ?? 0, ...points.map(([, one]) => one), 1e-9);
    const at = points.filter(([time]) => time > end - SPAN).map(([time, one]) => [WIDTH - ((end - time) / SPAN) * WIDTH, HEIGHT - 2 - (one / top) * (HEIGHT - 6)]);
    const path = at.map(([x, y], i) => `${i ? "L" : "M"}${x.toFixed(1)} ${y.toFixed(1)}`).join("");
    line.setAttribute("d", path);
    area.setAttribute("d", path && `${path}L${WIDTH} ${HEIGHT}L${at[0][0].toFixed(1)} ${HEIGHT}Z`);
  };
  return node;
}

export function meter(part, label) {
  const bar = h("span", { class: "meter-bar", style: { "--part": String(Math.min(1, Math.max(0, part || 0))) } });
  return h("span", { class: "meter", role: "img", "aria-label": label }, bar);
}

// One bar of several parts: [[kind, seconds, words]].
export function parts(list, whole, label) {
  const node = h("div", { class: "parts", role: "img", "aria-label": label });
  replace(node, list.filter(([, value]) => value > 0).map(([kind, value, words]) =>
    h("span", { class: `part ${kind}`, title: words, style: { "--part": `${((value / whole) * 100).toFixed(2)}%` } })));
  return node;
}
