// Changing the cluster: how many groups and shards, which nodes are kept free, who decides about copies.

import { json } from "./api.js";
import { notice } from "./cluster.js";
import { h, replace, say, segmented, stepper, toast } from "./dom.js";
import { feed } from "./feed.js";
import { heatMap } from "./heatmap.js";
import { byName } from "./numbers.js";
import { expertDialog, operationList, planner } from "./operations.js";

const count = (role) => feed.all("worker/").filter((worker) => worker.role === role && worker.state !== "dead").length;

export function operateView() {
  const warning = notice(), operations = operationList(8), heat = heatMap(expertDialog);
  let touched = false;
  const touch = () => ((touched = true), plan.clear());
  const groups = stepper("Expert groups", 1, 1, touch), shards = stepper("Attention shards", 1, 1, touch);
  const now = { groups: h("span", { class: "remark" }), shards: h("span", { class: "remark" }) };
  const scale = h("section", { class: "panel", "aria-labelledby": "scale-title" }, h("header", {}, h("h2", { id: "scale-title" }, "Scale"), h("p", { class: "remark" }, "Streams go on meanwhile, token for token.")),
    h("div", { class: "row" }, h("span", { class: "label" }, "Attention shards"), shards, now.shards), h("div", { class: "row" }, h("span", { class: "label" }, "Expert groups"), groups, now.groups));
  const plan = planner(() => {
    const target = {};
    if (groups.value !== count("expert")) target.expert_groups = groups.value;
    if (shards.value !== count("attention")) target.attention_shards = shards.value;
    return Object.keys(target).length ? target : null;
  }, scale, () => (touched = false));

  const list = h("ul", { class: "nodes choosable" });
  const drain = h("section", { class: "panel", "aria-labelledby": "drain-title" }, h("header", {}, h("h2", { id: "drain-title" }, "Nodes"), h("p", { class: "remark" }, "A node that is kept free has its workers moved off it.")), list);
  const ticked = () => [...list.querySelectorAll("input:checked")].map((input) => input.value);
  const drainPlan = planner(() => {
    const was = feed.all("node/").filter((one) => one.drained).map((one) => one.id).sort();
    return ticked().sort().join() === was.join() ? null : { drain_nodes: ticked() };
  }, drain);

  const mode = segmented("Autoscaler", [["off", "Off"], ["advise", "Advise"], ["on", "On"]], "", setMode);
  const said = h("p", { class: "remark" });
  const scaler = h("section", { class: "panel", "aria-labelledby": "mode-title" }, h("header", {}, h("h2", { id: "mode-title" }, "Autoscaler")), mode, said);
  let asked = null; // the mode that was chosen here, and the one before it, which the feed tells for a while yet
  async function setMode(name) {
    asked = { name, before: feed.get("autoscaler")?.mode ?? "" };
    try {
      await json("/admin/autoscaler", { method: "POST", body: { mode: name } });
      toast(`Autoscaler: ${name}`);
    } catch (error) {
      asked = null;
      toast(error.message, "bad");
    }
    showMode();
  }
  function showMode() {
    const current = feed.get("autoscaler")?.mode ?? "";
    if (asked && current !== asked.before) asked = null;
    mode.choose(asked ? asked.name : current);
    say(said, { on: "It moves and copies hot experts, and changes the numbers of workers where the manifest gives bounds.", advise: "It writes what it would do, and does nothing.", off: "Nothing changes unless somebody asks for it." }[current] ?? "");
  }

  function update() {
    warning.update();
    const one = Boolean(feed.get("cluster")?.one_process);
    alone.hidden = !one;
    rest.hidden = one || !feed.known;
    if (one) return;
    say(now.groups, `now ${count("expert")}`);
    say(now.shards, `now ${count("attention")}`);
    if (!touched && !feed.all("operation/").some((op) => !["done", "failed", "rolled_back"].includes(op.phase))) {
      groups.set(count("expert") || 1);
      shards.set(count("attention") || 1);
    }
    const nodes = feed.all("node/").filter((node) => node.alive || node.drained).sort((a, b) => byName(a.address, b.address));
    const key = JSON.stringify(nodes.map((node) => [node.id, node.drained, node.alive]));
    if (list.key !== key) {
      list.key = key;
      drainPlan.clear();
      replace(list, nodes.map((node) => h("li", {}, h("label", { class: "tick" }, h("input", { type: "checkbox", value: node.id, checked: node.drained, "aria-label": `Keep ${node.address} free` }), h("strong", {}, node.address), h("code", {}, node.id.slice(0, 8)), h("span", {}, node.drained ? "kept free" : node.alive ? "" : "gone")))));
    }
    heat.hidden = !feed.all("layer/").length;
    if (feed.last !== told) showMode();
    told = feed.last;
    heat.update();
    operations.update();
  }
  let told = null;
  const alone = h("section", { class: "panel alone" }, h("h2", {}, "One process"), h("p", {}, "There is nothing to scale here: this server is one process."));
  const rest = h("div", { class: "stack" }, h("div", { class: "columns three" }, scale, drain, scaler), heat, operations);
  const node = h("div", { class: "view" }, h("header", { class: "view-head" }, h("h1", {}, "Operate"), h("p", { class: "remark" }, "Each change is a transaction: prepared, committed at a layer boundary, or rolled back.")), warning, alone, rest);
  let stop = () => {};
  return { node, title: "Operate", shown: () => (stop = feed.listen(update)), hidden: () => stop() };
}
