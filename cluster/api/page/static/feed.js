// What the server tells of the cluster (GET /admin/events), kept up to date: named values, as the stream has them.

import { ApiError, events, request } from "./api.js";

const FIRST_PAUSE = 500, LONGEST_PAUSE = 10_000; // milliseconds

class Feed {
  constructor() {
    this.values = new Map();
    this.trouble = ""; // why nothing new comes; "" while it does
    this.known = false; // whether there was a first part
    this.last = "";
    this.listeners = new Set();
    this.running = null;
    this.wake = () => {};
  }

  // Calls back at once and after every change, until what it gives is called.
  listen(callback) {
    this.listeners.add(callback);
    this.running ??= this.run();
    callback();
    return () => this.listeners.delete(callback);
  }

  get(name) {
    return this.values.get(name);
  }

  // The values whose names begin so.
  all(prefix) {
    const found = [];
    for (const [name, value] of this.values) if (name.startsWith(prefix)) found.push(value);
    return found;
  }

  tell() {
    for (const callback of this.listeners) callback();
  }

  // At once, rather than after the pause: there is another key, or the page is seen again.
  hurry() {
    this.wake();
  }

  async run() {
    let pause = FIRST_PAUSE;
    for (;;) {
      try {
        const headers = this.last ? { "last-event-id": this.last } : {};
        const response = await request("/admin/events", { headers, quiet: this.refused });
        this.refused = false;
        for await (const event of events(response)) {
          pause = FIRST_PAUSE;
          this.take(event);
        }
        this.trouble = "The server has ended its event stream; asking again.";
      } catch (error) {
        this.trouble = error instanceof ApiError ? error.message : String(error);
        this.refused = error.status === 401 || error.status === 403;
      }
      this.tell();
      await new Promise((resolve) => {
        this.wake = resolve;
        setTimeout(resolve, pause);
      });
      pause = Math.min(pause * 2, LONGEST_PAUSE);
    }
  }

  take(event) {
    const part = JSON.parse(event.data);
    if (event.event === "error") throw new ApiError(0, part.error?.message ?? "the event stream broke off");
    if (event.event === "snapshot") this.values.clear();
    for (const name of part.gone ?? []) this.values.delete(name);
    for (const [name, value] of Object.entries(part.set ?? {})) this.values.set(name, value);
    this.last = event.id ?? "";
    this.trouble = "";
    this.known = true;
    this.tell();
  }
}

export const feed = new Feed();
window.addEventListener("isotherm-key", () => {
  feed.refused = false;
  feed.hurry();
});
