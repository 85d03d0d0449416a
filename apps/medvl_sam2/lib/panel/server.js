// The tab "Server": what it serves, what it does at the moment, and its cases.

import * as api from "./api.js";
import { button, counted, make, replace } from "./dom.js";

const POLL_MS = 4000;

export class Server {
  /** `panel` has `info()` and `mayLeave(what)`. */
  constructor(panel) {
    this.panel = panel;
    this.facts = make("dl", { class: "facts" });
    this.caseList = make("ul", { class: "cases", "aria-label": "Cases of the server" });
    this.element = make("div", {}, this.facts, make("h3", {}, "Cases"), this.caseList);
  }

  /** Ask while the tab is open. */
  open() {
    this.cases();
    this.#poll();
  }

  close() {
    clearTimeout(this.timer);
  }

  async #poll() {
    clearTimeout(this.timer);
    const info = this.panel.info() ?? {};
    const facts = [["Application", `${info.name ?? "?"} ${info.version ?? ""}`]];
    try {
      facts.push(...jobFacts(await api.jobs()));
    } catch (error) {
      facts.push(["Jobs", error.status === 404 ? "this server does not tell" : error.message]);
    }
    replace(this.facts, ...facts.flatMap(([name, value]) => [make("dt", {}, name), make("dd", {}, value)]));
    if (this.element.isConnected && !this.element.closest("[hidden]")) this.timer = setTimeout(() => this.#poll(), POLL_MS);
  }

  async cases() {
    let list;
    try {
      const reply = await api.cases();
      list = Array.isArray(reply) ? reply : reply.cases;
    } catch (error) {
      replace(this.caseList, make("li", { class: "hint" }, error.status === 404 ? "This server does not list its cases" : error.message));
      return;
    }
    replace(this.caseList, ...list.map((item) => {
      const study = item.StudyInstanceUID ?? item.study;
      const versions = item.versions ? counted(item.versions, "version") : "no label";
      const name = [item.PatientID, item.SeriesDescription].filter(Boolean).join(", ") || item.image;
      const go = () => this.panel.goToStudy(study);
      return make("li", { "data-image": item.image }, study ? button(name, go, { class: "link" }) : name, make("span", { class: "count" }, versions));
    }));
    if (!list.length) replace(this.caseList, make("li", { class: "hint" }, "none"));
  }
}

function jobFacts(jobs) {
  const name = (job) => `${job.kind ?? job.model} (${Math.round(job.seconds ?? 0)} s)`;
  const training = jobs.training ?? {};
  const state = typeof training === "string" ? training : (training.state ?? training.status ?? "not running");
  const progress = typeof training.progress === "number" ? `, ${Math.round(100 * training.progress)} %` : "";
  return [
    ["Model", String(jobs.model?.version ?? jobs.served_version ?? jobs.model_version ?? "?")],
    ["Running", (jobs.running ?? []).map(name).join(", ") || "nothing"],
    ["Waiting", String((jobs.waiting ?? []).length)],
    ["Training", `${state}${progress}`],
  ];
}

