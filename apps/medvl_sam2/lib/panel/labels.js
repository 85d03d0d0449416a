// The tab "Save": versions of this case's label, saved, submitted, opened again, compared and restored.

import * as api from "./api.js";
import { author, clientId } from "./annotator.js";
import { Consensus } from "./consensus.js";
import { button, clock, counted, make, replace, spoken } from "./dom.js";
import * as labelmap from "./labelmap.js";
import { readNrrd, writeNrrd } from "./nrrd.js";
import { printOf } from "./prompts.js";
import { gridOf } from "./viewer.js";

const KIND = "label";

/** What a version that is a consensus says of it; one that was restored does not say how it was made. */
const consensusOf = ({ made_from, restored_from, source }) => ({
  versions: made_from,
  source: restored_from ? "consensus" : source,
});

export class Labels {
  /** `panel` has `image()`, `shows(image)` and its like, `work`, `segment`, `modelVersion()` and `askAuthor()`. */
  constructor(panel) {
    this.panel = panel;
    this.changes = new Map(); // by series, those with unsaved changes: `{image, edits}`
    this.edits = 0;
    this.prints = new Map(); // by series, of the masks that are in a version, or a consensus nobody edited
    this.consensusOn = new Map(); // by series, where an unedited consensus is on screen: `{versions, source}` of it
    this.list = []; // the versions of the image on screen, once they are read
    this.notes = new Map(); // by series, as typed and not stored
    this.note = make("textarea", {
      id: "medvl-note",
      rows: 2,
      maxlength: 2000,
      placeholder: "for the reviewer",
      oninput: () => this.panel.image() && this.notes.set(this.panel.image().series, this.note.value),
    });
    this.save = button("Save", () => this.store("draft"), {
      title: "A draft: a version that is not trained on; go on later",
    });
    this.submit = button("Submit", () => this.store("submitted"), {
      class: "primary",
      title: "A new version, finished: the final label, which is trained on",
    });
    this.state = make("p", { class: "hint" });
    this.history = make("ol", { class: "versions", "aria-label": "Versions of this case" });
    this.agree = button("Agreement", () => this.showAgreement(), {
      title: "Every two annotators' latest versions, structure by structure",
    });
    this.figures = make("div", { class: "figures", "aria-live": "polite" });
    this.consensus = new Consensus(this);
    this.element = make(
      "div",
      {},
      make("label", { for: "medvl-note" }, "Note"),
      this.note,
      make("div", { class: "row" }, this.save, this.submit),
      this.state,
      this.consensus.element,
      make("h3", {}, "Versions of this case"),
      make("div", { class: "row" }, this.agree, this.consensus.show),
      this.figures,
      this.history,
    );
    this.#list(null, [], null, "");
    panel.work.onChange(() => this.#buttons());
  }

  #buttons() {
    const busy = this.panel.work.busy(KIND);
    for (const control of this.element.querySelectorAll("button")) control.disabled = busy;
    this.state.textContent = this.#stateText();
  }

  #stateText() {
    const shown = this.panel.image()?.series;
    const unsaved = this.unsaved();
    const others = unsaved.filter((image) => image.series !== shown).map((image) => image.description || image.series);
    const own = unsaved.length > others.length ? ["Changed since the last version"] : [];
    return [...own, ...(others.length ? [`Not saved either: ${others.join(", ")}`] : [])].join(". ");
  }

  /** Images whose masks changed since their last version; those that left the viewer are gone. */
  unsaved() {
    return [...this.changes.values()].map(({ image }) => image).filter((image) => labelmap.holds(image));
  }

  /** The viewer tells of a change; it does so too when it shows a label map again. */
  changed(image) {
    // Of changed masks it does not matter whether they changed once more: no stroke of a brush waits for that.
    if (this.changes.has(image.series) || !this.#needsNoSaving(image)) this.edited(image);
  }

  #needsNoSaving(image) {
    const print = this.prints.get(image.series);
    return print !== undefined && print === printOf(labelmap.voxels(image));
  }

  edited(image) {
    // An empty label map, as the viewer has made it, is nothing to save.
    if (!this.changes.has(image.series) && labelmap.isEmpty(image)) return;
    this.consensusOn.delete(image.series); // edited by hand it is the annotator's own
    this.edits += 1;
    this.changes.set(image.series, { image, edits: this.edits });
    this.#buttons();
  }

  /** How often the masks of an image changed since they were saved; it tells one state of them from another. */
  stateOf(image) {
    return this.changes.get(image.series)?.edits;
  }

  /** Refuse to put other masks over what was painted since `state`, which nobody was asked about. */
  checkUnchanged(image, state) {
    if (this.stateOf(image) !== state) throw new Error("the masks were changed meanwhile; nothing was put on screen");
  }

  /** These voxels, or those on screen, need no saving. */
  saved(image, voxels = labelmap.voxels(image)) {
    this.prints.set(image.series, printOf(voxels));
    this.changes.delete(image.series);
    this.#buttons();
  }

  /** What is on screen is a consensus nobody edited, of which `said` tells, or none where that is null. */
  markConsensus(image, said) {
    if (said) this.consensusOn.set(image.series, said);
    else this.consensusOn.delete(image.series);
  }

  forgetChanges() {
    this.changes.clear();
  }

  /** The viewer made the label map of an image anew. */
  forget(image) {
    for (const known of [this.changes, this.prints, this.consensusOn]) known.delete(image.series);
  }

  async store(status, image = this.panel.image()) {
    if (!image) return null;
    if (!author()) return this.panel.askAuthor();
    return this.panel.work.run(KIND, status === "submitted" ? "Submitting" : "Saving", async (signal) => {
      const [state, voxels] = [this.stateOf(image), labelmap.voxels(image).slice()];
      const consensus = this.consensusOn.get(image.series);
      const counts = labelmap.counts(voxels);
      const present = labelmap.structures(image).filter((item) => counts[item.index]);
      if (!present.length) throw new Error("there is no mask yet");
      const params = {
        author: author(),
        client_id: clientId(),
        source: consensus?.source ?? "ohif",
        made_from: consensus?.versions ?? [],
        note: this.#noteOn(image),
        segmentationMeta: { status },
        model_version: this.panel.modelVersion(),
        prompts: this.panel.segment.record(image),
        label_info: present.map(({ name, index }) => ({ name, idx: index })),
      };
      const record = await api.saveLabel(image.series, await writeNrrd(gridOf(image.volume), voxels), params, {
        signal,
      });
      if (this.#isStill(image, state, voxels)) this.saved(image, voxels);
      this.#noteStored(image, params.note);
      if (this.consensus.shown?.image.series === image.series) this.consensus.forget();
      const done = status === "submitted" ? "ubmitted" : "aved";
      const said = consensus ? `The consensus is s${done}` : `S${done}`;
      await this.#stored(image, `${said} as version ${record.version}`, signal);
      return record;
    }, { keeps: true });
  }

  /** Whether nothing was painted since `state`, when these were the voxels; the viewer may have shown them again. */
  #isStill(image, state, voxels) {
    if (this.stateOf(image) === state) return true;
    return labelmap.holds(image) && printOf(labelmap.voxels(image)) === printOf(voxels);
  }

  /** A version was stored, which `said` says, also when the list it stands in cannot be read. */
  async #stored(image, said, signal) {
    let unread = "";
    try {
      await this.load(image, signal);
    } catch (error) {
      if (this.panel.shows(image)) {
        this.#list(image, [], null, "not read yet");
        this.#offerReading();
        const reason = error.name === "AbortError" ? "nobody waited for it" : error.message;
        unread = `; the list of versions could not be read: ${reason}`;
      }
    }
    this.panel.work.say(`${said}${this.panel.ofOther(image)}${unread}`);
  }

  #offerReading() {
    this.history.append(make("li", {}, button("Read the versions again", () => this.refresh())));
  }

  #noteOn(image) {
    return (this.notes.get(image.series) ?? "").trim();
  }

  /** It is in a version now, unless another one was typed during the upload. */
  #noteStored(image, note) {
    if (this.#noteOn(image) === note) this.notes.delete(image.series);
    this.#showNote();
  }

  #showNote() {
    const text = this.notes.get(this.panel.image()?.series) ?? "";
    if (this.note.value !== text) this.note.value = text; // else the caret would jump
  }

  /** Read the history of the case on screen; that of the case before, of whatever image it was, is gone at once. */
  async refresh() {
    const image = this.panel.image();
    this.consensus.forget();
    this.#showNote();
    replace(this.figures);
    this.#list(image, [], null, image ? "not read yet" : "");
    if (!image) return;
    const read = await this.panel.work.run("versions", "Reading the versions", async (signal) => {
      if (!(await this.load(image, signal))) return false;
      const count = counted(this.list.length, "version");
      if (this.list.length) this.panel.work.say(`${count} of this case. `, this.#openLast(image));
      return true;
    });
    if (!read && this.panel.shows(image)) this.#offerReading();
  }

  /** Opens the version that counts, from whatever tab: the final one, else the newest. */
  #openLast(image) {
    const last = Math.max(...this.list.map(({ version }) => version));
    const version = this.list.find((item) => item.version === (this.final ?? last));
    return button(`Open version ${version.version}`, () => this.reopen(image, version));
  }

  /** Read the history of an image; resolves to whether it is shown, which it is for the image on screen alone. */
  async load(image, signal) {
    let [versions, final, none] = [[], null, "none yet"];
    try {
      ({ versions, final } = await api.versions(image.series, { signal }));
    } catch (error) {
      if (error.status !== 404) throw error;
      none = `No versions: ${error.message}`;
    }
    if (!this.panel.shows(image)) return false;
    this.#list(image, versions, final, none);
    return true;
  }

  /** Show these versions, whose buttons are for `image` and no other; `none` is said where there are none. */
  #list(image, versions, final, none) {
    [this.list, this.final] = [versions, final];
    const newest = [...versions].sort((a, b) => b.version - a.version);
    const items = newest.map((version) => this.#version(image, version));
    replace(this.history, ...(items.length ? items : [make("li", { class: "hint" }, none)]));
    const authors = new Set(versions.map((version) => version.author).filter(Boolean));
    this.agree.hidden = this.consensus.show.hidden = authors.size < 2;
    this.#buttons();
  }

  #version(image, version) {
    const number = version.version;
    const marks = [
      version.status,
      number === this.final ? "final" : "",
      version.restored_from ? `from version ${version.restored_from}` : "",
      version.made_from.length ? `consensus of ${version.made_from.join(", ")}` : "",
    ];
    const others = this.list.filter((item) => item.version < number);
    const previous = others.length ? Math.max(...others.map((item) => item.version)) : null;
    return make(
      "li",
      { "data-version": number },
      make("div", {}, make("strong", {}, `Version ${number}`), ` ${marks.filter(Boolean).join(", ")}`),
      make("div", { class: "hint" }, `${version.author || "unknown"}, ${clock(version.time)}, ${version.source ?? ""}`),
      version.note ? make("div", { class: "note" }, version.note) : null,
      make("div", { class: "hint" }, (version.structures ?? []).map((item) => spoken(item.name)).join(", ")),
      make(
        "div",
        { class: "row" },
        button("Open", () => this.reopen(image, version), { "aria-label": `Open version ${number}` }),
        previous ? button(`Compare with ${previous}`, () => this.compare(image, previous, number)) : null,
        number === this.final
          ? null
          : button("Restore", () => this.restore(image, number), { "aria-label": `Restore version ${number}` }),
      ),
    );
  }

  /** Put a version of an image, which must be on screen, in place of its present label map. */
  async reopen(its, version) {
    if (!this.panel.stillShows(its)) return;
    const image = this.panel.image(); // its volume may be another than when the version was listed
    if (!(await this.panel.mayLeave("open another version", [image])) || !this.panel.stillShows(image)) return;
    const state = this.stateOf(image);
    await this.panel.work.run(KIND, `Opening version ${version.version}`, async (signal) => {
      const mask = await readNrrd(await api.labelFile(image.series, version.version, { signal }));
      signal.throwIfAborted();
      labelmap.checkGrid(image, mask);
      this.checkUnchanged(image, state);
      labelmap.pasteAll(
        image,
        mask.voxels,
        Object.fromEntries(version.structures.map(({ name, value }) => [value, name])),
      );
      this.panel.segment.forget(image);
      this.consensus.forget();
      this.saved(image);
      this.markConsensus(image, version.made_from.length ? consensusOf(version) : null);
      this.panel.work.say(`Version ${version.version} is on screen`);
    });
    this.panel.segment.refresh();
  }

  async restore(image, version) {
    if (!this.panel.stillShows(image)) return null;
    if (!author()) return this.panel.askAuthor();
    await this.panel.work.run(KIND, `Restoring version ${version}`, async (signal) => {
      const note = this.#noteOn(image);
      const body = { author: author(), note: note || `version ${version} restored` };
      const record = await api.restore(image.series, version, body, { signal });
      this.#noteStored(image, note);
      await this.#stored(image, `Version ${version} is final again, as version ${record.version}`, signal);
    }, { keeps: true });
  }

  async compare(image, a, b) {
    if (!this.panel.stillShows(image)) return;
    await this.panel.work.run(KIND, `Comparing ${a} and ${b}`, async (signal) => {
      const figures = await api.compare(image.series, a, b, { signal });
      signal.throwIfAborted();
      this.showFigures(`Version ${a} against ${b}`, figures);
    });
  }

  async showAgreement() {
    const image = this.panel.image();
    if (!image) return;
    await this.panel.work.run(KIND, "Comparing the annotators", async (signal) => {
      const figures = await api.agreement(image.series, { signal });
      signal.throwIfAborted();
      this.showFigures("Agreement", figures);
    });
  }

  /** A table for two versions, or for every two annotators' latest; what agrees least stands first. */
  showFigures(title, reply) {
    const pairs = reply.pairs ?? [{ structures: reply.structures }];
    const named = ({ authors }) => (authors ? `${title}: ${authors.join(" / ")}` : title);
    replace(
      this.figures,
      button("Hide the figures", () => replace(this.figures), { class: "link" }),
      ...pairs.map((pair) => figuresTable(named(pair), pair.structures)),
    );
    this.figures.scrollIntoView({ block: "nearest" });
  }
}

function figuresTable(title, structures) {
  const rows = [...structures].sort((a, b) => a.dice - b.dice).map(({ name, dice, nsd }) => {
    const figures = [dice, nsd].map((value) => make("td", {}, value.toFixed(3)));
    return make("tr", {}, make("th", { scope: "row" }, spoken(name)), ...figures);
  });
  const head = ["Structure", "Dice", "NSD 2 mm"].map((text) => make("th", { scope: "col" }, text));
  return make(
    "table",
    {},
    make("caption", {}, title),
    make("thead", {}, make("tr", {}, ...head)),
    make("tbody", {}, ...rows),
  );
}
