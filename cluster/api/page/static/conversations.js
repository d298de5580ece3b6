// Conversations, kept in this browser alone (local storage). Where it keeps nothing, they last as long as the page.

const STORE = "isotherm.conversations", SETTINGS = "isotherm.settings";
const MOST = 100, MOST_CHARACTERS = 3_000_000;

export const DEFAULTS = {
  system: "", temperature: "", top_p: "", max_tokens: "", seed: "", stop: "", thinking: "auto", schema: "", tools: "",
  model: "",
};

function read(name, fallback) {
  try {
    const value = JSON.parse(localStorage.getItem(name));
    return value && typeof value === "object" ? value : fallback;
  } catch {
    return fallback;
  }
}

function write(name, value) {
  try {
    localStorage.setItem(name, JSON.stringify(value));
  } catch {
    // Full, or not allowed: what is on screen is still there.
  }
}

const sound = (one) => one && typeof one.id === "string" && Array.isArray(one.messages);
let kept = read(STORE, []);
kept = Array.isArray(kept) ? kept.filter(sound) : [];

export const conversations = () => kept;

export function begin() {
  return { id: crypto.randomUUID?.() ?? String(Date.now() + Math.random()), title: "", changed: Date.now(), messages: [] };
}

export function keep(conversation) {
  conversation.changed = Date.now();
  conversation.title ||= titleOf(conversation);
  kept = [conversation, ...kept.filter((one) => one.id !== conversation.id)].slice(0, MOST);
  let size = 0;
  write(STORE, kept.filter((one) => (size += JSON.stringify(one).length) < MOST_CHARACTERS));
}

export function forget(conversation) {
  kept = kept.filter((one) => one.id !== conversation.id);
  write(STORE, kept);
}

export function forgetAll() {
  kept = [];
  write(STORE, kept);
}

function titleOf(conversation) {
  const first = conversation.messages.find((message) => message.role === "user")?.content ?? "";
  const line = first.trim().split("\n")[0];
  return line.length > 60 ? `${line.slice(0, 59)}…` : line || "Without words";
}

export const settings = { ...DEFAULTS, ...read(SETTINGS, {}) };
export const keepSettings = () => write(SETTINGS, settings);
