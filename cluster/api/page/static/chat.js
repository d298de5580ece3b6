// The chat: conversations, the thread, and what is typed.

import { hasKey } from "./api.js";
import { asCurl, asPython, chatBody, models, SettingError } from "./asked.js";
import { begin, conversations, forget, forgetAll, keep, settings } from "./conversations.js";
import { settingsPanel } from "./chat_settings.js";
import { button, copyText, dialog, h, icon, iconButton, replace, rings, say, segmented, toast } from "./dom.js";
import { codeBlock, show } from "./markdown.js";
import { ago, figure, seconds } from "./numbers.js";
import { streamReply } from "./reply.js";

const TRIES = ["What is 3 + 4?", "Count from 1 to 9.", "Tell me a short story."];

export function chatView() {
  let talk = conversations()[0] ?? begin();
  let running = null; // the AbortController of the reply that comes
  let shownTo = 0; // messages on screen

  const thread = h("div", { class: "thread", role: "log", "aria-label": "Conversation", "aria-live": "off", tabindex: "0" });
  const status = h("p", { class: "unseen", role: "status", "aria-live": "polite" });
  const input = h("textarea", { rows: 1, placeholder: "Ask something", "aria-label": "Message", enterkeyhint: "send" });
  const go = h("button", { type: "submit", class: "send", "aria-label": "Send" }, icon("send"));
  const form = h("form", { class: "composer" }, input, go);
  const past = h("ul", { class: "past" });
  const side = h("aside", { class: "talks", "aria-label": "Conversations" },
    button("New chat", { class: "wide-button", onclick: () => open(begin()) }, "plus"), past,
    button("Forget all", { class: "quiet", onclick: askForget }, "bin"));
  const panel = settingsPanel(() => toggle("with-settings", false), () => {});
  const title = h("h1", { class: "talk-title" });
  const bar = h("header", { class: "talk-bar" },
    iconButton("Conversations", "list", { class: "icon-button only-narrow", onclick: () => toggle("with-talks") }), title,
    button("As code", { class: "quiet", onclick: showCode }, "code"),
    button("Settings", { class: "quiet", onclick: () => toggle("with-settings") }, "sliders"));
  const node = h("div", { class: "chat" }, side, h("section", { class: "talk" }, bar, thread, form, status), panel);
  const toggle = (name, on) => node.classList.toggle(name, on);

  form.addEventListener("submit", (event) => {
    event.preventDefault();
    if (running) running.abort();
    else send(input.value);
  });
  input.addEventListener("keydown", (event) => {
    if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
      event.preventDefault();
      form.requestSubmit();
    }
  });
  input.addEventListener("input", fit);

  function fit() {
    input.style.height = "auto";
    input.style.height = `${Math.min(input.scrollHeight, 240)}px`;
  }

  function open(conversation) {
    running?.abort();
    talk = conversation;
    toggle("with-talks", false);
    draw();
    input.focus();
  }

  function draw() {
    say(title, talk.title || "New chat");
    shownTo = 0;
    replace(thread);
    if (!talk.messages.length) thread.append(welcome());
    else drawRest();
    drawPast();
    thread.scrollTop = thread.scrollHeight;
  }

  function drawRest() {
    if (!shownTo) replace(thread);
    for (; shownTo < talk.messages.length; shownTo++) thread.append(messageNode(talk.messages[shownTo], shownTo));
  }

  function drawPast() {
    replace(past, conversations().map((one) =>
      h("li", { class: one.id === talk.id ? "chosen" : "" },
        h("button", { type: "button", class: "past-open", "aria-current": one.id === talk.id ? "true" : undefined, onclick: () => open(one) },
          h("span", { class: "past-title" }, one.title), h("span", { class: "past-time" }, ago(one.changed / 1000))),
        iconButton(`Forget ${one.title}`, "bin", { onclick: () => (forget(one), one.id === talk.id ? open(begin()) : drawPast()) }))));
  }

  function welcome() {
    const tries = TRIES.map((text) => h("button", { type: "button", class: "try", onclick: () => send(text) }, text));
    const name = h("span", {}, settings.model || "the model");
    models().then((found) => say(name, settings.model || found[0].id), () => {});
    return h("div", { class: "welcome" }, rings(), h("h2", {}, "Talk to ", name),
      h("p", {}, "What you write stays in this browser and goes to this server alone."), h("div", { class: "tries" }, tries));
  }

  async function send(text) {
    if (!text.trim() || running) return;
    input.value = "";
    fit();
    talk.messages.push({ role: "user", content: text });
    await reply();
  }

  async function reply() {
    let body;
    try {
      const found = await models();
      const model = found.some((one) => one.id === settings.model) ? settings.model : found[0].id;
      body = chatBody(model, talk.messages, settings);
    } catch (error) {
      keep(talk);
      draw();
      if (error instanceof SettingError) {
        toggle("with-settings", true);
        panel.blame(error.field);
      }
      return toast(error.message, "bad");
    }
    const here = talk;
    const message = { role: "assistant", content: "", model: body.model };
    here.messages.push(message);
    keep(here);
    drawPast();
    say(title, here.title);
    drawRest();
    const stop = (running = new AbortController());
    setRunning(true);
    let drawn = 0;
    const grown = () => (drawn ||= requestAnimationFrame(() => ((drawn = 0), here === talk && update(message))));
    follow(true);
    await streamReply(body, message, grown, stop.signal);
    cancelAnimationFrame(drawn); // it would draw a reply that is still coming
    if (running === stop) running = null;
    setRunning(false);
    keep(here);
    if (here === talk) update(message, true);
    say(status, message.error ? `The reply failed: ${message.error}` : "The reply is complete.");
  }

  function setRunning(on) {
    replace(go, icon(on ? "stop" : "send"));
    go.setAttribute("aria-label", on ? "Stop" : "Send");
    go.classList.toggle("stop", on);
    thread.setAttribute("aria-busy", String(on));
  }

  const follow = (always) => {
    if (always || thread.scrollHeight - thread.scrollTop - thread.clientHeight < 160) thread.scrollTop = thread.scrollHeight;
  };

  function update(message, ended) {
    const at = talk.messages.indexOf(message);
    const old = thread.children[at];
    if (!old) return;
    if (ended) old.replaceWith(messageNode(message, at));
    else fillReply(old, message, true);
    follow();
  }

  // --- one message ---

  function messageNode(message, at) {
    if (message.role === "assistant") {
      const article = h("article", { class: "said model" }, h("h2", { class: "unseen" }, "The model"));
      fillReply(article, message, running !== null && at === talk.messages.length - 1 && !message.finish && !message.error);
      return article;
    }
    const tool = message.role === "tool";
    const words = h("div", { class: "words" }, message.content);
    const edit = !tool && iconButton("Edit and ask again", "edit", { onclick: () => again(at, message.content) });
    return h("article", { class: `said ${tool ? "tool" : "user"}` }, h("h2", { class: tool ? "small" : "unseen" }, tool ? `Result of ${message.name}` : "You"), words, edit);
  }

  function again(at, text) {
    if (running) return;
    talk.messages.length = at;
    draw();
    input.value = text;
    fit();
    input.focus();
  }

  function fillReply(article, message, coming) {
    const parts = (article.parts ??= {});
    if (message.reasoning) {
      if (!parts.thought) {
        parts.thoughtText = h("div", { class: "markdown" });
        parts.thoughtName = h("summary", {});
        article.append((parts.thought = h("details", { class: "thought" }, parts.thoughtName, parts.thoughtText)));
      }
      say(parts.thoughtName, coming && !message.content ? "Thinking…" : "Thought");
      show(parts.thoughtText, message.reasoning);
    }
    if (!parts.text) article.append((parts.text = h("div", { class: "markdown" })));
    show(parts.text, message.content);
    parts.text.classList.toggle("coming", coming);
    parts.calls?.remove();
    if (message.tool_calls?.length) article.append((parts.calls = callsNode(message, coming)));
    parts.error?.remove();
    if (message.error) article.append((parts.error = h("p", { class: "failure", role: "alert" }, message.error)));
    parts.foot?.remove();
    if (!coming) article.append((parts.foot = foot(message)));
  }

  function callsNode(message, coming) {
    const results = message.tool_calls.map(() => h("textarea", { rows: 2, class: "mono", placeholder: "Its result", "aria-label": "Result of the call" }));
    const last = !coming && talk.messages.at(-1) === message;
    const answer = () => {
      message.tool_calls.forEach((call, i) =>
        talk.messages.push({ role: "tool", tool_call_id: call.id, name: call.name, content: results[i].value }));
      drawRest();
      message.tool_calls.length && update(message, true);
      reply();
    };
    return h("div", { class: "calls" },
      message.tool_calls.map((call, i) =>
        h("section", { class: "call" }, h("h3", {}, icon("tool"), h("code", {}, call.name || "…")), codeBlock(pretty(call.arguments), "arguments"), last && results[i])),
      last && button("Give the results", { class: "primary", onclick: answer }));
  }

  function foot(message) {
    const time = message.timing ?? {};
    const facts = [
      message.finish === "stopped" && "stopped",
      message.finish === "length" && "cut at its most tokens",
      message.usage && `${figure(message.usage.output)} tokens`,
      time.rate !== undefined && `${figure(time.rate)} tokens/s`,
      time.first !== undefined && `first after ${seconds(time.first)}`,
    ].filter(Boolean);
    const last = () => talk.messages.at(-1) === message;
    return h("footer", {}, h("span", { class: "facts" }, facts.join(" · ")),
      message.content && iconButton("Copy the reply", "copy", { onclick: () => copyText(message.content) }),
      last() && iconButton("Try again", "retry", { onclick: () => !running && last() && (talk.messages.pop(), draw(), reply()) }));
  }

  // --- dialogs ---

  async function showCode() {
    try {
      const found = await models();
      const messages = talk.messages.filter((one, i) => !(one.role === "assistant" && i === talk.messages.length - 1));
      const body = chatBody(settings.model || found[0].id, messages.length ? messages : [{ role: "user", content: input.value || "Hello" }], settings);
      const place = h("div", {});
      const fill = (kind) => replace(place, kind === "curl" ? codeBlock(asCurl(body, hasKey()), "shell") : codeBlock(asPython(body, hasKey()), "python"));
      const choose = segmented("Language", [["curl", "curl"], ["python", "Python"]], "curl", fill);
      fill("curl");
      dialog("This chat as code", choose, place).classList.add("broad");
    } catch (error) {
      toast(error.message, "bad");
    }
  }

  function askForget() {
    const sure = button("Forget them", { class: "danger", onclick: () => (forgetAll(), box.close(), open(begin())) });
    const box = dialog("Forget every conversation?", h("p", {}, "They are kept in this browser alone, and cannot be brought back."), h("footer", {}, sure));
  }

  draw();
  return { node, title: "Chat", shown: () => input.focus({ preventScroll: true }) };
}

function pretty(text) {
  try {
    return JSON.stringify(JSON.parse(text), null, 2);
  } catch {
    return text;
  }
}
