// The heat of every expert by layer: colour is heat against the layer's mean, and the lines join equal heat.

import { isotherms } from "./contours.js";
import { h, replace, say, segmented } from "./dom.js";
import { feed } from "./feed.js";
import { byName, figure } from "./numbers.js";

const COLDEST = 1 / 8, HOTTEST = 8; // times the layer's mean: the ends of the scale
const LINES = [0.5, 2, 4];
const SPAN = Math.log(HOTTEST / COLDEST);
const GUTTER = 34; // of the layers' numbers
const EASE_MS = 500;
const place = (ratio) => (ratio > 0 ? Math.min(1, Math.max(0, Math.log(ratio / COLDEST) / SPAN)) : 0);

// What the stream tells of the experts: a row for each layer, in order.
function read() {
  return feed.all("layer/").sort((a, b) => a.layer - b.layer).map((one) => {
    const heat = feed.get(`heat/${one.layer}`) ?? {};
    const known = heat.rate?.some((rate) => rate > 0) ? heat.rate : (heat.rows ?? []);
    const mean = known.reduce((sum, rate) => sum + rate, 0) / Math.max(1, known.length);
    const cells = one.holders.map((holders, expert) => ({
      layer: one.layer, expert, holders, pinned: one.pinned?.includes(expert), rate: heat.rate?.[expert] ?? 0,
      rows: heat.rows?.[expert] ?? 0, ratio: mean ? (known[expert] ?? 0) / mean : 1,
    }));
    return { layer: one.layer, cells };
  });
}

const ORDERS = {
  number: (a, b) => a.expert - b.expert,
  heat: (a, b) => b.ratio - a.ratio || a.expert - b.expert,
  place: (a, b) => byName(a.holders[0], b.holders[0]) || a.expert - b.expert,
};

// `choose(layer, expert)`: somebody wants to change it; absent: nobody may here.
export function heatMap(choose) {
  const canvas = h("canvas", { tabindex: "0", role: "application", "aria-roledescription": "heat map", "aria-describedby": "heat-said heat-help" });
  const said = h("p", { class: "heat-said", id: "heat-said", "aria-live": "polite" }, "Nothing is known of the experts yet.");
  const act = h("button", { type: "button", class: "quiet", disabled: true }, "Change its copies");
  const groups = h("div", { class: "heat-groups", role: "group", "aria-label": "Groups: show what one holds" });
  let order = "number", group = "", cursor = { row: 0, column: 0 }, rows = [], shown = new Map(), held = new Map(), fresh = new Map();
  let lines = [], frame = 0, moving = 0, looked = false;
  const orders = segmented("Order of the experts", [["number", "By number"], ["heat", "By heat"], ["place", "By place"]], order, (name) => {
    order = name;
    take();
  });
  const node = h("section", { class: "panel heat", "aria-labelledby": "heat-title" },
    h("header", {}, h("h2", { id: "heat-title" }, "Heat of the experts"), orders), canvas, legend(),
    h("div", { class: "heat-foot" }, said, choose && act),
    h("p", { class: "unseen", id: "heat-help" }, "Arrow keys move from expert to expert; Enter changes the copies of one."), groups);
  act.addEventListener("click", () => chosen() && choose(chosen().layer, chosen().expert));

  const chosen = () => rows[cursor.row]?.cells[cursor.column];

  function take() {
    rows = read();
    for (const row of rows) row.cells.sort(ORDERS[order]);
    const now = performance.now();
    for (const cell of rows.flatMap((row) => row.cells)) {
      const key = `${cell.layer}:${cell.expert}`, holders = cell.holders.join();
      if (held.has(key) && held.get(key) !== holders) fresh.set(key, now);
      held.set(key, holders);
    }
    lines = isotherms(rows.map((row) => row.cells.map((cell) => place(cell.ratio))), LINES.map(place));
    moving = now;
    drawGroups();
    tell();
    ask();
  }

  const ask = () => (frame ||= requestAnimationFrame(draw));

  function drawGroups() {
    const names = [...new Set(rows.flatMap((row) => row.cells.flatMap((cell) => cell.holders)))].sort(byName);
    const wanted = names.join();
    if (groups.names === wanted) return;
    groups.names = wanted;
    if (!names.includes(group)) group = "";
    replace(groups, names.length > 24 ? select(names) : names.map((name) =>
      h("button", { type: "button", class: "chip", "aria-pressed": String(name === group), onclick: () => pick(name === group ? "" : name) }, name)));
  }

  function select(names) {
    const node = h("select", { "aria-label": "Show what one group holds" }, h("option", { value: "" }, "Every group"), names.map((name) => h("option", { value: name }, name)));
    node.addEventListener("change", () => pick(node.value));
    return node;
  }

  function pick(name) {
    group = name;
    for (const chip of groups.querySelectorAll("button")) chip.setAttribute("aria-pressed", String(chip.textContent === name));
    ask();
  }

  function tell() {
    const cell = chosen(), count = rows.reduce((sum, row) => sum + row.cells.length, 0);
    canvas.setAttribute("aria-label", `Heat of ${count} experts in ${rows.length} layers`);
    act.disabled = !cell;
    if (!cell) return say(said, rows.length ? "" : "Nothing is known of the experts yet.");
    const hottest = looked ? "" : "Hottest: ";
    say(said, `${hottest}layer ${cell.layer}, expert ${cell.expert}: ${figure(cell.ratio)} × the layer’s mean, ${figure(cell.rate)} rows/s, on ${cell.holders.join(", ")}${cell.pinned ? " (copies set by an operator)" : ""}`);
  }

  function size() {
    const width = canvas.clientWidth, across = Math.max(1, ...rows.map((row) => row.cells.length));
    const cell = (width - GUTTER) / across;
    const tall = Math.min(64, Math.max(rows.length > 40 ? 6 : 9, Math.min(cell, 420 / Math.max(1, rows.length))));
    return { width, height: Math.max(80, Math.round(tall * Math.max(1, rows.length))), cell, tall };
  }

  function draw(now) {
    frame = 0;
    if (!canvas.isConnected) return;
    const { width, height, cell, tall } = size();
    const scale = window.devicePixelRatio || 1;
    canvas.style.height = `${height}px`;
    if (canvas.width !== Math.round(width * scale) || canvas.height !== Math.round(height * scale)) {
      canvas.width = Math.round(width * scale);
      canvas.height = Math.round(height * scale);
    }
    const style = getComputedStyle(canvas), pen = canvas.getContext("2d"), ramp = rampOf(style);
    pen.setTransform(scale, 0, 0, scale, 0, 0);
    pen.clearRect(0, 0, width, height);
    const still = matchMedia("(prefers-reduced-motion: reduce)").matches || now - moving > EASE_MS;
    const gap = cell > 12 ? 1.5 : cell > 5 ? 0.5 : 0;
    let on = !still;
    rows.forEach((row, y) => row.cells.forEach((one, x) => {
      const key = `${one.layer}:${one.expert}`, aim = place(one.ratio), at = shown.get(key) ?? aim;
      const value = still ? aim : at + (aim - at) * 0.16;
      shown.set(key, value);
      pen.globalAlpha = group && !one.holders.includes(group) ? 0.16 : 1;
      pen.fillStyle = ramp(value);
      // On whole pixels, or seams would show between cells that touch.
      const left = Math.round((GUTTER + x * cell) * scale) / scale, right = Math.round((GUTTER + (x + 1) * cell) * scale) / scale;
      pen.fillRect(left, y * tall, right - left - gap, tall - gap);
      if (cell >= 26 && tall >= 20) drawPlaces(pen, one, GUTTER + x * cell, y * tall, cell - gap, tall - gap, value, style, ramp);
      const since = now - (fresh.get(key) ?? -1e9);
      if (since < 2500) {
        on = true;
        pen.globalAlpha = 1 - since / 2500;
        pen.strokeStyle = style.getPropertyValue("--ink");
        pen.lineWidth = 2;
        pen.strokeRect(GUTTER + x * cell + 1, y * tall + 1, cell - gap - 2, tall - gap - 2);
      }
    }));
    pen.globalAlpha = 1;
    if (order === "heat" || cell > 11) drawLines(pen, style, cell, tall); // else there are too many to tell apart
    drawMargin(pen, style, tall, height);
    drawCursor(pen, style, cell, tall, gap);
    if (on) ask();
  }

  // How many copies there are, and where.
  function drawPlaces(pen, one, x, y, wide, high, value, style, ramp) {
    pen.fillStyle = ramp.isLight(value) ? "#101820" : "#ffffff";
    pen.font = `500 10.5px ${style.fontFamily}`;
    pen.textBaseline = "bottom";
    const names = one.holders.map((name) => name.replace(/^expert-/, ""));
    let text = names.join(" ");
    if (pen.measureText(text).width > wide - 8) text = `×${names.length}`;
    pen.textAlign = "right";
    pen.fillText(text, x + wide - 4, y + high - 3);
    if (one.pinned) {
      pen.beginPath();
      pen.arc(x + 6, y + high - 7, 2, 0, 7);
      pen.fill();
    }
  }

  function drawLines(pen, style, cell, tall) {
    pen.save();
    pen.translate(GUTTER, 0);
    lines.forEach((path, i) => {
      const scaled = new Path2D();
      scaled.addPath(path, new DOMMatrix([cell, 0, 0, tall, 0, 0]));
      pen.strokeStyle = style.getPropertyValue(LINES[i] < 1 ? "--line-cold" : "--line-hot");
      pen.lineWidth = LINES[i] === 4 ? 1.8 : 1.1;
      pen.stroke(scaled);
    });
    pen.restore();
  }

  function drawMargin(pen, style, tall, height) {
    pen.fillStyle = style.getPropertyValue("--ink-3");
    pen.font = `11px ${style.fontFamily}`;
    pen.textAlign = "right";
    pen.textBaseline = "middle";
    const every = Math.ceil(14 / tall);
    rows.forEach((row, y) => y % every === 0 && y * tall + tall / 2 < height && pen.fillText(String(row.layer), GUTTER - 9, y * tall + tall / 2));
  }

  function drawCursor(pen, style, cell, tall, gap) {
    if (!chosen() || (!looked && document.activeElement !== canvas)) return;
    pen.strokeStyle = style.getPropertyValue("--ink");
    pen.lineWidth = 2;
    pen.strokeRect(GUTTER + cursor.column * cell - 0.5, cursor.row * tall - 0.5, cell - gap + 1, tall - gap + 1);
  }

  function move(row, column) {
    looked = true;
    const last = Math.max(0, rows.length - 1);
    cursor.row = Math.min(last, Math.max(0, row));
    cursor.column = Math.min(Math.max(0, (rows[cursor.row]?.cells.length ?? 1) - 1), Math.max(0, column));
    tell();
    ask();
  }

  function under(event) {
    const box = canvas.getBoundingClientRect(), { cell, tall } = size();
    return [Math.floor((event.clientY - box.top) / tall), Math.floor((event.clientX - box.left - GUTTER) / cell)];
  }
  canvas.addEventListener("pointermove", (event) => event.pointerType === "mouse" && move(...under(event)));
  canvas.addEventListener("click", (event) => {
    const before = chosen();
    move(...under(event));
    if (choose && chosen() && (event.pointerType !== "touch" || before === chosen())) choose(chosen().layer, chosen().expert);
  });
  canvas.addEventListener("keydown", (event) => {
    const step = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1], Home: [0, -1e6], End: [0, 1e6] }[event.key];
    if (step) move(cursor.row + step[0], cursor.column + step[1]);
    else if ((event.key === "Enter" || event.key === " ") && choose && chosen()) choose(chosen().layer, chosen().expert);
    else return;
    event.preventDefault();
  });
  canvas.addEventListener("focus", ask);
  canvas.addEventListener("blur", ask);
  new ResizeObserver(ask).observe(canvas);
  window.addEventListener("isotherm-theme", ask);
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", ask);

  node.update = () => {
    const key = feed.last;
    if (node.told === key) return ask();
    node.told = key;
    take();
    if (!looked && rows.length) {
      let best = -1;
      rows.forEach((row, y) => row.cells.forEach((cell, x) => cell.ratio > best && ((best = cell.ratio), (cursor = { row: y, column: x }))));
      tell();
    }
    canvas.dataset.hot = rows.map((row) => Math.max(...row.cells.map((cell) => cell.ratio)).toFixed(2)).join(" ");
  };
  return node;
}

// Colours between those that the style names, cold to hot.
function rampOf(style) {
  const stops = [0, 1, 2, 3, 4].map((i) => {
    const value = style.getPropertyValue(`--heat-${i}`).trim();
    return [1, 3, 5].map((at) => Number.parseInt(value.slice(at, at + 2), 16));
  });
  const colour = (value) => {
    const at = Math.min(3.9999, Math.max(0, value * 4)), i = Math.floor(at), t = at - i;
    return stops[i].map((from, c) => Math.round(from + (stops[i + 1][c] - from) * t));
  };
  const ramp = (value) => `rgb(${colour(value).join(" ")})`;
  // Whether black stands out from it better than white does (WCAG's relative luminance).
  ramp.isLight = (value) => {
    const [r, g, b] = colour(value).map((part) => (part / 255) ** 2.2);
    return 0.2126 * r + 0.7152 * g + 0.0722 * b > 0.18;
  };
  return ramp;
}

function legend() {
  const ticks = [["⅛", 1 / 8], ["¼", 1 / 4], ["½", 1 / 2], ["mean", 1], ["2 ×", 2], ["4 ×", 4], ["8 ×", 8]];
  return h("div", { class: "legend", "aria-hidden": "true" }, h("div", { class: "ramp" }),
    h("div", { class: "ticks" }, ticks.map(([words, ratio]) => h("span", { style: { "--at": `${place(ratio) * 100}%` } }, words))));
}

export { read as experts };
