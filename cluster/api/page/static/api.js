// Requests to the server: with the key, and with errors in the server's own words.

const KEPT = "isotherm.key";
let key = "";
try {
  key = sessionStorage.getItem(KEPT) ?? "";
} catch {
  // The browser keeps nothing: the key is in memory alone.
}
let asking = null; // the prompt that is open
let ask = () => Promise.resolve(false);

export const hasKey = () => key !== "";
export const onKeyNeeded = (prompt) => (ask = prompt);

export function setKey(value, keep) {
  key = value;
  try {
    if (keep && value) sessionStorage.setItem(KEPT, value);
    else sessionStorage.removeItem(KEPT);
  } catch {
    // As above.
  }
  window.dispatchEvent(new Event("isotherm-key"));
}

export class ApiError extends Error {
  constructor(status, message, code) {
    super(message);
    this.status = status;
    this.code = code;
  }
}

async function errorOf(response) {
  let message = `the server answered ${response.status}`;
  let code;
  try {
    const body = await response.json();
    const error = body.error ?? body;
    if (typeof error.message === "string") message = error.message;
    code = error.code;
  } catch {
    // No JSON: the status has to do.
  }
  return new ApiError(response.status, message, code);
}

// The response. Where a key is wanted, or another one, it is asked for, once; `quiet`: it is not.
export async function request(path, options = {}) {
  const { quiet, body, ...rest } = options;
  for (let attempt = 0; ; attempt++) {
    const headers = { ...rest.headers };
    if (key) headers.authorization = `Bearer ${key}`;
    if (body !== undefined) headers["content-type"] = "application/json";
    let response;
    try {
      const sent = body === undefined ? undefined : JSON.stringify(body);
      response = await fetch(path, { ...rest, headers, body: sent, cache: "no-store" });
    } catch (error) {
      if (error.name === "AbortError") throw error;
      throw new ApiError(0, "the server cannot be reached");
    }
    if (response.ok) return response;
    const error = await errorOf(response);
    if (response.status !== 401 || quiet || attempt) throw error;
    asking ??= ask(error.message).finally(() => (asking = null));
    if (!(await asking)) throw error;
  }
}

export const json = async (path, options) => (await request(path, options)).json();

// The server-sent events of a response, as {id, event, data}. Lines end as the server ends them: with a line feed.
export async function* events(response) {
  const decoder = new TextDecoder();
  const reader = response.body.getReader();
  let rest = "";
  let event = { event: "message", data: [] };
  try {
    for (;;) {
      const { done, value } = await reader.read();
      if (done) return;
      rest += decoder.decode(value, { stream: true });
      let from = 0;
      for (let end; (end = rest.indexOf("\n", from)) >= 0; from = end + 1) {
        const line = rest.slice(from, end).replace(/\r$/, "");
        if (line === "") {
          if (event.data.length) yield { ...event, data: event.data.join("\n") };
          event = { event: "message", data: [] };
        } else if (!line.startsWith(":")) {
          const colon = line.indexOf(":");
          const name = colon < 0 ? line : line.slice(0, colon);
          const text = colon < 0 ? "" : line.slice(colon + 1).replace(/^ /, "");
          if (name === "data") event.data.push(text);
          else if (name === "id" || name === "event") event[name] = text;
        }
      }
      rest = rest.slice(from);
    }
  } finally {
    reader.cancel().catch(() => {});
  }
}
