// The viewer's label map of the image on screen. For the first series it is segmentation "1", the one MONAI Label's own
// panel uses too, so that both edit the same voxels; another series of the study gets one of its own.

import { gridOf, sameGrid, viewports } from "./viewer.js";

const FIRST = "1";
const GOLDEN_TURN = 137.508;

const idOfSeries = new Map();
let shown = FIRST;

const segmentationService = () => window.services.segmentationService;
const segmentation = () =>
  segmentationService()
    .getSegmentations()
    .find((item) => item.segmentationId === shown);

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

/** Turn to the image's label map, made where there is none with these names, sorted as MONAI Label's panel does. */
export async function ensure(image, names) {
  const known = segmentationService().getSegmentations();
  if (!known.some((item) => item.segmentationId === FIRST)) idOfSeries.clear(); // another study was opened
  if (!idOfSeries.has(image.series)) idOfSeries.set(image.series, idOfSeries.size ? `medvl-${image.series}` : FIRST);
  shown = idOfSeries.get(image.series);
  if (segmentation() && segmentationService().getLabelmapVolume(shown)) return;
  const sorted = [...new Set(names)].sort();
  await create(image, shown, "Segmentations", Object.fromEntries(sorted.map((name, n) => [n + 1, name])));
}

/** Names of the label map with their values, colours and locks: `[{name, index, colour, locked}]`. */
export function structures(image) {
  const [viewport] = viewports(image);
  return Object.values(segmentation()?.segments ?? {})
    .filter(Boolean)
    .map((segment) => ({
      name: segment.label,
      index: segment.segmentIndex,
      locked: Boolean(segment.locked),
      colour:
        (viewport && segmentationService().getSegmentColor(viewport.id, shown, segment.segmentIndex)) ??
        colour(segment.segmentIndex),
    }));
}

/** Value of a structure, which is added when the label map lacks it. */
export function indexOf(image, name) {
  const known = structures(image);
  const found = known.find((item) => item.name === name);
  if (found) return found.index;
  const index = known.reduce((most, item) => Math.max(most, item.index), 0) + 1;
  if (index > 254) throw new Error("the label map is full: it holds 254 structures");
  segmentationService().addSegment(shown, { segmentIndex: index, label: name, color: colour(index) });
  return index;
}

/** Make a structure the one the viewer's own brush paints. */
export function activate(image, name) {
  const index = indexOf(image, name);
  for (const { id } of viewports(image)) segmentationService().setActiveSegmentation(id, shown);
  segmentationService().setActiveSegment(shown, index);
}

export const setLocked = (index, locked) => segmentationService().setSegmentLocked(shown, index, locked);

export function setVisible(image, index, visible) {
  for (const { id } of viewports(image))
    segmentationService().setSegmentVisibility(id, shown, index, visible, "Labelmap");
}

/** All voxels of the label map, first axis fastest. */
export const voxels = () => segmentationService().getLabelmapVolume(shown).voxelManager.getCompleteScalarDataArray();

export function put(values, id = shown) {
  segmentationService().getLabelmapVolume(id).voxelManager.setCompleteScalarDataArray(values);
  const { eventTarget, triggerEvent } = window.cornerstone;
  triggerEvent(eventTarget, window.cornerstoneTools.Enums.Events.SEGMENTATION_DATA_MODIFIED, { segmentationId: id });
}

/** Call `then` whenever voxels change, by whatever tool. */
export function onChange(then) {
  const { SEGMENTATION_DATA_MODIFIED } = window.cornerstoneTools.Enums.Events;
  window.cornerstone.eventTarget.addEventListener(SEGMENTATION_DATA_MODIFIED, (event) => {
    if (event.detail?.segmentationId === shown) then();
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
  if (idOfSeries.get(image.series) !== shown) throw new Error("another series is on screen now; nothing was pasted");
}

/** Masks that would be lost under others: what a structure covered comes back when it withdraws. */
let covered = { series: null, values: null };

function coveredOf(image, length) {
  if (covered.series !== image.series || covered.values.length !== length) {
    covered = { series: image.series, values: new Uint8Array(length) };
  }
  return covered.values;
}

/**
 * Replace structures: `values` are mask voxels, `names` maps the mask's values to names, and every named structure has
 * afterwards exactly the mask's voxels, but for those of locked structures.
 */
export function paste(image, values, names) {
  checkShown(image);
  const now = voxels();
  if (values.length !== now.length)
    throw new Error(`the mask has ${values.length} voxels, the label map ${now.length}`);
  const target = new Uint8Array(256);
  const replaced = new Uint8Array(256);
  for (const [value, name] of Object.entries(names)) {
    target[value] = indexOf(image, name);
    replaced[target[value]] = 1;
  }
  const locked = new Uint8Array(256);
  for (const item of structures(image)) if (item.locked) locked[item.index] = 1;
  const under = coveredOf(image, now.length);
  const next = new Uint8Array(now.length);
  for (let n = 0; n < now.length; n++) {
    const [old, wanted] = [now[n], target[values[n]]];
    if (locked[old]) next[n] = old;
    else if (wanted) {
      if (old && !replaced[old]) under[n] = old;
      next[n] = wanted;
    } else if (replaced[old]) {
      next[n] = replaced[under[n]] ? 0 : under[n];
      under[n] = 0;
    } else next[n] = old;
  }
  put(next);
}

/** Replace everything: for a version that is opened again. */
export function pasteAll(image, values, names) {
  checkShown(image);
  coveredOf(image, values.length).fill(0);
  const target = new Uint8Array(256);
  for (const [value, name] of Object.entries(names)) target[value] = indexOf(image, name);
  put(values.map((value) => target[value]));
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

/** Show a mask beside the label map, never in it: the structure an answer rests on. */
export async function showEvidence(image, values, name) {
  await hideEvidence();
  await create(image, EVIDENCE, "Evidence", { 1: name }, () => EVIDENCE_COLOUR);
  put(
    values.map((value) => (value ? 1 : 0)),
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
