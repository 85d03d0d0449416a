// Masks without a prompt: all classes of the model or one of them, over what nobody made by hand.

import * as api from "./api.js";
import { clientId } from "./annotator.js";
import { button, counted, make, spoken } from "./dom.js";
import * as labelmap from "./labelmap.js";
import { fingerprints } from "./prompts.js";

export class Automatic {
  /** `segment` is the tab; `kind` its kind of work, so that one of them runs at a time. */
  constructor(segment, kind) {
    this.segment = segment;
    this.panel = segment.panel;
    this.kind = kind;
    this.made = new Map(); // structures as this model left them: name to fingerprint
    this.all = button("All organs", () => this.run([]), { title: "Every class of the model" });
    this.one = button("This structure", () => this.run([segment.target.value]));
    this.element = make("div", { class: "row" }, this.all, this.one);
  }

  refresh(chosen) {
    this.all.disabled = this.panel.work.busy(this.kind);
    this.one.disabled = this.all.disabled || !this.panel.classes().includes(chosen);
  }

  /** Structures with voxels that are not as this model left them, with their fingerprints; of `classes`, or all. */
  #byHand(image, classes) {
    const now = fingerprints(labelmap.voxels());
    const present = labelmap.structures(image).filter(({ name, index, locked }) => {
      return now[index] && !locked && now[index] !== this.made.get(name) && (!classes.length || classes.includes(name));
    });
    return new Map(present.map(({ name, index }) => [name, now[index]]));
  }

  /** What the annotator lets go: `byHand` as it is now, or nothing; null to leave all as it is. */
  async #mayReplace(byHand) {
    if (!byHand.size) return byHand;
    const names = [...byHand.keys()].map(spoken).join(", ");
    const text = `Made or changed since the last automatic masks: ${names}. Replace them too?`;
    const answer = await this.panel.ask("Replace masks", text, ["Keep them", "Replace", "Cancel"]);
    return { "Keep them": new Map(), Replace: byHand }[answer] ?? null;
  }

  async run(classes) {
    const image = this.panel.image();
    if (!image) return;
    const given = await this.#mayReplace(this.#byHand(image, classes));
    if (!given) return;
    const title = classes.length ? `Segmenting ${spoken(classes[0])}` : "Segmenting all organs";
    await this.panel.work.run(this.kind, title, async (signal) => {
      const params = { client_id: clientId(), classes: classes.join(",") };
      const reply = await api.infer("medvl_semantic", image.series, params, { signal });
      // What was painted while the model ran was not asked about: it is kept too.
      const byHand = this.#byHand(image, classes);
      const kept = [...byHand].filter(([name, now]) => now !== given.get(name)).map(([name]) => name);
      await this.segment.paste(image, reply.file, reply.params.label_names, kept);
      const left = fingerprints(labelmap.voxels());
      for (const { name, index } of labelmap.structures(image))
        if (name in reply.params.label_names && !kept.includes(name)) this.made.set(name, left[index]);
      const segmented = (reply.params.segmented ?? []).filter((name) => !kept.includes(name));
      const rest = kept.length ? `; kept ${kept.map(spoken).join(", ")}` : "";
      this.panel.work.say(`Segmented ${counted(segmented.length, "structure")}${rest}`);
    });
    this.segment.refresh();
  }

  forget() {
    this.made.clear();
  }
}
