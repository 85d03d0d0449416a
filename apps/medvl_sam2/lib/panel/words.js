// Masks from words that choose their structures themselves, over nothing the annotator made unless they say so.

import * as api from "./api.js";
import { clientId } from "./annotator.js";
import { spoken } from "./dom.js";
import * as labelmap from "./labelmap.js";
import { readMask } from "./masks.js";

const LESION = /\b(lesion|cyst|tumou?r|mass|nodule|metastas[ie]s|finding)s?\b/i;
const A_LESION = /^lesion( \d+)?$/;

/**
 * Values that gain or lose voxels when those of `told` get exactly the voxels of `wanted`, as a table of 256. A value of
 * `lesions` takes nothing from another kind of structure: it lies in an organ, which is whole again when it goes.
 */
export function changedBy(now, wanted, told, lesions) {
  const changed = new Uint8Array(256);
  for (let n = 0; n < now.length; n++) {
    const [old, next] = [now[n], wanted[n]];
    if (old === next || !(next || told[old])) continue;
    changed[next] = 1;
    if (told[old] || !lesions[next] || lesions[old]) changed[old] = 1;
  }
  return changed;
}

/**
 * Which lesion a described one is: the one of `lesions` (values by name) that it covers most of, else the first name
 * that has no voxels yet and is not in `taken`.
 */
export function lesionFor(now, isIn, lesions, taken) {
  const [all, covered] = [new Array(256).fill(0), new Array(256).fill(0)];
  for (let n = 0; n < now.length; n++) {
    all[now[n]]++;
    if (isIn(n)) covered[now[n]]++;
  }
  const open = Object.entries(lesions).filter(([name, value]) => covered[value] && !taken.includes(name));
  if (open.length) return open.reduce((best, one) => (covered[one[1]] > covered[best[1]] ? one : best))[0];
  for (let number = 1; ; number++) {
    const name = number === 1 ? "lesion" : `lesion ${number}`;
    if (!all[lesions[name] ?? 255] && !taken.includes(name)) return name;
  }
}

export class Words {
  /** `segment` is the tab; `kind` its kind of work, so that one of them runs at a time. */
  constructor(segment, kind) {
    this.segment = segment;
    this.panel = segment.panel;
    this.kind = kind;
  }

  /** Paste what `words` say, and return the names of what was found; nothing when the annotator would not have it. */
  async run(words) {
    const { work } = this.panel;
    const image = this.panel.image();
    if (!image) return [];
    const reply = await work.run(this.kind, `Segmenting “${words}”`, async (signal) => {
      const asked = { client_id: clientId(), prompt: words };
      const { params, file } = await api.infer("medvl_referring", image.series, asked, { signal });
      const voxels = await readMask(image, file, signal);
      return { voxels, names: this.#structuresOf(image, voxels, params.label_names) };
    });
    if (!reply) return [];
    const { voxels, names } = reply;
    const found = Object.values(names);
    if (!found.length) work.say(`Nothing found for “${words}”`);
    const kept = found.length ? await this.keeps(image, voxels, names) : null;
    if (!kept) return [];
    // Of a kind of its own: a click may have been placed while the question stood.
    const pasted = await work.run("paste", `Segmenting “${words}”`, async () => {
      this.segment.steps.paste(image, voxels, names, kept);
      const said = kept.length ? `; kept ${kept.map(spoken).join(", ")}` : "";
      work.say(`Found ${found.map(spoken).join(", ")}${said}`);
      return true;
    });
    return pasted ? found : [];
  }

  /** The structure of every value that has voxels: "the cyst in the liver" is a lesion, unless somebody named one so. */
  #structuresOf(image, mask, described) {
    const [counts, now, names] = [labelmap.counts(mask), labelmap.voxels(image), {}];
    const known = labelmap.structures(image);
    const lesions = Object.fromEntries(
      known.filter(({ name }) => A_LESION.test(name)).map(({ name, index }) => [name, index]),
    );
    for (const [name, value] of Object.entries(described)) {
      if (!counts[value]) continue;
      const own = name !== "lesion" && (known.some((item) => item.name === name) || !LESION.test(spoken(name)));
      names[value] = own ? name : lesionFor(now, (n) => mask[n] === value, lesions, Object.values(names));
    }
    return names;
  }

  /**
   * Names that keep their voxels when a mask comes: of what the annotator made or changed, those they did not let go;
   * null to leave all as it is, also where the label map has no room for them, which is said. What belongs to `own` is
   * not asked about.
   */
  async keeps(image, mask, names, own = null) {
    try {
      return await this.#keeps(image, mask, names, own);
    } catch (error) {
      this.panel.work.complain(`Nothing was pasted: ${error.message}`);
      return null;
    }
  }

  async #keeps(image, mask, names, own) {
    if (!this.panel.shows(image)) return null;
    const affected = () => {
      const byHand = this.segment.automatic.byHand(image);
      const changed = this.#changed(image, mask, names);
      return new Map([...byHand].filter(([name]) => name !== own && changed.has(name)));
    };
    const given = await this.segment.automatic.mayReplace(affected());
    // What was painted while the question stood was not asked about: it is kept too.
    return given && [...affected()].filter(([name, now]) => now !== given.get(name)).map(([name]) => name);
  }

  #changed(image, mask, names) {
    const [target, told, lesions] = [new Uint8Array(256), new Uint8Array(256), new Uint8Array(256)];
    // A name is added with its voxels, not before the annotator said that they may come.
    const known = labelmap.structuresWith(image, Object.values(names));
    const indexOf = (wanted) => known.find(({ name }) => name === wanted).index;
    for (const [value, name] of Object.entries(names)) target[value] = indexOf(name);
    for (const value of target) told[value] = value ? 1 : 0;
    for (const { name, index } of known) lesions[index] = A_LESION.test(name) ? 1 : 0;
    const changed = changedBy(labelmap.voxels(image), mask.map((value) => target[value]), told, lesions);
    return new Set(known.filter(({ index }) => changed[index]).map(({ name }) => name));
  }
}
