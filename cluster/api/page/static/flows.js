// Shards, groups and the nodes that they are on, with what flows between them.

import { h, replace, s, say } from "./dom.js";
import { feed } from "./feed.js";
import { byName, bytes, figure, percent } from "./numbers.js";
import { meter } from "./charts.js";

const MOST_LINES = 400;

const short = (id) => (id ? id.slice(0, 8) : "");
const whole = (worker) => ["loaded", "serving"].includes(worker.state);

function words(worker, heat) {
  const load = worker.load ?? {};
  if (!whole(worker)) {
    const part = worker.state === "loading" && worker.progress !== undefined ? ` ${percent(worker.progress)}` : "";
    return [[`${worker.state}${part}`, worker.reason ?? ""]];
  }
  if (worker.role === "attention") {
    const kv = worker.kv_blocks ? worker.kv_blocks_used / worker.kv_blocks : 0;
    const drafts = worker.speculation, right = drafts?.accepted.reduce((sum, one) => sum + one, 0);
    return [[figure(load.tokens_per_second), "tokens/s"], [`${worker.running ?? 0} + ${worker.waiting ?? 0}`, "running, waiting"], [percent(kv), "of the KV cache", kv],
      ...(drafts ? [[drafts.drafted ? percent(right / drafts.drafted) : "–", `of drafts right (${drafts.kind})`], [figure(drafts.gain), "× the speed without drafts"]] : [])];
  }
  return [[figure(load.rows_per_second), "rows/s"], [figure(heat), "× the mean’s heat"], [percent(load.busy), "busy", load.busy ?? 0], [figure(worker.experts), `experts, ${bytes(worker.weight_bytes)}`]];
}

export function flowMap() {
  const shards = h("ul", { class: "workers" }), groups = h("ul", { class: "workers" });
  const lines = s("svg", { class: "flow-lines", "aria-hidden": "true" });
  const summary = h("p", { class: "unseen", "aria-live": "off" });
  const nodes = h("ul", { class: "nodes" });
  const shardHead = h("h3", {}), groupHead = h("h3", {});
  const field = h("div", { class: "flow" }, lines, h("div", {}, shardHead, shards), h("div", {}, groupHead, groups));
  const node = h("section", { class: "panel", "aria-labelledby": "flow-title" },
    h("header", {}, h("h2", { id: "flow-title" }, "Shards and groups"), h("p", { class: "remark" }, "Lines are rows of tokens on their way to experts and back.")), field, summary, nodes);
  const cards = new Map();

  function card(worker) {
    let one = cards.get(worker.id);
    if (!one) {
      const name = h("h4", {}, worker.id), where = h("span", { class: "where" }), figures = h("dl", {}), why = h("p", { class: "remark" });
      one = { node: h("li", { class: "worker" }, h("div", { class: "worker-head" }, name, where), figures, why), where, figures, why };
      cards.set(worker.id, one);
    }
    const state = whole(worker) ? "well" : worker.state === "dead" ? "lost" : "coming";
    one.node.className = `worker ${worker.role} ${state}`;
    say(one.where, [worker.host, worker.node && `node ${short(worker.node)}`].filter(Boolean).join(" · "));
    say(one.why, (whole(worker) && worker.speculation?.why) || "");
    one.why.hidden = !one.why.textContent;
    const list = words(worker, feed.get("heat/groups")?.[worker.id] ?? 1);
    const key = JSON.stringify(list);
    if (one.key !== key) {
      one.key = key;
      replace(one.figures, list.map(([value, unit, part]) =>
        h("div", {}, h("dt", {}, unit), h("dd", {}, value, part !== undefined && meter(part, `${percent(part)} ${unit}`)))));
    }
    return one.node;
  }

  node.update = () => {
    const workers = feed.all("worker/").sort((a, b) => byName(a.id, b.id));
    const of = (role) => workers.filter((worker) => worker.role === role);
    place(shards, of("attention").map(card));
    place(groups, of("expert").map(card));
    say(shardHead, `Attention shards · ${of("attention").length}`);
    say(groupHead, `Expert groups · ${of("expert").length}`);
    groupHead.parentNode.hidden = !of("expert").length;
    for (const id of [...cards.keys()]) if (!workers.some((worker) => worker.id === id)) cards.delete(id);
    drawNodes(workers);
    requestAnimationFrame(drawLines);
  };

  function place(list, wanted) {
    if (wanted.length !== list.children.length || wanted.some((one, i) => one !== list.children[i])) replace(list, wanted);
  }

  function drawNodes(workers) {
    const all = feed.all("node/").sort((a, b) => byName(a.address ?? "", b.address ?? ""));
    const key = JSON.stringify([all, workers.map((worker) => [worker.id, worker.node])]);
    if (nodes.key === key) return;
    nodes.key = key;
    replace(nodes, all.filter((one) => one.alive || workers.some((worker) => worker.node === one.id)).map((one) => {
      const here = workers.filter((worker) => worker.node === one.id).map((worker) => worker.id);
      const state = !one.alive ? "lost" : one.drained ? "drained" : "";
      return h("li", { class: state }, h("strong", {}, one.address ?? short(one.id)), h("code", {}, short(one.id)), state && h("em", {}, state), h("span", {}, here.join(", ") || "no worker"));
    }));
  }

  function drawLines() {
    if (!field.isConnected) return;
    const flows = feed.get("flows") ?? {};
    const box = field.getBoundingClientRect();
    lines.setAttribute("viewBox", `0 0 ${box.width} ${box.height}`);
    const found = [];
    for (const [shard, to] of Object.entries(flows)) for (const [group, rows] of Object.entries(to)) if (cards.has(shard) && cards.has(group)) found.push([shard, group, rows]);
    found.sort((a, b) => b[2] - a[2]).splice(MOST_LINES);
    const most = Math.max(1, ...found.map(([, , rows]) => rows));
    const narrow = box.width < 520;
    replace(lines, found.map(([shard, group, rows]) => {
      const a = cards.get(shard).node.getBoundingClientRect(), b = cards.get(group).node.getBoundingClientRect();
      const x0 = a.right - box.left, x1 = b.left - box.left, y0 = a.top + a.height / 2 - box.top, y1 = b.top + b.height / 2 - box.top;
      const bend = (x1 - x0) * 0.5;
      const path = `M${x0} ${y0}C${x0 + bend} ${y0} ${x1 - bend} ${y1} ${x1} ${y1}`;
      const width = (0.8 + (narrow ? 4 : 7) * (rows / most)).toFixed(2);
      return s("g", {}, s("path", { d: path, class: "flow-band", "stroke-width": width }), rows > 0 && s("path", { d: path, class: "flow-dots" }));
    }));
    say(summary, found.slice(0, 12).map(([shard, group, rows]) => `${shard} to ${group}: ${figure(rows)} rows/s`).join("; "));
  }

  new ResizeObserver(() => requestAnimationFrame(drawLines)).observe(field);
  return node;
}
