// The viewer's label map of the image on screen. For the first series it is segmentation "1", the one MONAI Label's own
// panel uses too, so that both edit the same voxels; another series of the study gets one of its own.

import { Layers } from "./layers.js";
import { gridOf, sameGrid, viewports } from "./viewer.js";

const FIRST = "1";
const GOLDEN_TURN = 137.508;

/** Of every series that was on screen: `{id, image, layers}`, `id` being that of its label map. */
const known = new Map();
let shown = FIRST;

const segmentationService = () => window.services.segmentationService;
const segmentation = (id) =>
  segmentationService()
    .getSegmentations()
    .find((item) => item.segmentationId === id);

/** Id of the label map of an image; the viewer drops it with its study. */
function idOf(image) {
  const found = known.get(image.series);
  if (!found) throw new Error("the masks of this image are no longer in the viewer");
  return found.id;
}

/** Colours far apart for neighbouring numbers. */
function colour(index) {
  const hue = (index * GOLDEN_TURN) % 360;
  const channel = (n) => {
    const k = (n + hue / 30) % 12;
    return Math.round(255 * (0.6 - 0.4 * Math.max(-1, Math.min(k - 3, 9 - k, 1))));
  };
  return [channel(0), channel(8), channel(4), 255];
}

/** Make a segmentation of the viewer with these segments (`{index: name}`) for the image on screen. */
async function create(image, id, label, names, colourOf = colour) {
  const segments = Object.fromEntries(
    Object.entries(names).map(([index, name], n) => [
      index,
      { segmentIndex: Number(index), label: name, active: n === 0, locked: false, color: colourOf(Number(index)) },
    ]),
  );
  const config = { label, segments };
  const made = { segmentationId: id, representation: { type: "Labelmap" }, config };
  await window.commandsManager.runCommand("loadSegmentationsForViewport", { segmentations: [made] });
  for (let wait = 0; !segmentationService().getLabelmapVolume(id); wait += 50) {
    if (wait > 10000) throw new Error("the viewer did not make a label map; reload the page");
    await new Promise((resolve) => setTimeout(resolve, 50));
  }
  for (const { id: viewport } of viewports(image)) {
    for (const index of Object.keys(segments)) {
      if (segmentationService().getSegmentationRepresentations(viewport, { segmentationId: id }).length) {
        segmentationService().setSegmentColor(viewport, id, Number(index), colourOf(Number(index)));
      }
    }
  }
}

/**
 * Turn to the image's label map, made where there is none with these names, sorted as MONAI Label's panel does. Resolves
 * to whether this panel sees it for the first time.
 */
export async function ensure(image, names) {
  if (!segmentation(FIRST)) known.clear(); // another study was opened
  const before = known.get(image.series);
  const id = before?.id ?? (known.size ? `medvl-${image.series}` : FIRST);
  const missing = !segmentation(id) || !segmentationService().getLabelmapVolume(id);
  if (missing) {
    const sorted = [...new Set(names)].sort();
    await create(image, id, "Segmentations", Object.fromEntries(sorted.map((name, n) => [n + 1, name])));
  }
  const length = image.volume.dimensions.reduce((product, size) => product * size, 1);
  const layers = (!missing && before?.layers) || new Layers(length);
  known.set(image.series, { id, image, layers });
  shown = id;
  return missing || !before;
}

/** Whether the label map of a series is still in the viewer, which drops it with its study. */
export const holds = (image) => known.has(image.series) && Boolean(segmentation(known.get(image.series).id));

/** Names of the label map with their values, colours and locks: `[{name, index, colour, locked}]`. */
export function structures(image) {
  const [viewport] = viewports(image);
  const id = idOf(image);
  return Object.values(segmentation(id)?.segments ?? {})
    .filter(Boolean)
    .map((segment) => ({
      name: segment.label,
      index: segment.segmentIndex,
      locked: Boolean(segment.locked),
      colour:
        (viewport && segmentationService().getSegmentColor(viewport.id, id, segment.segmentIndex)) ??
        colour(segment.segmentIndex),
    }));
}

/** The structures, and what those of `names` that are missing would be: `{name, index, missing}`; none is added. */
export function structuresWith(image, names) {
  const all = structures(image);
  for (const name of names) {
    if (all.some((item) => item.name === name)) continue;
    const index = all.reduce((most, item) => Math.max(most, item.index), 0) + 1;
    if (index > 254) throw new Error("the label map is full: it holds 254 structures");
    all.push({ name, index, missing: true });
  }
  return all;
}

/** Value of a structure, which is added when the label map lacks it. */
export function indexOf(image, name) {
  const { index, missing } = structuresWith(image, [name]).find((item) => item.name === name);
  if (missing)
    segmentationService().addSegment(idOf(image), { segmentIndex: index, label: name, color: colour(index) });
  return index;
}

/** Make a structure the one the viewer's own brush paints. */
export function activate(image, name) {
  const [id, index] = [idOf(image), indexOf(image, name)];
  for (const viewport of viewports(image)) segmentationService().setActiveSegmentation(viewport.id, id);
  segmentationService().setActiveSegment(id, index);
}

export const setLocked = (image, index, locked) =>
  segmentationService().setSegmentLocked(idOf(image), index, locked);

export function setVisible(image, index, visible) {
  for (const { id } of viewports(image))
    segmentationService().setSegmentVisibility(id, idOf(image), index, visible, "Labelmap");
}

/** Whether a structure is drawn; another panel of the viewer may have hidden it, and shown it again. */
export function isVisible(image, index) {
  const representations = viewports(image).flatMap(({ id }) =>
    segmentationService().getSegmentationRepresentations(id, { segmentationId: idOf(image) }),
  );
  return representations.every((one) => one.segments?.[index]?.visible !== false);
}

/** All voxels of a label map, of the one on screen unless another image is named; first axis fastest. */
export const voxels = (image = null) =>
  segmentationService()
    .getLabelmapVolume(image ? idOf(image) : shown)
    .voxelManager.getCompleteScalarDataArray();

export function isEmpty(image) {
  const values = voxels(image);
  for (let n = 0; n < values.length; n++) if (values[n]) return false; // `every` takes several times as long
  return true;
}

export function put(values, id = shown) {
  segmentationService().getLabelmapVolume(id).voxelManager.setCompleteScalarDataArray(values);
  const { eventTarget, triggerEvent } = window.cornerstone;
  triggerEvent(eventTarget, window.cornerstoneTools.Enums.Events.SEGMENTATION_DATA_MODIFIED, { segmentationId: id });
}

/** Call `then(image)` whenever voxels of its label map change, by whatever tool. */
export function onChange(then) {
  const { SEGMENTATION_DATA_MODIFIED } = window.cornerstoneTools.Enums.Events;
  window.cornerstone.eventTarget.addEventListener(SEGMENTATION_DATA_MODIFIED, (event) => {
    const changed = [...known.values()].find((item) => item.id === event.detail?.segmentationId);
    if (changed) then(changed.image);
  });
}

/** Voxels of every value: a table of 256 counts. */
export function counts(values) {
  const table = new Array(256).fill(0);
  for (let n = 0; n < values.length; n++) table[values[n]]++;
  return table;
}

/** Refuse a mask that does not lie on the grid of the image on screen. */
export function checkGrid(image, mask) {
  if (!sameGrid(mask, gridOf(image.volume))) {
    throw new Error(
      `the server's mask (${mask.sizes.join(" x ")}) does not lie on the grid of the image on screen; nothing was pasted`,
    );
  }
}

/** Refuse what was asked for an image that is no longer on screen: it would land in the label map of another one. */
function checkShown(image) {
  if (known.get(image.series)?.id !== shown) throw new Error("another series is on screen now; nothing was pasted");
}

/**
 * Replace structures: `values` are mask voxels, `names` maps the mask's values to names, and every named structure has
 * afterwards exactly the mask's voxels. Locked structures and those named in `kept` stay as they are.
 */
export function paste(image, values, names, kept = []) {
  checkShown(image);
  const now = voxels();
  if (values.length !== now.length)
    throw new Error(`the mask has ${values.length} voxels, the label map ${now.length}`);
  const target = new Uint8Array(256);
  for (const [value, name] of Object.entries(names)) target[value] = indexOf(image, name);
  const [replaced, locked] = [new Uint8Array(256), new Uint8Array(256)];
  for (const item of structures(image)) if (item.locked || kept.includes(item.name)) locked[item.index] = 1;
  for (const value of Object.keys(names)) {
    if (locked[target[value]]) target[value] = 0;
    else replaced[target[value]] = 1;
  }
  const wanted = values.map((value) => target[value]);
  put(known.get(image.series).layers.place(now, wanted, replaced, locked));
}

/** Replace everything: for a version that is opened again. */
export function pasteAll(image, values, names) {
  checkShown(image);
  const target = new Uint8Array(256);
  for (const [value, name] of Object.entries(names)) target[value] = indexOf(image, name);
  const next = values.map((value) => target[value]);
  known.get(image.series).layers.reset(next);
  put(next);
}

/** Bring back voxels of this label map that were taken before. */
export function putBack(image, values) {
  checkShown(image);
  known.get(image.series).layers.reset(values);
  put(values);
}

/** Do `act`, which pastes, and return what it changed, with the `bytes` that takes: for `takeStep`. */
export function stepOf(image, act) {
  checkShown(image);
  const { layers } = known.get(image.series);
  layers.settle(voxels());
  const [now, under] = [voxels().slice(), layers.under.slice()];
  act();
  const step = { values: difference(now, voxels()), under: difference(under, layers.under) };
  const parts = Object.values(step).flatMap((one) => Object.values(one));
  return { ...step, bytes: parts.reduce((sum, part) => sum + part.byteLength, 0) };
}

/** Go back over a step ("undo"), or over it again ("redo"). */
export function takeStep(image, step, direction) {
  checkShown(image);
  const met = new Set([...step.values.before, ...step.values.after]);
  const locked = structures(image).find((item) => item.locked && met.has(item.index));
  if (locked) throw new Error(`${locked.name} is protected; open its lock to change it`);
  const { layers } = known.get(image.series);
  const [values, under] = [voxels().slice(), layers.under.slice()];
  follow(values, step.values, direction);
  follow(under, step.under, direction);
  layers.reset(values);
  layers.under = under;
  put(values);
}

/** Where two arrays differ, and what stands there. */
function difference(before, after) {
  let count = 0;
  for (let n = 0; n < before.length; n++) if (before[n] !== after[n]) count++;
  const places = new Uint32Array(count);
  for (let n = before.length - 1; n >= 0; n--) if (before[n] !== after[n]) places[--count] = n;
  const at = (values) => {
    const found = new Uint8Array(places.length);
    for (let n = 0; n < places.length; n++) found[n] = values[places[n]];
    return found;
  };
  return { places, before: at(before), after: at(after) };
}

function follow(values, { places, before, after }, direction) {
  const wanted = direction === "undo" ? before : after;
  places.forEach((place, n) => {
    values[place] = wanted[n];
  });
}

/** Centre of the set voxels, moved to the nearest set one: a place to jump to. Null for an empty mask. */
export function centre(values, [width, height], isIn) {
  const sum = [0, 0, 0];
  const inside = [];
  for (let n = 0; n < values.length; n++) {
    if (!isIn(values[n])) continue;
    const voxel = [n % width, Math.floor(n / width) % height, Math.floor(n / (width * height))];
    voxel.forEach((part, axis) => {
      sum[axis] += part;
    });
    inside.push(n);
  }
  if (!inside.length) return null;
  const middle = sum.map((total) => total / inside.length);
  let best = null;
  let least = Infinity;
  for (const n of inside) {
    const voxel = [n % width, Math.floor(n / width) % height, Math.floor(n / (width * height))];
    const distance = voxel.reduce((total, part, axis) => total + (part - middle[axis]) ** 2, 0);
    if (distance < least) [best, least] = [voxel, distance];
  }
  return best;
}

const EVIDENCE = "medvl-evidence";
const EVIDENCE_COLOUR = [255, 209, 102, 255];
/** A value that no structure has: the viewer keeps one table of colours for all label maps. */
const EVIDENCE_VALUE = 255;

/** Show a mask beside the label map, never in it: the structure an answer rests on. */
export async function showEvidence(image, values, name) {
  hideEvidence();
  checkShown(image);
  await create(image, EVIDENCE, "Evidence", { [EVIDENCE_VALUE]: name }, () => EVIDENCE_COLOUR);
  try {
    checkShown(image);
  } catch (error) {
    hideEvidence(); // it was made on the viewport of the other one
    throw error;
  }
  put(
    values.map((value) => (value ? EVIDENCE_VALUE : 0)),
    EVIDENCE,
  );
}

export function hideEvidence() {
  if (
    segmentationService()
      .getSegmentations()
      .some((item) => item.segmentationId === EVIDENCE)
  ) {
    segmentationService().remove(EVIDENCE);
  }
}
