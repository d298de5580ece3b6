// Requests that run, and those that ended lately: where each one's time went. What was said in them is not known here.

import { requestBook } from "./book.js";
import { parts } from "./charts.js";
import { dialog, h, replace, say, segmented } from "./dom.js";
import { ago, clock, figure, seconds } from "./numbers.js";

const KINDS = [["prepare", "Preparing"], ["queue", "Queue"], ["prefill", "Prefill"], ["decode", "Decode"]];

const breakdown = (one) => KINDS.map(([kind, words]) => [kind, one[kind] ?? 0, `${words} ${seconds(one[kind])}`]);
const trouble = (one) => one.error || (one.status >= 400 ? String(one.status) : "");
const outcome = (one) => trouble(one) || (one.state === "ended" ? (one.finish_reasons ?? []).join(", ") || "ended" : one.state);
const incidents = (one) => [["moved", "moved"], ["resumed", "resumed"], ["preempted", "preempted"]].filter(([name]) => one[name]).map(([name, words]) => `${words} ${one[name]} ×`);

export function requestsView() {
  let which = "all";
  const body = h("tbody", {}), none = h("p", { class: "nothing" }), remark = h("p", { class: "remark" });
  const legend = h("ul", { class: "kinds", "aria-label": "Colours" }, KINDS.map(([kind, words]) => h("li", {}, h("span", { class: `part ${kind}` }), words)));
  const filter = segmented("Which requests", [["all", "All"], ["running", "Running"], ["trouble", "With errors"]], which, (name) => ((which = name), draw()));
  const head = ["Request", "Key", "Began", "Outcome", "Prompt", "Output", "First token", "Total", "Where its time went"];
  const table = h("div", { class: "wide", tabindex: "0", role: "region", "aria-label": "Requests" }, h("table", { class: "requests" }, h("thead", {}, h("tr", {}, head.map((words, i) => h("th", { scope: "col", class: i > 3 && i < 8 ? "right" : "" }, words)))), body));
  const node = h("div", { class: "view" }, h("header", { class: "view-head" }, h("h1", {}, "Requests"), remark), h("div", { class: "panel" }, h("header", {}, filter, legend), none, table));

  function draw() {
    const all = requestBook.records();
    const shown = all.filter((one) => which === "all" || (which === "running" ? one.state !== "ended" : trouble(one)));
    const longest = Math.max(1e-6, ...shown.map((one) => one.seconds));
    say(remark, requestBook.trouble || `${requestBook.running.length} running, ${requestBook.recent.length} ended lately. What was asked and answered is not kept.`);
    say(none, requestBook.known ? "There is none." : "");
    none.hidden = shown.length > 0;
    table.hidden = !shown.length;
    replace(body, shown.map((one) => row(one, longest)));
  }

  function row(one, longest) {
    const bar = parts(breakdown(one), longest, breakdown(one).filter(([, value]) => value > 0).map(([, , words]) => words).join(", ") || "no time yet");
    const name = h("button", { type: "button", class: "link", onclick: () => details(one) }, one.id.slice(0, 12));
    return h("tr", { class: one.state === "ended" ? "" : "open" },
      h("td", {}, h("span", { class: "route" }, one.route), name), h("td", {}, one.key || "–"), h("td", { title: clock(one.started) }, ago(one.started)),
      h("td", {}, h("span", { class: `result ${trouble(one) ? "failed" : one.state}` }, outcome(one)), incidents(one).map((words) => h("span", { class: "incident" }, words))),
      h("td", { class: "right" }, figure(one.prompt_tokens), one.cached_tokens > 0 && h("span", { class: "note" }, `${figure(one.cached_tokens)} cached`)), h("td", { class: "right" }, figure(one.output_tokens)),
      h("td", { class: "right" }, seconds(one.first_token)), h("td", { class: "right" }, seconds(one.seconds)), h("td", { class: "bar" }, bar));
  }

  function details(one) {
    const facts = [["Id", one.id], ["Reply", one.reply], ["Route", one.route], ["Model", one.model], ["Key", one.key || "none"], ["Began", clock(one.started)], ["Outcome", outcome(one)], ["Status", one.status || "–"], ["Choices", one.choices],
      ["Prompt", `${figure(one.prompt_tokens)} tokens, ${figure(one.cached_tokens)} of them cached`], ["Output", `${figure(one.output_tokens)} tokens`],
      ...breakdown(one).map(([kind, value]) => [KINDS.find(([name]) => name === kind)[1], seconds(value)]),
      ["Waited for groups", seconds(one.group_wait)], ["Moved, resumed, preempted", [one.moved, one.resumed, one.preempted].map((count) => count ?? 0).join(", ")],
      ...(one.moves ?? []).map(([at, what]) => [what, `after ${seconds(at)}`]), ...(one.chunks ?? []).slice(0, 20).map(([at, count], i) => [`Prompt, part ${i + 1}`, `${count} tokens by ${seconds(at)}`])];
    dialog("Request", parts(breakdown(one), Math.max(1e-6, one.seconds), "Where its time went"), h("dl", { class: "facts" }, facts.filter(([, value]) => value !== undefined && value !== "").map(([words, value]) => h("div", {}, h("dt", {}, words), h("dd", {}, value)))));
  }

  let stop = () => {};
  return { node, title: "Requests", shown: () => (stop = requestBook.listen(draw)), hidden: () => stop() };
}
