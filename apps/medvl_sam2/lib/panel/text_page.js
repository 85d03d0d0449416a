// Questions about one image and its report, each sentence with the structures it rests on; corrected texts are stored.

import * as api from "./api.js";
import { author, clientId } from "./annotator.js";
import { button, clock, form, make, replace, spoken } from "./dom.js";
import * as labelmap from "./labelmap.js";
import { readNrrd } from "./nrrd.js";
import { jumpTo } from "./viewer.js";

const KIND = "text";

/** What a stored text keeps of the draft it was made from. */
const origin = (reply, evidence) => ({
  model_version: reply.model_version,
  structures: [...new Set(evidence.map((item) => item.name))],
});

export class TextPage {
  /**
   * `panel` has `stillShows(image)` and its like, `work`, `ask()` and `askAuthor()`; `changed()` is called when a text may
   * have become unsaved or saved.
   */
  constructor(panel, image, changed) {
    Object.assign(this, { panel, image, changed });
    this.answered = null;
    this.drafted = null;
    this.known = { answer: "", report: "" }; // as they were made or stored: what differs from it was typed
    this.question = make("input", {
      id: "medvl-question",
      placeholder: "Is there a lesion in the liver?",
      maxlength: 2000,
    });
    this.askButton = make("button", { type: "submit", class: "primary" }, "Ask");
    const typed = () => this.refresh();
    this.answer = make("textarea", { id: "medvl-answer", rows: 2, maxlength: 10000, oninput: typed });
    this.answerEvidence = make("div", { class: "evidence" });
    this.storeAnswer = button("Store the answer", () => this.store("answer"));
    this.answerBox = make(
      "div",
      { hidden: true },
      make("label", { for: "medvl-answer" }, "Answer (correct it where it is wrong)"),
      this.answer,
      this.answerEvidence,
      this.storeAnswer,
    );
    this.draftButton = button("Draft a report", () => this.draftReport(), { class: "primary" });
    this.report = make("textarea", { id: "medvl-report", rows: 8, maxlength: 10000, oninput: typed });
    this.sentences = make("ul", { class: "sentences", "aria-label": "Sentences and what they rest on" });
    this.storeReport = button("Store the report", () => this.store("report"));
    this.hide = button("Hide the evidence", () => this.hideEvidence(), { hidden: true });
    this.stored = make("ol", { class: "versions", "aria-label": "Stored texts of this case" });
    const asking = form(() => this.ask(), this.question, this.askButton);
    this.element = make(
      "div",
      {},
      make("label", { for: "medvl-question" }, "Question"),
      asking,
      this.answerBox,
      make("h3", {}, "Report"),
      make("div", { class: "row" }, this.draftButton, this.hide),
      make("label", { for: "medvl-report" }, "Text (correct it before you store it)"),
      this.report,
      this.sentences,
      this.storeReport,
      make("h3", {}, "Stored texts"),
      this.stored,
    );
    this.refresh();
  }

  refresh() {
    const busy = this.panel.work.busy(KIND);
    for (const control of [this.askButton, this.draftButton]) control.disabled = busy;
    this.storeAnswer.disabled = busy;
    this.storeReport.disabled = busy || !this.report.value.trim();
    this.changed();
  }

  /** The texts that were typed or corrected and not stored: of `answer` and `report`. */
  unsaved() {
    const typed = (kind) => this[kind].value.trim();
    return Object.keys(this.known).filter((kind) => typed(kind) && typed(kind) !== this.known[kind]);
  }

  async ask() {
    const [image, question] = [this.image, this.question.value.trim()];
    if (!question) return this.panel.work.complain("Type a question first");
    if (!(await this.#mayReplace("answer"))) return;
    await this.panel.work.run(KIND, "Asking", async (signal) => {
      const reply = await api.askQuestion({ image: image.series, question, client_id: clientId() }, { signal });
      signal.throwIfAborted();
      this.answered = { question, draft: reply.answer, ...origin(reply, reply.evidence) };
      this.#put("answer", reply.answer);
      this.answerBox.hidden = false;
      replace(
        this.answerEvidence,
        ...this.#evidence(reply.evidence),
        reply.notice && make("p", { class: "hint" }, reply.notice),
      );
      this.panel.work.say("Answered");
    });
  }

  /** Resolves to whether a new text may take the place of the answer or the report. */
  async #mayReplace(kind) {
    if (!this.unsaved().includes(kind)) return true;
    const answers = ["Replace it", "Keep it"];
    return (await this.panel.ask(`Replace the ${kind}`, `The ${kind} was changed and not stored.`, answers)) === answers[0];
  }

  async draftReport() {
    const { image } = this;
    if (!(await this.#mayReplace("report"))) return;
    await this.panel.work.run(KIND, "Drafting", async (signal) => {
      const reply = await api.draftReport({ image: image.series, client_id: clientId() }, { signal });
      signal.throwIfAborted();
      this.drafted = {
        question: "",
        draft: reply.text,
        ...origin(
          reply,
          reply.sentences.flatMap((item) => item.evidence),
        ),
      };
      this.#put("report", reply.text);
      const lines = reply.sentences.map((sentence) =>
        make("li", {}, `${sentence.text} `, ...this.#evidence(sentence.evidence)),
      );
      replace(this.sentences, ...lines, reply.notice && make("li", { class: "hint" }, reply.notice));
      this.panel.work.say("Drafted");
    });
  }

  #put(kind, text) {
    this[kind].value = text;
    this.known[kind] = text.trim();
  }

  /** A chip for every structure a text rests on; a click shows its mask beside the label map and goes there. */
  #evidence(evidence) {
    return evidence.map((item) =>
      button(spoken(item.name), (event) => this.#toggleEvidence(item, event.currentTarget), {
        class: "evidence-chip",
        "aria-pressed": "false",
        disabled: !item.voxels,
        "data-evidence": item.name,
        title: item.voxels ? item.why : `${item.why}; the image map does not show it`,
      }),
    );
  }

  async #toggleEvidence(item, chip) {
    if (chip.getAttribute("aria-pressed") === "true") return this.hideEvidence();
    const shown = await this.showEvidence(item);
    if (shown) this.#press(chip);
  }

  /** Mark the one chip whose mask is shown, or none. */
  #press(shown) {
    for (const chip of this.element.querySelectorAll(".evidence-chip"))
      chip.setAttribute("aria-pressed", String(chip === shown));
  }

  async showEvidence(item) {
    if (!this.panel.stillShows(this.image)) return null;
    const image = this.panel.image(); // its volume may be another than when this page was made
    return this.panel.work.run("evidence", `Showing ${spoken(item.name)}`, async (signal) => {
      const mask = await readNrrd(await api.evidenceMask(image.series, item.name, { signal }));
      signal.throwIfAborted();
      labelmap.checkGrid(image, mask);
      await labelmap.showEvidence(image, mask.voxels, item.name);
      this.hide.hidden = false;
      const voxel = item.centroid_voxel ?? labelmap.centre(mask.voxels, image.volume.dimensions, (value) => value > 0);
      if (voxel) jumpTo(image, voxel.map(Math.round));
      this.panel.work.say(`${spoken(item.name)}: ${item.why ?? ""}`);
      return true;
    });
  }

  hideEvidence() {
    labelmap.hideEvidence();
    this.#press(null);
    this.hide.hidden = true;
  }

  /** Resolves to the stored version; null where it could not be stored, also where only its DICOM SR failed. */
  async store(kind) {
    const { image } = this;
    if (!author()) return this.panel.askAuthor();
    const report = kind === "report";
    const text = this[kind].value.trim();
    if (!text) return this.panel.work.complain("There is no text to store");
    return this.panel.work.run(KIND, report ? "Storing the report" : "Storing the answer", async (signal) => {
      const body = { kind, text, author: author(), ...(report ? (this.drafted ?? {}) : this.answered) };
      const record = await api.storeText(image.series, body, { signal });
      this.known[kind] = text;
      await this.load(signal);
      if (record.sr_error)
        throw new Error(`stored as version ${record.version}, but not as DICOM SR: ${record.sr_error}`);
      const waiting = record.sr?.waiting ? ` (waits: ${record.sr.waiting})` : "";
      this.panel.work.say(
        `Stored as version ${record.version}${this.panel.ofOther(image)}${record.sr ? ` and as DICOM SR beside the study${waiting}` : ""}`,
      );
      return record;
    }, { keeps: true });
  }

  /** Read the stored texts. */
  async load(signal) {
    let versions;
    try {
      ({ versions } = await api.texts(this.image.series, { signal }));
    } catch (error) {
      if (error.status !== 404) throw error;
      replace(this.stored, make("li", { class: "hint" }, `No stored texts: ${error.message}`));
      return;
    }
    replace(
      this.stored,
      ...[...versions]
        .reverse()
        .map((version) =>
          make(
            "li",
            { "data-text": version.version },
            make("div", {}, make("strong", {}, `${version.kind} ${version.version}`), version.sr ? " DICOM SR" : ""),
            make("div", { class: "hint" }, `${version.author || "unknown"}, ${clock(version.time)}`),
            version.question ? make("div", { class: "hint" }, version.question) : null,
            make("div", { class: "note" }, version.text),
            version.kind === "report" ? button("Edit", () => this.edit(version)) : null,
          ),
        ),
    );
    if (!versions.length) replace(this.stored, make("li", { class: "hint" }, "none yet"));
  }

  async edit(version) {
    if (!(await this.#mayReplace("report"))) return;
    this.#put("report", version.text);
    this.drafted = { question: "", draft: version.draft, model_version: version.model_version };
    replace(this.sentences);
    this.refresh();
  }
}
