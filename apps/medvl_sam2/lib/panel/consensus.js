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
    this.shown = null;
    this.show = button("Consensus", () => this.look(), {
      title: "Where most of the annotators' latest versions agree; nothing is stored before you accept it",
    });
    this.element = make("div", { class: "consensus" });
  }

  /** Put the consensus on screen in place of the masks, with the annotators' agreement. */
  async look() {
    const image = this.panel.image();
    if (!(await this.panel.mayLeave("look at the consensus", [image]))) return;
    await this.panel.work.run(KIND, "Making the consensus", async (signal) => {
      const { versions, structures, file } = await api.consensus(image.series, { signal });
      const figures = await api.agreement(image.series, { signal });
      const mask = await readNrrd(file);
      signal.throwIfAborted();
      labelmap.checkGrid(image, mask);
      const before = { values: labelmap.voxels().slice(), saved: this.labels.stateOf(image) === undefined };
      labelmap.pasteAll(image, mask.voxels, Object.fromEntries(structures.map(({ name, value }) => [value, name])));
      this.panel.segment.forget();
      this.shown = { image, versions, before, state: this.labels.stateOf(image) };
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
    const { image, versions, state } = this.shown;
    if (!author()) return this.panel.askAuthor();
    if (this.labels.stateOf(image) !== state)
      return this.panel.work.complain("It was changed since; Save or Submit makes a version of your own of it");
    await this.panel.work.run(KIND, "Storing the consensus", async (signal) => {
      const record = await api.acceptConsensus(image.series, { versions, author: author() }, { signal });
      if (this.labels.stateOf(image) === state) this.labels.saved(image);
      this.forget();
      await this.labels.load(image, signal);
      this.panel.work.say(`The consensus is version ${record.version}`);
    }, { keeps: true });
  }

  putBack() {
    const { image, before } = this.shown;
    labelmap.putBack(image, before.values);
    this.panel.segment.forget();
    if (before.saved) this.labels.saved(image);
    this.forget();
    this.panel.segment.refresh();
  }

  forget() {
    this.shown = null;
    replace(this.element);
  }
}
