// What runs at the moment: one line with the queue position, errors with their reason, and a way to stop waiting.

import * as api from "./api.js";
import { clientId } from "./annotator.js";
import { button, make, replace } from "./dom.js";

const POLL_MS = 1000;

/** The last line of the panel. Jobs of different kinds run side by side; two of one kind do not. */
export class Work {
  constructor() {
    this.running = new Map();
    this.status = make("div", { class: "status", role: "status", "aria-live": "polite" });
    this.alert = make("div", { class: "alert", role: "alert" });
    this.element = make("div", { class: "work" }, this.alert, this.status);
    this.listeners = [];
  }

  onChange(listener) {
    this.listeners.push(listener);
  }

  busy(kind) {
    return this.running.has(kind);
  }

  /**
   * Run `action(signal)` and show how it goes; returns what it returns, or null after an error or a stop.
   * A job of a kind that runs already is refused: the caller disables its buttons meanwhile.
   * `keeps`: it stores something, so it goes on when another image comes on screen.
   */
  async run(kind, title, action, { keeps = false } = {}) {
    if (this.running.has(kind)) return null;
    const job = { title, started: Date.now(), abort: new AbortController(), place: "", keeps };
    this.running.set(kind, job);
    this.said = null; // of what ran before
    this.complain(null);
    this.show();
    try {
      return await action(job.abort.signal);
    } catch (error) {
      if (error.name !== "AbortError") this.complain(`${title}: ${error.message}`);
      return null;
    } finally {
      if (this.running.get(kind) === job) this.running.delete(kind);
      this.show();
    }
  }

  /** `more`: what stands after the text, a button. */
  say(text, ...more) {
    this.said = [text, ...more];
    this.show();
  }

  complain(text) {
    if (!text) replace(this.alert);
    else
      replace(
        this.alert,
        make("span", {}, text),
        button("×", () => this.complain(null), { "aria-label": "Dismiss the message" }),
      );
  }

  show() {
    const lines = [...this.running.entries()].map(([kind, job]) => {
      const seconds = Math.round((Date.now() - job.started) / 1000);
      const text = `${job.title}… ${job.place}${seconds ? ` ${seconds}\u00a0s` : ""}`;
      const stop = button("Stop waiting", () => this.stop(kind), {
        title: "The server finishes it; its result is not used",
      });
      return make(
        "div",
        { class: "job" },
        make("span", { class: "spinner", "aria-hidden": "true" }),
        make("span", {}, text),
        stop,
      );
    });
    replace(this.status, ...(lines.length ? lines : [make("span", {}, ...(this.said ?? ["Ready"]))]));
    for (const listener of this.listeners) listener();
    this.poll();
  }

  stop(kind) {
    this.running.get(kind)?.abort.abort();
    this.said = ["No longer waiting; what the server still computes is not used"];
  }

  /** Give up what only shows something, for its image is no longer on screen: what replies late is not used. */
  leaveImage() {
    for (const [kind, job] of this.running) {
      if (job.keeps) continue;
      job.abort.abort();
      this.running.delete(kind);
    }
    this.said = null; // it was of that image, and so is a button in it
    this.show();
  }

  /** While something runs, ask once a second for our place in the queue; a server that does not tell is no error. */
  poll() {
    if (this.timer || !this.running.size) return;
    this.timer = setTimeout(async () => {
      const place = await api.jobs().then(placeOf, () => "");
      this.timer = null;
      for (const job of this.running.values()) job.place = place;
      if (this.running.size) this.show();
    }, POLL_MS);
  }
}

function placeOf(jobs) {
  const ours = (jobs.inference ?? []).find((request) => request.client === clientId());
  return ours?.position ? `number ${ours.position} in the queue,` : "";
}
