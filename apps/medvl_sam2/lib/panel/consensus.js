// One label of all annotators' latest versions: looked at first, and a version only when the annotator accepts it.

import * as api from "./api.js";
import { author } from "./annotator.js";
import { button, make, replace } from "./dom.js";
import * as labelmap from "./labelmap.js";
import { readNrrd } from "./nrrd.js";

const KIND = "label";

export class Consensus {
  /** `labels` is the tab with the versions. */
  constructor(labels) {
    this.labels = labels;
    this.panel = labels.panel;
    this.shown = null; // while one is on screen: `{image, said, made, before, saved, consensus}`
    this.show = button("Consensus", () => this.look(), {
      title: "Where most of the annotators' latest versions agree; nothing is stored before you accept it",
    });
    this.element = make("div", { class: "consensus" });
  }

  /** Put the consensus on screen in place of the masks, with the annotators' agreement. */
  async look() {
    const image = this.panel.image();
    if (!image || !(await this.panel.mayLeave("look at the consensus", [image]))) return;
    if (!this.panel.stillShows(image)) return;
    const state = this.labels.stateOf(image);
    await this.panel.work.run(KIND, "Making the consensus", async (signal) => {
      const { versions, structures, file } = await api.consensus(image.series, { signal });
      const figures = await api.agreement(image.series, { signal });
      const mask = await readNrrd(file);
      signal.throwIfAborted();
      labelmap.checkGrid(image, mask);
      this.labels.checkUnchanged(image, state);
      const [before, saved] = [labelmap.voxels(image).slice(), state === undefined];
      const consensus = this.labels.consensusOn.get(image.series);
      labelmap.pasteAll(image, mask.voxels, Object.fromEntries(structures.map(({ name, value }) => [value, name])));
      const said = { versions, source: "consensus-majority" };
      this.#unedited(image, said);
      this.shown = { image, said, made: labelmap.voxels(image).slice(), before, saved, consensus };
      this.labels.showFigures("Agreement", figures);
      replace(
        this.element,
        make("p", {}, `On screen: the consensus of versions ${versions.join(", ")}, not stored yet`),
        make(
          "div",
          { class: "row" },
          button("Accept the consensus", () => this.accept(), { class: "primary" }),
          button("Put back what was here", () => this.putBack()),
        ),
      );
      this.panel.work.say("The consensus is on screen");
    });
    this.panel.segment.refresh();
  }

  /** It is on screen, and nothing of the annotator's own is in it. */
  #unedited(image, said) {
    this.labels.saved(image);
    this.labels.markConsensus(image, said);
    this.panel.segment.forget(image);
  }

  async accept() {
    const shown = this.shown;
    const { image, said, made } = shown;
    if (!author()) return this.panel.askAuthor();
    if (!this.labels.consensusOn.has(image.series)) {
      const text = "The consensus was changed on screen. Store your changes, as a version of your own, or drop them?";
      const answer = await this.panel.ask("Changed consensus", text, ["Store mine", "Drop and accept", "Stay"]);
      if (this.shown !== shown || answer === "Stay") return;
      if (answer === "Store mine") return this.labels.store("draft", image);
      labelmap.putBack(image, made);
      this.#unedited(image, said);
      this.panel.segment.refresh();
    }
    await this.labels.store("submitted", image);
  }

  async putBack() {
    const shown = this.shown;
    const { image, before, saved, consensus } = shown;
    if (!(await this.panel.mayLeave("put back what was here", [image]))) return;
    if (!this.panel.stillShows(image) || (this.shown && this.shown !== shown)) return;
    labelmap.putBack(image, before);
    this.panel.segment.forget(image);
    if (saved) this.labels.saved(image);
    else this.labels.edited(image);
    this.labels.markConsensus(image, consensus);
    this.forget();
    this.panel.work.say("The masks from before are on screen");
    this.panel.segment.refresh();
  }

  forget() {
    this.shown = null;
    replace(this.element);
  }
}
