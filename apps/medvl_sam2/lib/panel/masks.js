// Masks on their way between the label map and the server: NRRD on the grid of an image.

import * as labelmap from "./labelmap.js";
import { readNrrd, writeNrrd } from "./nrrd.js";
import { gridOf } from "./viewer.js";

/** Voxels of a reply on the grid of `image`, unless nobody waits for them any more. */
export async function readMask(image, file, signal = null) {
  const mask = await readNrrd(file);
  signal?.throwIfAborted();
  labelmap.checkGrid(image, mask);
  return mask.voxels;
}

/** The mask of a structure by its value, as a NRRD Blob. */
export const maskOf = (image, index) =>
  writeNrrd(
    gridOf(image.volume),
    labelmap.voxels(image).map((value) => (value === index ? 1 : 0)),
  );

/** Voxels of such a Blob, or of nothing where it is null. */
export async function voxelsOf(image, mask) {
  if (!mask) return new Uint8Array(labelmap.voxels(image).length);
  return (await readNrrd(await mask.arrayBuffer())).voxels;
}
