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
    this.shown = null; // while one is on screen: `{image, versions, made, before, saved}`
    this.show = button("Consensus", () => this.look(), {
      title: "Where most of the annotators' latest versions agree; nothing is stored before you accept it",
    });
    this.element = make("div", { class: "consensus" });
  }

  /** Put the consensus on screen in place of the masks, with the annotators' agreement. */
  async look() {
    const image = this.panel.image();
    if (!(await this.panel.mayLeave("look at the consensus", [image]))) return;
    const state = this.labels.stateOf(image);
    await this.panel.work.run(KIND, "Making the consensus", async (signal) => {
      const { versions, structures, file } = await api.consensus(image.series, { signal });
      const figures = await api.agreement(image.series, { signal });
      const mask = await readNrrd(file);
      signal.throwIfAborted();
      labelmap.checkGrid(image, mask);
      this.labels.checkUnchanged(image, state);
      const [before, saved] = [labelmap.voxels().slice(), state === undefined];
      labelmap.pasteAll(image, mask.voxels, Object.fromEntries(structures.map(({ name, value }) => [value, name])));
      this.labels.saved(image); // nothing of the annotator's own is in it yet
      this.panel.segment.forget(image);
      this.shown = { image, versions, made: labelmap.voxels().slice(), before, saved };
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

  async accept() {
    const shown = this.shown;
    const { image, versions, made } = shown;
    if (!author()) return this.panel.askAuthor();
    if (this.#edited()) {
      const text = "The consensus was changed on screen. Store your changes, as a version of your own, or drop them?";
      const answer = await this.panel.ask("Changed consensus", text, ["Store mine", "Drop and accept", "Stay"]);
      if (this.shown !== shown || answer === "Stay") return;
      if (answer === "Store mine") return this.labels.store("draft", image);
      labelmap.putBack(image, made);
      this.labels.saved(image);
      this.panel.segment.forget(image);
    }
    await this.panel.work.run(KIND, "Storing the consensus", async (signal) => {
      const record = await api.acceptConsensus(image.series, { versions, author: author() }, { signal });
      this.forget();
      await this.labels.load(image, signal);
      this.panel.work.say(`The consensus is version ${record.version}`);
    }, { keeps: true });
    this.panel.segment.refresh();
  }

  async putBack() {
    const shown = this.shown;
    const { image, before, saved } = shown;
    if (!(await this.panel.mayLeave("put back what was here", [image]))) return;
    if (this.shown && this.shown !== shown) return;
    labelmap.putBack(image, before);
    this.panel.segment.forget(image);
    if (saved) this.labels.saved(image);
    this.forget();
    this.panel.work.say("The masks from before are on screen");
    this.panel.segment.refresh();
  }

  /** Whether somebody changed what is on screen since the consensus was put there. */
  #edited() {
    return this.labels.stateOf(this.shown.image) !== undefined;
  }

  forget() {
    this.shown = null;
    replace(this.element);
  }
}
