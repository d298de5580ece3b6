// Operations: their phases, as they pass; and what an operator asks for.

import { json } from "./api.js";
import { button, dialog, h, replace, say, stepper, toast } from "./dom.js";
import { feed } from "./feed.js";
import { experts } from "./heatmap.js";
import { ago, clock, figure, seconds } from "./numbers.js";

const PHASES = ["planned", "preparing", "committing", "done"];
const BACK = ["planned", "preparing", "rolling_back", "rolled_back"];
const FINAL = new Set(["done", "rolled_back", "failed"]);
const ended = (operation) => FINAL.has(operation.phase);

export function targetWords(target) {
  const words = [];
  if (target.expert_groups !== undefined) words.push(`${target.expert_groups} expert groups`);
  if (target.attention_shards !== undefined) words.push(`${target.attention_shards} attention shards`);
  const copies = target.copies ?? [];
  for (const one of copies.slice(0, 3)) words.push(`layer ${one.layer} expert ${one.expert}: ${one.count === null ? "as many copies as the autoscaler decides" : `${one.count} ${one.count === 1 ? "copy" : "copies"}`}`);
  if (copies.length > 3) words.push(`${copies.length - 3} more experts`);
  if (target.drain_nodes) words.push(target.drain_nodes.length ? `free ${target.drain_nodes.map((id) => id.slice(0, 8)).join(", ")}` : "no node kept free");
  if (target.manifest) words.push("a manifest's values for workers");
  for (const name of Object.keys(target)) if (!["expert_groups", "attention_shards", "copies", "drain_nodes", "manifest"].includes(name)) words.push(`${name} ${JSON.stringify(target[name])}`);
  return words.join(", ") || "recovery of what was lost";
}

// One operation, kept up to date by `show`.
export function operationNode() {
  const name = h("strong", {}), target = h("span", { class: "target" }), when = h("span", { class: "when" });
  const steps = h("ol", { class: "phases" }), plan = h("ul", { class: "plan" }), reasons = h("ul", { class: "reasons" });
  const more = h("details", { class: "fold" }, h("summary", {}, "Plan"), plan);
  const node = h("li", { class: "operation" }, h("div", { class: "operation-head" }, name, target, when), steps, reasons, more);
  node.show = (operation) => {
    const key = JSON.stringify(operation) + ago(operation.created);
    if (node.key === key) return;
    node.key = key;
    node.dataset.phase = operation.phase;
    say(name, `${operation.id}${operation.dry_run ? " (dry run)" : ""}`);
    say(target, targetWords(operation.target));
    say(when, `${operation.origin}, ${ago(operation.created)}`);
    const path = operation.phase.startsWith("roll") ? BACK : operation.phase === "failed" ? ["planned", ...Object.keys(operation.entered).filter((phase) => !["planned", "failed"].includes(phase)), "failed"] : PHASES;
    const at = path.indexOf(operation.phase);
    replace(steps, path.map((phase, i) => h("li", { class: i < at || (i === at && ended(operation)) ? "past" : i === at ? "now" : "", "aria-current": i === at ? "step" : undefined },
      h("span", {}, phase.replace("_", " ")), operation.seconds?.[phase] !== undefined && h("span", { class: "number" }, seconds(operation.seconds[phase])))));
    replace(reasons, [...(operation.waiting ?? []), ...(operation.reasons ?? [])].map((text) => h("li", {}, text)));
    replace(plan, (operation.plan ?? []).map((text) => h("li", {}, text)));
    more.hidden = !operation.plan?.length;
  };
  return node;
}

const number = (id) => Number(/\d+$/.exec(id)?.[0] ?? 0);

export function operationList(most = 12) {
  const list = h("ol", { class: "operations" }), none = h("p", { class: "nothing" }, "Nothing has been changed yet.");
  const node = h("section", { class: "panel", "aria-labelledby": "operations-title" }, h("header", {}, h("h2", { id: "operations-title" }, "Operations")), none, list);
  const nodes = new Map();
  node.update = () => {
    const all = feed.all("operation/").filter((one) => !one.dry_run).sort((a, b) => b.created - a.created || number(b.id) - number(a.id)).slice(0, most);
    none.hidden = all.length > 0;
    const wanted = all.map((operation) => {
      if (!nodes.has(operation.id)) nodes.set(operation.id, operationNode());
      nodes.get(operation.id).show(operation);
      return nodes.get(operation.id);
    });
    for (const id of [...nodes.keys()]) if (!all.some((one) => one.id === id)) nodes.delete(id);
    if (wanted.some((one, i) => one !== list.children[i]) || wanted.length !== list.children.length) replace(list, wanted);
  };
  return node;
}

export function decisionList() {
  const head = h("p", { class: "remark" }), list = h("ol", { class: "decisions" }), seen = h("dl", { class: "seen" });
  const none = h("p", { class: "nothing" }, "It has decided nothing yet.");
  const node = h("section", { class: "panel", "aria-labelledby": "decisions-title" }, h("header", {}, h("h2", { id: "decisions-title" }, "Autoscaler"), head), seen, none, list);
  node.update = () => {
    const autoscaler = feed.get("autoscaler");
    say(head, !autoscaler ? "" : `${{ on: "On: it acts", advise: "Advises only", off: "Off" }[autoscaler.mode] ?? autoscaler.mode}${autoscaler.acting ? ", and is acting now" : ""}; looks every ${seconds(autoscaler.interval)}`);
    const all = feed.all("decision/").sort((a, b) => b.time - a.time).slice(0, 20);
    const key = JSON.stringify([autoscaler, all]);
    if (node.key === key) return;
    node.key = key;
    const facts = [["Hottest group / mean", figure(autoscaler?.heat ?? null)], ["Imbalance", figure(autoscaler?.imbalance ?? null)], ["Would do now", autoscaler?.plan ?? "–"]];
    replace(seen, facts.map(([words, value]) => h("div", {}, h("dt", {}, words), h("dd", {}, value))));
    none.hidden = all.length > 0;
    replace(list, all.map((one) => h("li", {}, h("div", { class: "operation-head" }, h("time", { class: "number" }, clock(one.time)), h("strong", {}, one.kind), h("span", { class: `result ${one.result.replaceAll(" ", "-")}` }, one.result)),
      h("p", {}, one.reason), one.why && h("p", { class: "why" }, one.why),
      h("p", { class: "figures" }, Object.entries(one.figures ?? {}).map(([name, value]) => `${name.replaceAll("_", " ")} ${figure(value)}`).join(" · ")))));
  };
  return node;
}

// --- asking for one ------------------------------------------------------------------------------

export const operate = (target, dry) =>
  json("/admin/operations", { method: "POST", body: { ...target, dry_run: dry, idempotency_key: crypto.randomUUID?.() ?? `page-${Date.now()}-${Math.random()}` } });

async function finished(operation, quick) {
  for (let i = 0; !ended(operation) && i < (quick ? 100 : 1e9); i++) {
    await new Promise((resolve) => setTimeout(resolve, 150));
    operation = await json(`/admin/operations/${encodeURIComponent(operation.id)}`);
  }
  return operation;
}

// Shows what a target would do, and does it when it is told to. `place`: where that is shown; `target()`: what is asked.
export function planner(target, place, done = () => {}) {
  const out = h("div", { class: "planned", "aria-live": "polite" });
  const plan = button("Show the plan", { onclick: () => work(true) });
  const go = button("Carry it out", { class: "primary", onclick: () => work(false) });
  let stop = () => {};
  async function work(dry) {
    const asked = target();
    if (asked === null) return replace(out, h("p", {}, "That is what there is already."));
    plan.disabled = go.disabled = true;
    stop();
    try {
      let operation = await operate(asked, dry);
      if (dry) {
        operation = await finished(operation, true);
        const steps = operation.plan ?? [];
        replace(out, h("p", {}, operation.phase === "failed" ? "It cannot be done:" : steps.length ? `${steps.length} ${steps.length === 1 ? "step" : "steps"}, if it were done now:` : "Nothing would have to be done."),
          h("ul", { class: "plan" }, steps.map((text) => h("li", {}, text))), h("ul", { class: "reasons" }, (operation.reasons ?? []).map((text) => h("li", {}, text))));
      } else {
        const node = operationNode();
        const show = () => node.show(feed.get(`operation/${operation.id}`) ?? operation);
        replace(out, h("ol", { class: "operations" }, node));
        stop = feed.listen(show);
        toast(`${operation.id}: ${targetWords(operation.target)}`);
        done();
      }
    } catch (error) {
      replace(out, h("p", { class: "failure", role: "alert" }, error.message));
    }
    plan.disabled = go.disabled = false;
  }
  add(place, plan, go, out);
  return { clear: () => replace(out) };
}

function add(place, plan, go, out) {
  place.append(h("div", { class: "actions" }, plan, go), out);
}

// Copies of one expert.
export function expertDialog(layer, expert) {
  const find = () => experts().find((row) => row.layer === layer)?.cells.find((cell) => cell.expert === expert);
  const cell = find();
  if (!cell) return;
  const facts = h("dl", { class: "seen" });
  const count = stepper("Copies", cell.holders.length, 1, () => ((given = true), plan.clear()));
  let given = true;
  const leave = button("Leave it to the autoscaler", { class: "quiet", onclick: () => ((given = false), count.set(find()?.holders.length ?? 1), plan.clear(), toast("Show the plan, or carry it out")) });
  const place = h("div", {});
  const node = dialog(`Layer ${layer}, expert ${expert}`, facts, h("div", { class: "row" }, h("span", { class: "label" }, "Copies"), count, leave), place);
  const plan = planner(() => ({ copies: [{ layer, expert, count: given ? count.value : null }] }), place);
  const stop = feed.listen(() => {
    const now = find();
    if (!now) return;
    const list = [["Heat", `${figure(now.ratio)} × the layer’s mean`], ["Rows", `${figure(now.rate)} /s, ${figure(now.rows)} since the start`], ["On", now.holders.join(", ")], ["Copies are set by", now.pinned ? "an operator" : "the autoscaler"]];
    const key = JSON.stringify(list);
    if (facts.key === key) return;
    facts.key = key;
    replace(facts, list.map(([words, value]) => h("div", {}, h("dt", {}, words), h("dd", {}, value))));
  });
  node.addEventListener("close", stop);
}
