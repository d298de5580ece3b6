// From a conversation and its settings to the request's body, and to the same request as somebody else would make it.

import { json } from "./api.js";

export class SettingError extends Error {
  constructor(field, message) {
    super(message);
    this.field = field;
  }
}

function number(settings, name, words, whole) {
  const text = String(settings[name]).trim();
  if (text === "") return undefined;
  const value = Number(text);
  if (!Number.isFinite(value) || (whole && !Number.isInteger(value))) {
    throw new SettingError(name, `${words} is ${text}; it must be ${whole ? "a whole number" : "a number"}`);
  }
  return value;
}

function parsed(settings, name, words, check) {
  const text = settings[name].trim();
  if (!text) return undefined;
  let value;
  try {
    value = JSON.parse(text);
  } catch (error) {
    throw new SettingError(name, `${words}: ${error.message}`);
  }
  if (!check(value)) throw new SettingError(name, `${words}: ${name === "tools" ? "a list of tools" : "an object"} is wanted`);
  return value;
}

const isObject = (value) => value !== null && typeof value === "object" && !Array.isArray(value);

// Raises SettingError where a setting cannot be.
export function chatBody(model, messages, settings) {
  const schema = parsed(settings, "schema", "The JSON schema", isObject);
  const tools = parsed(settings, "tools", "The tools", Array.isArray);
  const stop = settings.stop.split("\n").filter((line) => line !== "");
  const body = {
    model,
    messages: [...(settings.system.trim() ? [{ role: "system", content: settings.system }] : []), ...messages.map(sent)],
    temperature: number(settings, "temperature", "The temperature"),
    top_p: number(settings, "top_p", "Top-p"),
    max_tokens: number(settings, "max_tokens", "The most tokens", true),
    seed: number(settings, "seed", "The seed", true),
    stop: stop.length ? stop : undefined,
    thinking: settings.thinking === "auto" ? undefined : settings.thinking === "on",
    tools,
    response_format: schema && { type: "json_schema", json_schema: { name: "answer", schema, strict: true } },
  };
  return Object.fromEntries(Object.entries(body).filter(([, value]) => value !== undefined));
}

function sent(message) {
  if (message.role === "tool") return { role: "tool", tool_call_id: message.tool_call_id, content: message.content };
  const out = { role: message.role, content: message.content ?? "" };
  if (message.tool_calls?.length) {
    out.tool_calls = message.tool_calls.map((call) => ({
      id: call.id, type: "function", function: { name: call.name, arguments: call.arguments },
    }));
  }
  return out;
}

const quoted = (text) => `'${text.replaceAll("'", "'\\''")}'`;

export function asCurl(body, keyed) {
  const lines = [`curl ${location.origin}/v1/chat/completions`, "-H 'Content-Type: application/json'"];
  if (keyed) lines.push('-H "Authorization: Bearer $ISOTHERM_KEY"');
  lines.push(`-d ${quoted(JSON.stringify(body, null, 2))}`);
  return lines.join(" \\\n  ");
}

export function asPython(body, keyed) {
  const { messages, model, response_format, ...rest } = body;
  const others = Object.entries({ model, response_format, ...rest }).filter(([, value]) => value !== undefined);
  const parameters = others.map(([name, value]) => `        ${name}=${literal(value, 8)},\n`).join("");
  const key = keyed ? ', api_key=os.environ["ISOTHERM_KEY"]' : "";
  return (
    `${keyed ? "import os\n\n" : ""}from isotherm.cluster.client import Client\n\n` +
    `with Client(${literal(location.origin)}${key}) as client:\n` +
    `    reply = client.chat(\n        ${literal(messages, 8)},\n${parameters}    )\n    print(reply.text)\n`
  );
}

// A JSON value as Python writes it.
function literal(value, indent = 0) {
  if (value === null) return "None";
  if (typeof value === "boolean") return value ? "True" : "False";
  if (typeof value !== "object") return JSON.stringify(value);
  const entries = Array.isArray(value)
    ? value.map((one) => literal(one, indent + 4))
    : Object.entries(value).map(([name, one]) => `${JSON.stringify(name)}: ${literal(one, indent + 4)}`);
  const [open, close] = Array.isArray(value) ? "[]" : "{}";
  const flat = open + entries.join(", ") + close;
  if (flat.length + indent < 100 && !flat.includes("\n")) return flat;
  const pad = " ".repeat(indent + 4);
  return `${open}\n${entries.map((one) => `${pad}${one},\n`).join("")}${" ".repeat(indent)}${close}`;
}

let served = null;
// What the server serves, its own name first: [{id, max_model_len}].
export const models = async () => (served ??= (await json("/v1/models")).data);
window.addEventListener("isotherm-key", () => (served = null));
