// The tab "Segment": words, clicks and boxes to masks in the viewer's label map, corrected by more of them or by hand.

import * as api from "./api.js";
import { clientId } from "./annotator.js";
import { Automatic } from "./automatic.js";
import { Brush } from "./brush.js";
import { button, counted, field, form, make, replace, select, spoken } from "./dom.js";
import * as labelmap from "./labelmap.js";
import { maskOf, readMask, voxelsOf } from "./masks.js";
import { Overlay } from "./overlay.js";
import { PlacedList } from "./placed_list.js";
import { Placed, Prompts, fingerprints, isEmpty } from "./prompts.js";
import { Steps } from "./steps.js";
import { Structures } from "./structures.js";
import { jumpTo, onTool } from "./viewer.js";
import { Words } from "./words.js";

const AS_WORDS_SAY = "";
const ANYTHING = "object";
const KIND = "segment";

export class Segment {
  /** `panel` has `image()`, `names()` (the server's labels) and `work`. */
  constructor(panel) {
    this.panel = panel;
    this.placements = new Placed();
    this.steps = new Steps(panel.work, this.placements);
    this.again = new Map(); // structures whose prompts were not asked for yet, with their image
    this.asking = false;
    this.placing = Promise.resolve();
    this.named = null; // the structure that words chose, while nobody chose another or placed something for it
    this.overlay = new Overlay({
      image: () => panel.image(),
      marks: () => this.placed(),
      onPoint: (voxel, label) => this.place((prompts) => prompts.addPoint(voxel, label)),
      onBox: (a, b) => this.place((prompts) => prompts.setBox(a, b)),
      onRemovePoint: (point) => this.place((prompts) => prompts.removePoint(point)),
      onMiss: () => panel.work.complain("That place is outside the image; click on it"),
    });
    this.#build();
    onTool(() => panel.image(), (tool) => this.#toolTaken(tool));
    panel.work.onChange(() => this.#buttons());
  }

  // --- what is on the page --------------------------------------------------------------------------------------

  #build() {
    this.target = select("medvl-target", [[AS_WORDS_SAY, "as the words say"]], {
      onchange: () => this.#targetChosen(),
    });
    this.newName = make("input", { id: "medvl-new", placeholder: "another name, e.g. lesion 2", maxlength: 60 });
    this.words = make("input", { id: "medvl-words", placeholder: "the lesion in the liver", maxlength: 2000 });
    this.tools = Object.entries({ add: "+ Inside", remove: "− Outside", box: "▭ Box" }).map(([tool, text]) =>
      button(text, () => this.useTool(tool), { "data-tool": tool, "aria-pressed": "false" }),
    );
    this.undo = button("Undo", () => this.move("undo"));
    this.redo = button("Redo", () => this.move("redo"));
    this.clear = button("Clear", () => this.clearPrompts(), {
      title: "Take all prompts and the mask of this structure away",
    });
    this.automatic = new Automatic(this, KIND);
    this.byWords = new Words(this, KIND);
    this.run = make("button", { type: "submit", class: "primary" }, "Segment");
    this.brush = new Brush(this.panel, () => this.#beginByHand());
    this.structures = new Structures({
      choose: (name) => {
        this.choose(name);
        this.goTo(name);
      },
      changed: () => this.refresh(),
    });
    this.placedList = new PlacedList((edit) => this.place(edit));
    this.wordsLabel = make("label", { for: "medvl-words" });
    const words = form(() => this.segmentWords(), this.words, this.run);
    const adding = form(() => this.addName(), this.newName, make("button", { type: "submit" }, "Add"));
    this.element = make(
      "div",
      {},
      field("Structure", this.target),
      make("label", { for: "medvl-new", class: "hidden" }, "Name of another structure"),
      adding,
      this.wordsLabel,
      words,
      make("div", { class: "row", role: "group", "aria-label": "Prompts on the image" }, ...this.tools),
      make("div", { class: "row" }, this.undo, this.redo, this.clear),
      this.placedList.element,
      make("h3", {}, "Automatically"),
      this.automatic.element,
      this.brush.element,
      make("h3", {}, "Structures with a mask"),
      this.structures.element,
    );
  }

  /** The image on screen changed, or its label map did. */
  refresh() {
    const image = this.panel.image();
    if (!image) return;
    const counts = labelmap.counts(labelmap.voxels());
    const known = labelmap.structures(image);
    const chosen = this.target.value;
    const options = known.map(({ name, index }) =>
      make(
        "option",
        { value: name },
        counts[index] ? `${spoken(name)} (${counted(counts[index], "voxel")})` : spoken(name),
      ),
    );
    replace(this.target, make("option", { value: AS_WORDS_SAY }, "as the words say"), ...options);
    this.target.value = known.some((item) => item.name === chosen) ? chosen : AS_WORDS_SAY;
    this.structures.refresh(image, known, counts);
    this.brush.refresh(image);
    this.#buttons();
  }

  #buttons() {
    const busy = this.panel.work.busy(KIND);
    const prompts = this.#placedNow();
    this.run.disabled = busy;
    this.wordsLabel.textContent = this.#wordsChoose() ? "In words" : `In words, for ${spoken(this.target.value)}`;
    this.automatic.refresh(this.target.value);
    const image = this.panel.image();
    this.undo.disabled = busy || !(prompts?.canUndo || this.steps.can(image, "undo"));
    this.redo.disabled = busy || !(prompts?.canRedo || this.steps.can(image, "redo"));
    this.clear.disabled = busy || !this.target.value;
    this.placedList.refresh(prompts);
    this.overlay.draw();
  }

  placed() {
    return this.#placedNow() ?? { points: [], box: null };
  }

  #placedNow() {
    return this.placements.of(this.panel.image()).get(this.target.value);
  }

  /** Choose a structure, which is added when it is new; returns whether it is chosen, and says why not. */
  choose(name) {
    if (!this.panel.image()) return false;
    try {
      labelmap.indexOf(this.panel.image(), name);
    } catch (error) {
      this.panel.work.complain(`${spoken(name)} was not added: ${error.message}`);
      return false;
    }
    this.refresh();
    this.target.value = name;
    this.#targetChosen();
    return true;
  }

  #targetChosen() {
    const image = this.panel.image();
    this.named = null;
    if (image && this.target.value) labelmap.activate(image, this.target.value);
    this.#buttons();
  }

  addName() {
    const name = this.newName.value.trim();
    if (name && this.choose(name)) this.newName.value = "";
  }

  goTo(name, image = this.panel.image()) {
    if (!image) return;
    const index = labelmap.indexOf(image, name);
    const voxel = labelmap.centre(labelmap.voxels(image), image.volume.dimensions, (value) => value === index);
    if (voxel) jumpTo(image, voxel);
  }

  // --- tools ----------------------------------------------------------------------------------------------------

  useTool(tool) {
    const chosen = this.overlay.tool === tool ? null : tool;
    if (chosen) this.brush.putAway();
    this.overlay.use(chosen);
    for (const control of this.tools) control.setAttribute("aria-pressed", String(control.dataset.tool === chosen));
  }

  /** A tool of OHIF's takes the mouse; ours would hold its clicks back. */
  #toolTaken(tool) {
    if (this.overlay.tool) this.useTool(this.overlay.tool);
    this.brush.show(tool);
  }

  #beginByHand() {
    if (this.overlay.tool) this.useTool(this.overlay.tool);
    if (!this.target.value && !this.choose(ANYTHING)) return false;
    labelmap.activate(this.panel.image(), this.target.value);
    return true;
  }

  // --- requests -------------------------------------------------------------------------------------------------

  async segmentWords() {
    const words = this.words.value.trim();
    if (!words) return this.panel.work.complain("Type what to segment, for example: the lesion in the liver");
    if (!this.#wordsChoose()) {
      return this.place((prompts) => {
        prompts.words = words;
      });
    }
    const image = this.panel.image();
    const [found] = await this.byWords.run(words);
    if (found && this.panel.shows(image)) {
      this.choose(found);
      this.named = found;
      this.goTo(found);
    }
    this.refresh();
  }

  /** Whether the next words choose the structure: they chose the present one, or there is none. */
  #wordsChoose() {
    return [AS_WORDS_SAY, this.named].includes(this.target.value);
  }

  /** Whether a structure is locked, which is said then. */
  #isProtected(image, name) {
    const locked = labelmap.structures(image).some((item) => item.name === name && item.locked);
    if (locked) this.panel.work.complain(`${spoken(name)} is protected; open its lock to change it`);
    return locked;
  }

  /** Change the prompts of the chosen structure and ask for its mask; while one is asked for, after it. */
  async place(change) {
    const image = this.panel.image();
    if (!image || !(this.target.value || this.choose(ANYTHING))) return;
    this.named = null;
    const name = this.target.value;
    if (this.#isProtected(image, name)) return;
    if (this.panel.work.busy(KIND) && !this.asking) {
      return this.panel.work.complain("Nothing was placed: wait until the masks are here");
    }
    // One after the other: a second click must not be placed while the first one still takes up a mask made by hand.
    const placed = this.placing.then(async () => {
      const prompts = await this.#prompts(image, name);
      change(prompts);
      return prompts;
    });
    this.placing = placed.catch(() => {});
    const prompts = await placed;
    if (!this.panel.shows(image)) return prompts.revert();
    this.#buttons();
    this.again.set(name, image);
    this.steps.placed(image);
    if (this.asking) return;
    this.asking = true;
    try {
      while (this.again.size) {
        const [[next, where]] = this.again;
        this.again.delete(next);
        const asked = this.placements.of(where).get(next);
        if (!asked) continue;
        if (asked.empty) await this.#toStart(where, next, asked);
        else await this.#ask(where, next, asked);
      }
    } finally {
      this.asking = false;
    }
    this.refresh();
  }

  /** Prompts of a structure; anew on its present mask when that is not what our last answer gave. */
  async #prompts(image, name) {
    const placed = this.placements.of(image);
    let prompts = placed.get(name);
    const index = labelmap.indexOf(image, name);
    const now = fingerprints(labelmap.voxels(image))[index];
    if (!prompts) {
      prompts = new Prompts();
      placed.set(name, prompts);
    }
    if (now !== (prompts.fingerprint ?? "") && !this.panel.work.busy(KIND)) {
      const mask = now ? await maskOf(image, index) : null;
      prompts.startFrom(mask);
      prompts.fingerprint = now;
    }
    return prompts;
  }

  async #ask(image, name, prompts) {
    const first = !prompts.past.length;
    const sent = prompts.snapshot();
    const before = this.#standing(image, name);
    const title = `Segmenting ${spoken(name)}`;
    const mask = await this.panel.work.run(KIND, title, async (signal) => {
      return this.#infer(image, prompts.asParams(name), prompts.start, signal);
    });
    if (mask && sent.words !== (prompts.past.at(-1)?.words ?? "")) {
      sent.kept = await this.byWords.keeps(image, mask, { 1: name }, name);
    }
    const answered = mask && sent.kept && (await this.panel.work.run("paste", title, async () => {
      if (this.#standing(image, name) !== before) throw new Error("changed by hand meanwhile; nothing was pasted");
      labelmap.paste(image, mask, { 1: name }, sent.kept);
      return true;
    }));
    if (!answered) {
      prompts.revert();
      return;
    }
    prompts.kept = sent.kept;
    prompts.answered(sent);
    this.#note(image, name, prompts);
    if (first && prompts.words && !prompts.points.length) this.goTo(name, image);
    this.panel.work.say(`Segmented ${spoken(name)}`);
  }

  /** Voxels that the model answers; `start` is the mask (NRRD Blob, or null) to build on. */
  async #infer(image, prompts, start, signal) {
    const params = { client_id: clientId(), ...prompts };
    const { file } = await api.infer("medvl_interactive", image.series, params, { mask: start, signal });
    return readMask(image, file, signal);
  }

  /** Tells the voxels of a structure on screen from any others. */
  #standing(image, name) {
    return fingerprints(labelmap.voxels(image))[labelmap.indexOf(image, name)];
  }

  #note(image, name, prompts) {
    prompts.fingerprint = this.#standing(image, name);
  }

  /**
   * Undo or redo: ask for the prompts of the step before or after, which the server knows by what they hold. It keeps a
   * position of its own too, but that is one off once somebody stopped waiting for a step.
   */
  async move(direction) {
    const [image, name] = [this.panel.image(), this.target.value];
    const prompts = this.#placedNow();
    if (this.asking) return; // between two requests the buttons are open for a moment
    const said = direction === "undo" ? "One step back" : "One step forward";
    if (await this.steps.move(image, direction, said)) return this.refresh();
    if (!prompts?.[direction === "undo" ? "canUndo" : "canRedo"]) {
      return this.panel.work.complain("The masks were changed since the last step; undo that first");
    }
    if (this.#isProtected(image, name)) return;
    const before = this.#standing(image, name);
    if (before !== (prompts.fingerprint ?? "")) {
      return this.panel.work.complain(`${spoken(name)} was changed by hand since; undo that with the viewer's own tools`);
    }
    await this.panel.work.run(KIND, direction === "undo" ? "Undoing" : "Redoing", async (signal) => {
      const step = prompts.stepTo(direction);
      const mask = step && !isEmpty(step)
        ? await this.#infer(image, prompts.asParams(name, step), step.start, signal)
        : await voxelsOf(image, step ? step.start : prompts.base);
      signal.throwIfAborted();
      if (this.#standing(image, name) !== before) throw new Error("changed by hand meanwhile; nothing was pasted");
      labelmap.paste(image, mask, { 1: name }, step?.kept);
      if (direction === "undo") prompts.undone();
      else prompts.redone();
      this.#note(image, name, prompts);
      this.panel.work.say(said);
    });
    this.refresh();
  }

  /** The last prompt was taken away: the mask is what they built on, which may have been edited by hand. */
  async #toStart(image, name, prompts) {
    if (prompts.past.length && isEmpty(prompts.past.at(-1))) return; // nothing stood since it was edited
    const done = await this.panel.work.run("paste", `Taking the prompts of ${spoken(name)} away`, async (signal) => {
      const mask = await voxelsOf(image, prompts.start);
      signal.throwIfAborted();
      labelmap.paste(image, mask, { 1: name });
      return true;
    });
    if (done) this.placements.of(image).delete(name);
    else prompts.revert();
    this.refresh();
  }

  clearPrompts() {
    const [image, name] = [this.panel.image(), this.target.value];
    if (!image || this.#isProtected(image, name)) return;
    this.steps.paste(image, new Uint8Array(labelmap.voxels(image).length), { 1: name }, [], true);
    this.refresh();
  }

  /** Everything placed on an image, for the record of a saved version. */
  record(image) {
    return this.placements.record(image);
  }

  /** The masks of an image were replaced: nothing that was placed on it counts any more. */
  forget(image) {
    this.leave();
    this.placements.forget(image);
    this.automatic.forget(image);
    this.steps.forget(image);
  }

  /** Another image comes on screen. */
  leave() {
    this.again.clear();
  }
}
