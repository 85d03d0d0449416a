// Masks without a prompt: all classes of the model or one of them, over what nobody made by hand.

import * as api from "./api.js";
import { clientId } from "./annotator.js";
import { button, counted, make, spoken } from "./dom.js";
import * as labelmap from "./labelmap.js";
import { readMask } from "./masks.js";
import { fingerprints } from "./prompts.js";

/**
 * Values with voxels that `made` does not give them, or rubbed out since: a table of 256. A structure that only lies
 * under another one is as it was made; without `made` every value is changed.
 */
export function changedSince(made, now) {
  const changed = new Uint8Array(256);
  if (!made) return changed.fill(1);
  for (let n = 0; n < now.length; n++) if (now[n] !== made[n]) changed[now[n] || made[n]] = 1;
  return changed;
}

/** `made` once the structures of `told` (a table of values) were told anew: those, and what came to light under them. */
export function madeAnew(made, before, after, told) {
  const next = made?.slice() ?? new Uint8Array(after.length);
  for (let n = 0; n < after.length; n++) {
    if (told[after[n]] || before[n] !== after[n]) next[n] = after[n];
    else if (told[next[n]]) next[n] = 0;
  }
  return next;
}

export class Automatic {
  /** `segment` is the tab; `kind` its kind of work, so that one of them runs at a time. */
  constructor(segment, kind) {
    this.segment = segment;
    this.panel = segment.panel;
    this.kind = kind;
    this.made = new Map(); // by series: the label map as this model left it
    this.all = button("All organs", () => this.run([]), { title: "Every class of the model" });
    this.one = button("This structure", () => this.run([segment.target.value]));
    this.element = make("div", { class: "row" }, this.all, this.one);
  }

  refresh(chosen) {
    this.all.disabled = this.panel.work.busy(this.kind);
    this.one.disabled = this.all.disabled || !this.panel.classes().includes(chosen);
  }

  /** Structures with voxels that this model did not leave so, with their fingerprints. */
  byHand(image) {
    const voxels = labelmap.voxels(image);
    const [now, changed] = [fingerprints(voxels), changedSince(this.made.get(image.series), voxels)];
    const present = labelmap.structures(image).filter(({ index, locked }) => now[index] && changed[index] && !locked);
    return new Map(present.map(({ name, index }) => [name, now[index]]));
  }

  /** What the annotator lets go: `byHand` as it is now, or nothing; null to leave all as it is. */
  async mayReplace(byHand) {
    if (!byHand.size) return byHand;
    const names = [...byHand.keys()].map(spoken).join(", ");
    const text = `Made or changed since the last automatic masks: ${names}. Replace them too?`;
    const answer = await this.panel.ask("Replace masks", text, ["Keep them", "Replace", "Cancel"]);
    return { "Keep them": new Map(), Replace: byHand }[answer] ?? null;
  }

  /** Segment `classes`, or all; the other structures made by hand are kept unasked. */
  async run(classes) {
    const image = this.panel.image();
    if (!image) return;
    const told = (name) => !classes.length || classes.includes(name);
    const given = await this.mayReplace(new Map([...this.byHand(image)].filter(([name]) => told(name))));
    if (!given || !this.panel.stillShows(image)) return;
    const title = classes.length ? `Segmenting ${spoken(classes[0])}` : "Segmenting all organs";
    await this.panel.work.run(this.kind, title, async (signal) => {
      const params = { client_id: clientId(), classes: classes.join(",") };
      const reply = await api.infer("medvl_semantic", image.series, params, { signal });
      const mask = await readMask(image, reply.file, signal);
      const names = reply.params.label_names;
      // What was painted while the model ran was not asked about: it is kept too.
      const kept = [...this.byHand(image)].filter(([name, now]) => now !== given.get(name)).map(([name]) => name);
      const before = labelmap.voxels(image).slice();
      const byValue = Object.fromEntries(Object.entries(names).map(([name, value]) => [value, name]));
      this.segment.steps.paste(image, mask, byValue, kept);
      this.#note(image, before, (name) => name in names && !kept.includes(name));
      const counts = labelmap.counts(mask);
      const segmented = Object.keys(names).filter((name) => counts[names[name]] && told(name) && !kept.includes(name));
      const said = kept.filter(told).map(spoken).join(", ");
      this.panel.work.say(`Segmented ${counted(segmented.length, "structure")}${said ? `; kept ${said}` : ""}`);
    });
    this.segment.refresh();
  }

  #note(image, before, isTold) {
    const told = new Uint8Array(256);
    for (const { name, index } of labelmap.structures(image)) if (isTold(name)) told[index] = 1;
    this.made.set(image.series, madeAnew(this.made.get(image.series), before, labelmap.voxels(image), told));
  }

  forget(image) {
    this.made.delete(image.series);
  }
}
