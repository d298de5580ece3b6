// Building the page. Text becomes text nodes and nothing else: no function here takes markup.

const SVG = "http://www.w3.org/2000/svg";

function fill(node, props, children) {
  for (const [name, value] of Object.entries(props ?? {})) {
    if (value === undefined || value === null || value === false) continue;
    if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
    else if (name === "class") node.setAttribute("class", value);
    else if (name === "style") for (const [key, one] of Object.entries(value)) node.style.setProperty(key, one);
    else if (name === "value" || name === "checked" || name === "disabled") node[name] = value;
    else node.setAttribute(name, value === true ? "" : String(value));
  }
  add(node, children);
  return node;
}

export function add(node, children) {
  for (const child of children.flat(Infinity)) {
    if (child === undefined || child === null || child === false) continue;
    node.append(child instanceof Node ? child : document.createTextNode(String(child)));
  }
  return node;
}

export const h = (tag, props, ...children) => fill(document.createElement(tag), props, children);
export const s = (tag, props, ...children) => fill(document.createElementNS(SVG, tag), props, children);

export function replace(node, ...children) {
  node.replaceChildren();
  return add(node, children);
}

// Sets text only where it is another: a screen reader and a selection notice every change.
export function say(node, text) {
  if (node.textContent !== text) node.textContent = text;
}

const ICONS = {
  chat: "M4 5h16v11H9l-5 4z",
  cluster: "M4 7c3-3 5 3 8 0s5-3 8 0M4 12c3-3 5 3 8 0s5-3 8 0M4 17c3-3 5 3 8 0s5-3 8 0",
  operate: "M6 4v7m0 4v5M12 4v2m0 4v10M18 4v10m0 4v2M4 13h4M10 8h4M16 16h4",
  requests: "M4 6h10M4 12h16M4 18h7",
  plus: "M12 5v14M5 12h14",
  minus: "M5 12h14",
  send: "M12 19V5M6 11l6-6 6 6",
  stop: "M7 7h10v10H7z",
  copy: "M9 9h11v11H9zM5 15H4V4h11v1",
  check: "M5 12l5 5 9-10",
  close: "M6 6l12 12M18 6L6 18",
  retry: "M20 11a8 8 0 1 0-2 6M20 5v6h-6",
  edit: "M4 20h4L19 9l-4-4L4 16z",
  code: "M9 7l-5 5 5 5M15 7l5 5-5 5",
  key: "M7.500 8a4 4 0 1 0 0 8 4 4 0 0 0 0-8zM11.500 12H21v4M17 12v3",
  sun: "M12 8a4 4 0 1 0 0 8 4 4 0 0 0 0-8zM12 2v2M12 20v2M2 12h2M20 12h2M5 5l1.500 1.500M17.500 17.500L19 19M19 5l-1.500 1.500M6.500 17.500L5 19",
  moon: "M19 14.500A8 8 0 0 1 9.500 5 7.500 7.500 0 1 0 19 14.500z",
  auto: "M12 4a8 8 0 1 0 0 16zM12 4a8 8 0 0 1 0 16",
  sliders: "M4 7h9m4 0h3M4 17h3m4 0h9M13 5v4M11 15v4",
  bin: "M5 7h14M10 7V4h4v3M7 7l1 13h8l1-13",
  list: "M4 6h16M4 12h16M4 18h16",
  chevron: "M8 10l4 4 4-4",
  tool: "M14 6a4 4 0 0 1 5 5l-9 9-4-4 9-9M6 16l2 2",
};

export const icon = (name) =>
  s("svg", { class: "icon", viewBox: "0 0 24 24", "aria-hidden": "true" }, s("path", { d: ICONS[name] }));

export function mark() {
  const curve = (d, kind) => s("path", { d, class: kind });
  return s(
    "svg",
    { class: "mark", viewBox: "0 0 32 32", "aria-hidden": "true" },
    curve("M16 2.500c7.200 0 13.200 5 13.400 12.600.2 8.200-5.600 14.400-13.200 14.400C8.400 29.500 2.600 24 2.600 16.200 2.600 8.600 8.400 2.500 16 2.500Z", "cold"),
    curve("M17 7.600c4.700 0 8.200 3.200 8.200 8 0 5.200-3.700 9-8.400 9-5 0-9-3.500-9-8.600 0-4.900 4-8.400 9.200-8.400Z", "warm"),
    curve("M17.800 12.400c2.300 0 3.900 1.600 3.900 3.700 0 2.400-1.700 4.100-4 4.100-2.500 0-4.300-1.700-4.300-4.100 0-2.200 1.900-3.700 4.400-3.700Z", "hot"),
  );
}

// Lines of equal heat around a warm place, as a weather chart has them.
export function rings() {
  const ring = (radius, turn) => {
    const points = Array.from({ length: 97 }, (_, i) => {
      const at = (i / 96) * 2 * Math.PI;
      const bend = 1 + 0.075 * Math.sin(2 * at + turn) + 0.05 * Math.sin(3 * at - 1.7 * turn) + 0.025 * Math.sin(5 * at + 2);
      const drift = (100 - radius) * 0.1;
      return `${(100 + drift + radius * bend * Math.cos(at)).toFixed(1)} ${(100 - drift * 0.6 + radius * bend * Math.sin(at)).toFixed(1)}`;
    });
    return `M${points.join("L")}Z`;
  };
  const lines = Array.from({ length: 9 }, (_, i) => s("path", { d: ring(14 + 9.5 * i, 0.6 + i * 0.16), style: { "--heat": `${100 - i * 12}%` } }));
  return s("svg", { class: "rings", viewBox: "0 0 200 200", "aria-hidden": "true" }, lines, s("path", { class: "core", d: ring(6, 0.6) }));
}

export const button = (label, props, name) =>
  h("button", { type: "button", ...props }, name && icon(name), label && h("span", {}, label));

export const iconButton = (label, name, props) =>
  h("button", { type: "button", class: "icon-button", "aria-label": label, title: label, ...props }, icon(name));

let fields = 0;
export function field(label, input, hint) {
  const id = `f${++fields}`;
  input.id = id;
  const note = hint && h("span", { class: "hint", id: `${id}h` }, hint);
  if (note) input.setAttribute("aria-describedby", note.id);
  return h("div", { class: "field" }, h("label", { for: id }, label), input, note);
}

// One of a few: a row of radio buttons that look like one control.
export function segmented(label, options, value, changed) {
  const name = `s${++fields}`;
  const inputs = options.map(([key, words]) => {
    const input = h("input", { type: "radio", name, value: key, checked: key === value });
    input.addEventListener("change", () => changed(key));
    return h("label", {}, input, h("span", {}, words));
  });
  const node = h("fieldset", { class: "segmented" }, h("legend", { class: "unseen" }, label), inputs);
  node.choose = (key) => {
    for (const input of node.querySelectorAll("input")) input.checked = input.value === key;
  };
  return node;
}

export function stepper(label, value, least, changed) {
  const output = h("output", { class: "number", "aria-live": "polite" }, value);
  const less = iconButton(`${label}: one fewer`, "minus", { onclick: () => set(node.value - 1) });
  const more = iconButton(`${label}: one more`, "plus", { onclick: () => set(node.value + 1) });
  const node = h("div", { class: "stepper", role: "group", "aria-label": label }, less, output, more);
  function set(next, quiet) {
    node.value = Math.max(least, next);
    say(output, String(node.value));
    less.disabled = node.value <= least;
    if (!quiet) changed?.(node.value);
  }
  node.set = (next) => set(next, true);
  set(value, true);
  return node;
}

export function dialog(title, ...children) {
  const close = iconButton("Close", "close", { onclick: () => node.close() });
  const heading = h("h2", { id: `d${++fields}` }, title);
  const head = h("header", {}, heading, close);
  const node = h("dialog", { "aria-labelledby": heading.id }, head, children);
  node.addEventListener("close", () => node.remove());
  node.addEventListener("click", (event) => event.target === node && node.close());
  document.body.append(node);
  node.showModal();
  return node;
}

export function toast(text, kind = "") {
  let place = document.getElementById("toasts");
  if (!place) document.body.append((place = h("div", { id: "toasts", role: "status", "aria-live": "polite" })));
  const node = h("div", { class: `toast ${kind}` }, text);
  place.append(node);
  setTimeout(() => node.remove(), 6000);
}

export async function copyText(text, node) {
  try {
    await navigator.clipboard.writeText(text);
  } catch {
    const area = h("textarea", { class: "unseen", "aria-hidden": "true" });
    (node?.closest("dialog") ?? document.body).append(area);
    area.value = text;
    area.select();
    document.execCommand("copy");
    area.remove();
  }
  toast("Copied");
}

// A link that a model or a client wrote: where it leads is shown, and asked about, before it opens.
export function askedLink(url, ...children) {
  const open = () => {
    const go = button("Open it", {
      class: "primary",
      onclick: () => {
        window.open(url, "_blank", "noopener,noreferrer");
        node.close();
      },
    });
    const node = dialog(
      "Open this address?",
      h("p", {}, "It was written by the model or by a client, not by Isotherm."),
      h("p", { class: "address" }, url),
      h("footer", {}, button("Copy it", { onclick: () => copyText(url, node) }), go),
    );
  };
  return h("button", { type: "button", class: "link", onclick: open }, children);
}
