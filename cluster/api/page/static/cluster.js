// The cluster, live: what it does, where its experts are hot, who works, what is changed, and why.

import { tile } from "./charts.js";
import { h, say } from "./dom.js";
import { feed } from "./feed.js";
import { flowMap } from "./flows.js";
import { heatMap } from "./heatmap.js";
import { figure, percent, quantile, seconds } from "./numbers.js";
import { decisionList, expertDialog, operationList } from "./operations.js";
import { requestBook } from "./book.js";

const MINUTES = 5;

export function notice() {
  const node = h("p", { class: "notice", role: "status" });
  node.update = () => {
    const cluster = feed.get("cluster"), phase = cluster?.controller?.phase;
    const lost = feed.all("worker/").filter((one) => ["dead", "silent"].includes(one.state));
    const words = feed.trouble
      ? `${feed.trouble}${feed.known ? " What is shown is as it was." : ""}`
      : !feed.known ? "Waiting for the server…"
      : lost.length ? `${lost.map((one) => `${one.id} is ${one.state}${one.reason ? `: ${one.reason}` : ""}`).join("; ")}. It is being replaced.`
      : phase && phase !== "serving" ? phase
      : "";
    say(node, words);
    node.hidden = !words;
    node.classList.toggle("bad", Boolean(feed.trouble || lost.length));
  };
  return node;
}

export function clusterView() {
  const warning = notice();
  const tiles = {
    tokens: tile("Throughput", figure, "tokens/s"),
    requests: tile("Requests", figure, "running"),
    kv: tile("KV cache", percent, "in use"),
    first: tile("First token", seconds, "median"),
    each: tile("Later tokens", seconds, "median"),
    busy: tile("Expert groups", percent, "busy"),
  };
  const heat = heatMap(expertDialog), flows = flowMap(), operations = operationList(), decisions = decisionList();
  const alone = h("section", { class: "panel alone" }, h("h2", {}, "One process"), h("p", {}, "This server is one process: its engine computes attention and experts alike, and there is nothing to place or to scale. With ", h("code", {}, "isotherm serve"), " there are shards and groups, and this view shows them."));
  const sub = h("p", { class: "remark" });
  const node = h("div", { class: "view" }, h("header", { class: "view-head" }, h("h1", {}, "Cluster"), sub), warning, h("div", { class: "tiles" }, Object.values(tiles)), alone, heat, flows, h("div", { class: "columns" }, operations, decisions));

  function update() {
    const samples = feed.all("sample/").sort((a, b) => a.n - b.n), now = samples.at(-1) ?? {};
    const course = (name) => samples.filter((one) => one[name] !== undefined).map((one) => [one.time, one[name]]);
    tiles.tokens.show(now.tokens_per_second, course("tokens_per_second"), 1);
    tiles.requests.show(now.running, course("running"), 1, now.waiting === undefined ? "" : `${figure(now.waiting)} waiting`);
    tiles.kv.show(now.kv_used, course("kv_used"), 1);
    tiles.busy.show(now.busy, course("busy"), 1, now.rows_per_second === undefined ? "" : `${figure(now.rows_per_second)} rows/s`);
    const cluster = feed.get("cluster"), one = Boolean(cluster?.one_process);
    const version = cluster?.placement_version;
    say(sub, [cluster?.model?.id, cluster?.model?.max_model_len && `${figure(cluster.model.max_model_len)} tokens of context`, version && `placement ${version}`].filter(Boolean).join(" · "));
    alone.hidden = !one;
    for (const part of [heat, operations, decisions]) part.hidden = one;
    heat.hidden ||= feed.known && !feed.all("layer/").length;
    tiles.busy.hidden = one;
    warning.update();
    flows.update();
    if (!one) for (const part of [heat, operations, decisions]) part.update();
  }

  function latencies() {
    const since = Date.now() / 1000 - MINUTES * 60;
    const ended = requestBook.records().filter((one) => one.state === "ended" && one.first_token !== null && one.started + one.seconds > since);
    const each = (one) => (one.output_tokens > one.choices ? one.decode / (one.output_tokens / one.choices - 1) : null);
    show(tiles.first, ended, (one) => one.first_token);
    show(tiles.each, ended, each);
    for (const one of [tiles.first, tiles.each]) one.hidden = !requestBook.known;
  }

  function show(one, ended, of) {
    const known = ended.map((record) => [record.started + record.seconds, of(record)]).filter(([, value]) => value !== null).sort((a, b) => a[0] - b[0]);
    const values = known.map(([, value]) => value);
    const [p50, p95, p99] = [0.5, 0.95, 0.99].map((part) => quantile(values, part));
    one.show(p50, known, undefined, values.length ? `p95 ${seconds(p95)} · p99 ${seconds(p99)}` : `no request in ${MINUTES} min`);
  }

  let stops = [];
  return {
    node, title: "Cluster",
    shown: () => (stops = [feed.listen(update), requestBook.listen(latencies)]),
    hidden: () => stops.forEach((stop) => stop()),
  };
}
