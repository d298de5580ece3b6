// The page's frame: views by the address's fragment, the theme, the key, and how the server is.

import { hasKey, onKeyNeeded, setKey } from "./api.js";
import { chatView } from "./chat.js";
import { clusterView } from "./cluster.js";
import { button, dialog, field, h, icon, iconButton, mark, replace, say } from "./dom.js";
import { feed } from "./feed.js";
import { figure } from "./numbers.js";
import { operateView } from "./operate.js";
import { requestsView } from "./requests.js";

const VIEWS = {
  chat: ["Chat", chatView],
  cluster: ["Cluster", clusterView],
  operate: ["Operate", operateView],
  requests: ["Requests", requestsView],
};
const THEMES = { auto: "As the system", light: "Light", dark: "Dark" };
const THEME_ICONS = { auto: "auto", light: "sun", dark: "moon" };

function theme() {
  try {
    return localStorage.getItem("isotherm.theme") ?? "auto";
  } catch {
    return "auto";
  }
}

function setTheme(name) {
  document.documentElement.dataset.theme = name;
  try {
    localStorage.setItem("isotherm.theme", name);
  } catch {
    // It lasts as long as the page.
  }
  window.dispatchEvent(new Event("isotherm-theme"));
}

function askKey(message) {
  return new Promise((resolve) => {
    const key = h("input", { type: "password", autocomplete: "off", spellcheck: "false", required: true });
    const keep = h("input", { type: "checkbox" });
    const use = h("button", { type: "submit", class: "primary" }, "Use it");
    const form = h("form", {}, message && h("p", { class: "said-by-server" }, message), field("API key", key),
      h("label", { class: "tick" }, keep, h("span", {}, "Keep it in this tab until it is closed")),
      h("footer", {}, hasKey() && button("Forget the key", { onclick: () => (setKey("", false), node.close()) }), use));
    const node = dialog("This server wants a key", form);
    let given = false;
    form.addEventListener("submit", (event) => {
      event.preventDefault();
      given = true;
      setKey(key.value.trim(), keep.checked);
      node.close();
    });
    node.addEventListener("close", () => resolve(given));
    key.focus();
  });
}

function frame() {
  const main = h("main", { id: "main", tabindex: "-1" });
  const links = Object.entries(VIEWS).map(([name, [words]]) => h("a", { href: `#${name}` }, icon(name), h("span", {}, words)));
  const dot = h("span", { class: "dot" });
  const model = h("span", { class: "served" });
  const state = h("span", { class: "state" });
  const server = h("p", { class: "server", role: "status" }, dot, h("span", { class: "lines" }, model, state));
  const themeButton = iconButton("", "auto", { onclick: nextTheme });
  const tools = h("div", { class: "tools" }, themeButton, iconButton("API key", "key", { onclick: () => askKey("") }));
  const rail = h("header", { class: "rail" }, h("a", { class: "brand", href: "#chat", "aria-label": "Isotherm, to the chat" }, mark(), h("span", {}, "Isotherm")),
    h("nav", { "aria-label": "Views" }, links), h("div", { class: "rail-foot" }, server, tools));
  replace(document.getElementById("app"), rail, main);

  function nextTheme() {
    const names = Object.keys(THEMES);
    setTheme(names[(names.indexOf(theme()) + 1) % names.length]);
    showTheme();
  }
  function showTheme() {
    const name = theme();
    replace(themeButton, icon(THEME_ICONS[name] ?? "auto"));
    const label = `Theme: ${THEMES[name] ?? THEMES.auto}`;
    themeButton.setAttribute("aria-label", label);
    themeButton.title = label;
  }
  showTheme();

  feed.listen(() => {
    const cluster = feed.get("cluster");
    const phase = cluster?.controller?.phase ?? "";
    const rate = feed.all("sample/").at(-1)?.tokens_per_second;
    say(model, cluster?.model?.id ?? "");
    say(state, feed.trouble ? (feed.known ? "not heard of just now" : "not seen") : phase === "serving" ? (rate === undefined ? "serving" : `${figure(rate)} tokens/s`) : phase);
    server.title = feed.trouble || phase;
    dot.className = `dot ${feed.trouble ? "off" : phase === "serving" ? "on" : "wait"}`;
  });

  const made = {};
  let current = null;
  function route() {
    const name = location.hash.slice(1).split("?")[0];
    const chosen = name in VIEWS ? name : "chat";
    current?.hidden?.();
    current = made[chosen] ??= VIEWS[chosen][1]();
    replace(main, current.node);
    document.title = `${current.title} · Isotherm`;
    document.body.dataset.view = chosen;
    links.forEach((link) => (link.hash === `#${chosen}` ? link.setAttribute("aria-current", "page") : link.removeAttribute("aria-current")));
    current.shown?.();
  }
  window.addEventListener("hashchange", route);
  route();
}

document.documentElement.dataset.theme = theme();
onKeyNeeded(askKey);
frame();
