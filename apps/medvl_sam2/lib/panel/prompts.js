// What an annotator has placed for one structure, and the steps back and forth through it.

const NOTHING = { points: [], box: null, words: "", kept: [] };

/** Whether nothing is placed: what stands then is the mask it started from. */
export const isEmpty = ({ points, box, words }) => !points.length && !box && !words;

/** Prompts of one structure; `start` is the mask (NRRD Blob) they build on, `base` the one before the first of them. */
export class Prompts {
  constructor() {
    this.points = [];
    this.box = null;
    this.words = "";
    this.kept = []; // other structures that keep their voxels: the annotator said so when the words came
    this.start = null;
    this.base = null;
    this.past = [];
    this.future = [];
    this.fingerprint = null;
  }

  get empty() {
    return isEmpty(this);
  }

  addPoint(voxel, label) {
    this.points = [...this.points, { voxel, label }];
  }

  setBox(a, b) {
    this.box = [a.map((n, axis) => Math.min(n, b[axis])), a.map((n, axis) => Math.max(n, b[axis]))];
  }

  /** `point` is one of `points`: its number would be another's once one before it went. */
  removePoint(point) {
    this.points = this.points.filter((one) => one !== point);
  }

  /** Begin anew on a mask that no prompt of ours made: another model's, or one edited by hand, which is a step too. */
  startFrom(mask) {
    Object.assign(this, NOTHING, { start: mask });
    if (this.past.length) return this.answered();
    this.base = mask;
    this.future = []; // those steps began on another mask
  }

  /** As `medvl_interactive` takes them: what stands, or what a step to go to holds. */
  asParams(name, { points, box, words, start } = this) {
    const of = (label) => points.filter((point) => point.label === label).map((point) => point.voxel);
    return {
      ...(start ? { label_name: name } : { label: name }),
      foreground: of(1),
      background: of(0),
      ...(box && { box }),
      ...(words && { prompt: words }),
    };
  }

  /** For the record of a saved version. */
  asRecord(name) {
    return {
      structure: name,
      points: this.points,
      box: this.box,
      words: this.words,
      started_from_mask: Boolean(this.start),
    };
  }

  /** What stands at this moment. */
  snapshot() {
    return { points: this.points, box: this.box, words: this.words, kept: this.kept, start: this.start };
  }

  /** The server answered what was sent, which more may have joined since: one more step to go back to. */
  answered(sent = this.snapshot()) {
    this.past.push(sent);
    this.future = [];
  }

  /** What stood, or stands again, a step away: `snapshot()`, or null before the first. */
  stepTo(direction) {
    return (direction === "undo" ? this.past.at(-2) : this.future.at(-1)) ?? null;
  }

  get canUndo() {
    return this.past.length > 0;
  }

  get canRedo() {
    return this.future.length > 0;
  }

  /** Go a step back; the prompts of the step before count again (none before the first). */
  undone() {
    this.future.push(this.past.pop());
    Object.assign(this, this.past.at(-1) ?? { ...NOTHING, start: this.base });
  }

  redone() {
    this.past.push(this.future.pop());
    Object.assign(this, this.past.at(-1));
  }

  /** Drop what was placed but never answered. */
  revert() {
    Object.assign(this, this.past.at(-1) ?? { ...NOTHING, start: this.base });
  }
}

/** Prompts of every structure, by series: they stay when another series of the study comes on screen. */
export class Placed {
  constructor() {
    this.series = new Map();
  }

  /** `Prompts` by the structure's name; `image` may be null. */
  of(image) {
    if (!image) return new Map();
    if (!this.series.has(image.series)) this.series.set(image.series, new Map());
    return this.series.get(image.series);
  }

  /** Everything placed on an image, for the record of a saved version. */
  record(image) {
    return [...this.of(image)].filter(([, one]) => !one.empty).map(([name, one]) => one.asRecord(name));
  }

  forget(image) {
    this.series.delete(image.series);
  }
}

/** A number a value of a label map that changes when its voxels do, as text: `fingerprints(voxels)[index]`. */
export function fingerprints(voxels) {
  const counts = new Float64Array(256);
  const mixes = new Uint32Array(256);
  for (let n = 0; n < voxels.length; n++) {
    counts[voxels[n]]++;
    let place = Math.imul(n + 1, 2654435761);
    place ^= place >>> 15; // else the sum of places alone would count: {1, 4} and {2, 3} would be one
    mixes[voxels[n]] += Math.imul(place, 2246822519);
  }
  return Array.from(counts, (count, value) => (count ? `${count}:${mixes[value]}` : ""));
}

/** Text that tells the voxels of a whole label map from any others; 0.2 s for 512 x 512 x 300. */
export const printOf = (voxels) => fingerprints(voxels).join();
