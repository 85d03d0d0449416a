// The tab "Server": what it serves, what it does at the moment, and its cases.

import * as api from "./api.js";
import { button, clock, counted, make, replace } from "./dom.js";

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
  entered() {
    this.cases();
    this.#poll();
  }

  left() {
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
    if (this.element.isConnected && !this.element.closest("[hidden]"))
      this.timer = setTimeout(() => this.#poll(), POLL_MS);
  }

  async cases() {
    if (!this.caseList.children.length) replace(this.caseList, make("li", { class: "hint" }, "Reading…"));
    let list;
    try {
      list = await api.cases();
    } catch (error) {
      replace(
        this.caseList,
        make("li", { class: "hint" }, error.status === 404 ? "This server does not list its cases" : error.message),
      );
      return;
    }
    replace(
      this.caseList,
      ...list.map((item) => {
        const study = item.StudyInstanceUID;
        const versions = item.versions ? counted(item.versions, "version") : item.labelled ? "labelled" : "no label";
        const series = [item.SeriesNumber, item.SeriesDescription].filter(Boolean).join(" ");
        const told = [item.PatientID, item.Modality, item.StudyDate, series];
        const name = told.filter(Boolean).join(", ") || item.image;
        const go = () => this.panel.goToStudy(study);
        return make(
          "li",
          { "data-image": item.image },
          study ? button(name, go, { class: "link" }) : name,
          make("span", { class: "count" }, versions),
        );
      }),
    );
    if (!list.length) replace(this.caseList, make("li", { class: "hint" }, "none"));
  }
}

function jobFacts(jobs) {
  const [first, ...others] = jobs.inference;
  const { training, schedule, model } = jobs;
  const progress = training?.progress ? `, epoch ${training.progress.epoch} of ${training.progress.total_epochs}` : "";
  const published = model.history
    .filter((item) => item.published)
    .map((item) => `${item.version} (${clock(item.published)})`);
  const due = schedule.every_labels ? ` of ${schedule.every_labels} until the next training` : "";
  return [
    ["Model", model.refused ? `${model.loaded ?? "none"} (version ${model.refused} cannot be loaded)` : model.served],
    ["Published", published.join(", ") || "nothing yet"],
    ["Running", first ? `${first.what} for ${Math.round(first.seconds)} s` : "nothing"],
    ["Waiting", counted(others.length, "request")],
    ["Training", training ? `${training.status.toLowerCase()}${progress}` : "not since the server's start"],
    ["New labels", `${schedule.labels_since_training}${due}`],
  ];
}
