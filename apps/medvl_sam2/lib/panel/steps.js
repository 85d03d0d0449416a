// Back and forth over what no prompt of a structure told: words, automatic masks, and a structure that was cleared.

import * as labelmap from "./labelmap.js";
import { fingerprints } from "./prompts.js";

const MOST_BYTES = 128 * 2 ** 20;

const printsOf = (image) => fingerprints(labelmap.voxels(image));

/** Steps of every series, each with what it changed; the oldest go when those of a series take more than `most` bytes. */
export class Steps {
  /** `placements` are the prompts: those of a structure that a step tells anew go with it, and come back with its undo. */
  constructor(work, placements, most = MOST_BYTES) {
    Object.assign(this, { work, placements, most });
    this.series = new Map();
  }

  #of(image) {
    if (!this.series.has(image.series)) this.series.set(image.series, { past: [], future: [] });
    return this.series.get(image.series);
  }

  can(image, direction) {
    return Boolean(image) && this.#of(image)[direction === "undo" ? "past" : "future"].length > 0;
  }

  /** Something else was placed or told: what was undone does not come again. */
  placed(image) {
    this.#of(image).future = [];
  }

  /**
   * As `labelmap.paste`, as one step; it is none when nothing changed. The prompts of a structure go with what its mask
   * was; with `clears` also when that was nothing.
   */
  paste(image, values, names, kept = [], clears = false) {
    const before = printsOf(image);
    const changes = labelmap.stepOf(image, () => labelmap.paste(image, values, names, kept));
    this.placed(image);
    const after = printsOf(image);
    const told = labelmap.structures(image).filter(({ name, index }) => {
      const gone = before[index] !== after[index] || (clears && this.placements.of(image).has(name));
      return Object.values(names).includes(name) && gone;
    });
    if (!changes.bytes && !told.length) return;
    const prompts = new Map(told.map(({ name }) => [name, undefined]));
    const step = { changes, prompts, before: before.join(), after: after.join() };
    this.#swapPrompts(image, step);
    const { past } = this.#of(image);
    past.push(step);
    const bytes = () => past.reduce((sum, one) => sum + one.changes.bytes, 0);
    while (past.length > 1 && bytes() > this.most) past.shift();
  }

  /** Those of the masks after a step for those of the masks before, or the other way round. */
  #swapPrompts(image, step) {
    const placed = this.placements.of(image);
    const others = new Map([...step.prompts.keys()].map((name) => [name, placed.get(name)]));
    for (const [name, prompts] of step.prompts) {
      if (prompts) placed.set(name, prompts);
      else placed.delete(name);
    }
    step.prompts = others;
  }

  /** Undo or redo a step, and `say` so, when the masks are as it left or found them; returns whether they are. */
  async move(image, direction, say) {
    if (!this.can(image, direction)) return false;
    const { past, future } = this.#of(image);
    const [from, to, end] = direction === "undo" ? [past, future, "after"] : [future, past, "before"];
    const step = from.at(-1);
    if (step[end] !== printsOf(image).join()) return false;
    await this.work.run("paste", direction === "undo" ? "Undoing" : "Redoing", async () => {
      labelmap.takeStep(image, step.changes, direction);
      this.#swapPrompts(image, step);
      to.push(from.pop());
      this.work.say(say);
    });
    return true;
  }

  forget(image) {
    this.series.delete(image.series);
  }
}
