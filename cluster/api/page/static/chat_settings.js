// The panel beside a chat: system prompt, parameters, thinking, JSON schema, tools.

import { models } from "./asked.js";
import { keepSettings, DEFAULTS, settings } from "./conversations.js";
import { button, field, h, iconButton, segmented } from "./dom.js";

const SCHEMA = '{\n  "type": "object",\n  "properties": {"answer": {"type": "string"}},\n  "required": ["answer"]\n}';
const TOOLS =
  '[{\n  "type": "function",\n  "function": {\n    "name": "weather",\n    "parameters": {"type": "object", "properties": {"city": {"type": "string"}}}\n  }\n}]';

export function settingsPanel(close, changed) {
  const inputs = {};
  const bound = (name, node) => {
    inputs[name] = node;
    node.value = settings[name];
    node.addEventListener("input", () => {
      settings[name] = node.value;
      node.removeAttribute("aria-invalid");
      keepSettings();
      changed();
    });
    return node;
  };
  const line = (name, props) => bound(name, h("input", { type: "text", autocomplete: "off", spellcheck: "false", ...props }));
  const area = (name, rows, props) => bound(name, h("textarea", { rows, spellcheck: "false", ...props }));
  const code = (name, placeholder) => area(name, 6, { class: "mono", placeholder });

  const model = h("select");
  models().then(
    (found) => {
      for (const one of found) model.append(h("option", { value: one.id }, one.id));
      if (found.some((one) => one.id === settings.model)) model.value = settings.model;
    },
    () => model.append(h("option", { value: "" }, "unknown")),
  );
  model.addEventListener("change", () => {
    settings.model = model.value;
    keepSettings();
    changed();
  });
  const thinking = segmented("Thinking", [["auto", "As the model has it"], ["on", "On"], ["off", "Off"]], settings.thinking, (value) => {
    settings.thinking = value;
    keepSettings();
    changed();
  });
  const reset = button("Back to the defaults", {
    class: "quiet",
    onclick: () => {
      Object.assign(settings, DEFAULTS, { model: settings.model });
      for (const [name, node] of Object.entries(inputs)) node.value = settings[name];
      thinking.choose("auto");
      keepSettings();
      changed();
    },
  });
  const fold = (title, name, ...inside) => h("details", { class: "fold", open: Boolean(settings[name]) }, h("summary", {}, title), inside);
  const decimal = { inputmode: "decimal" }, whole = { inputmode: "numeric" };
  const node = h(
    "aside",
    { class: "settings", "aria-label": "Settings of the chat" },
    h("header", {}, h("h2", {}, "Settings"), iconButton("Close the settings", "close", { onclick: close })),
    field("Model", model),
    field("System prompt", area("system", 4, { placeholder: "None" })),
    h("div", { class: "pair" }, field("Temperature", line("temperature", { ...decimal, placeholder: "1" })), field("Top-p", line("top_p", { ...decimal, placeholder: "1" }))),
    h("div", { class: "pair" }, field("Most tokens", line("max_tokens", { ...whole, placeholder: "what fits" })), field("Seed", line("seed", { ...whole, placeholder: "drawn" }))),
    h("div", { class: "field" }, h("span", { class: "label" }, "Thinking"), thinking),
    fold("Stop strings", "stop", field("Stop strings", area("stop", 3), "One a line; the reply ends before the first.")),
    fold("JSON schema", "schema", field("JSON schema", code("schema", SCHEMA), "The answer will be JSON that fits it.")),
    fold("Tools", "tools", field("Tools", code("tools", TOOLS), "OpenAI's form. Calls are shown; you give their results.")),
    reset,
  );
  // Shows which setting is wrong.
  node.blame = (name) => {
    const input = inputs[name];
    if (!input) return;
    input.closest("details")?.setAttribute("open", "");
    input.setAttribute("aria-invalid", "true");
    input.focus();
  };
  return node;
}
