// The server's book of requests (GET /admin/requests), read again and again while somebody looks.

import { json } from "./api.js";

const PERIOD = 1500; // milliseconds

class Book {
  constructor() {
    this.running = [];
    this.recent = [];
    this.trouble = "";
    this.known = false;
    this.listeners = new Set();
    this.timer = 0;
  }

  records() {
    return [...this.running, ...this.recent];
  }

  listen(callback) {
    this.listeners.add(callback);
    callback();
    if (this.listeners.size === 1) this.read();
    return () => {
      this.listeners.delete(callback);
      if (!this.listeners.size) clearTimeout(this.timer);
    };
  }

  async read() {
    clearTimeout(this.timer);
    try {
      const found = await json("/admin/requests", { quiet: true });
      this.running = found.running ?? [];
      this.recent = found.recent ?? [];
      this.trouble = "";
      this.known = true;
    } catch (error) {
      this.trouble = error.status === 404 ? "This server keeps no book of its requests." : error.message;
      this.known &&= error.status !== 404;
    }
    for (const callback of this.listeners) callback();
    if (this.listeners.size) this.timer = setTimeout(() => this.read(), document.hidden ? PERIOD * 10 : PERIOD);
  }
}

export const requestBook = new Book();
