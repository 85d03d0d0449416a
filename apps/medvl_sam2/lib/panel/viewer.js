// What the panel needs of OHIF, all through what OHIF puts on the page: services, commands, cornerstone.

const ROUTE = "/ohif/monai-label";
export const IMAGES = ["CT", "MR"];

const services = () => window.services;
const viewportService = () => services().cornerstoneViewportService;

export const studyAddress = (study) => `${ROUTE}?StudyInstanceUIDs=${encodeURIComponent(study)}`;

/** The image on screen: `{series, study, description, displaySet, viewport, volume}`, or null while there is none. */
export function current() {
  const grid = services()?.viewportGridService?.getState();
  if (!grid) return null;
  const ids = [grid.activeViewportId, ...grid.viewports.keys()];
  for (const id of ids) {
    const viewport = viewportService().getCornerstoneViewport(id);
    const volume = viewport?.getVolumeId && window.cornerstone.cache.getVolume(viewport.getVolumeId());
    const shown = grid.viewports.get(id)?.displaySetInstanceUIDs?.[0];
    const displaySet = shown && services().displaySetService.getDisplaySetByUID(shown); // which refuses undefined
    if (volume?.imageData && displaySet && IMAGES.includes(displaySet.Modality)) {
      return {
        series: displaySet.SeriesInstanceUID,
        study: displaySet.StudyInstanceUID,
        description: displaySet.SeriesDescription ?? "",
        modality: displaySet.Modality,
        patient: displaySet.instances?.[0]?.PatientID ?? "",
        displaySet,
        viewport,
        volume,
      };
    }
  }
  return null;
}

/** The study the address names, for a hint where no volume of it is on screen. */
export const studyInAddress = () => new URLSearchParams(location.search).get("StudyInstanceUIDs");

export const isAnnotating = () => location.pathname.endsWith("/monai-label");

export const isStudyList = () => location.pathname.replace(/\/$/, "") === "/ohif";

/** Every viewport that shows the volume of `image`. */
export function viewports(image) {
  const ids = [...services().viewportGridService.getState().viewports.keys()];
  return ids
    .map((id) => viewportService().getCornerstoneViewport(id))
    .filter((viewport) => viewport?.getVolumeId && viewport.getVolumeId() === image.volume.volumeId);
}

/** The grid of a volume as NRRD states it: sizes, steps from voxel to voxel and origin in LPS mm. */
export function gridOf(volume) {
  const direction = Array.from(volume.direction);
  const axes = [0, 1, 2].map((n) => direction.slice(3 * n, 3 * n + 3).map((part) => part * volume.spacing[n]));
  return { sizes: Array.from(volume.dimensions), axes, origin: Array.from(volume.origin) };
}

/** Whether two grids put every voxel at the same place, within half a voxel. */
export function sameGrid(a, b) {
  if (a.sizes.some((size, n) => size !== b.sizes[n])) return false;
  const at = (grid, corner) =>
    grid.origin.map(
      (start, d) => start + grid.axes.reduce((sum, axis, n) => sum + axis[d] * corner[n] * (grid.sizes[n] - 1), 0),
    );
  const half = 0.5 * Math.min(...b.axes.map((axis) => Math.hypot(...axis)));
  return [
    [0, 0, 0],
    [1, 0, 0],
    [0, 1, 0],
    [0, 0, 1],
  ].every((corner) => {
    const [p, q] = [at(a, corner), at(b, corner)];
    return Math.hypot(p[0] - q[0], p[1] - q[1], p[2] - q[2]) <= half;
  });
}

/** Stored voxel [i, j, k] under a place of the page, or null outside the volume. */
export function voxelAt(image, viewport, clientX, clientY) {
  const box = viewport.canvas.getBoundingClientRect();
  const world = viewport.canvasToWorld([clientX - box.left, clientY - box.top]);
  const voxel = image.volume.imageData.worldToIndex(world).map(Math.round);
  return voxel.every((n, axis) => n >= 0 && n < image.volume.dimensions[axis]) ? voxel : null;
}

/** Where a voxel lies on the canvas of a viewport, in CSS pixels, and how far from its plane, in mm. */
export function onCanvas(image, viewport, voxel) {
  const world = Array.from(image.volume.imageData.indexToWorld(voxel));
  const { viewPlaneNormal, focalPoint } = viewport.getCamera();
  const distance = world.reduce((sum, x, n) => sum + (x - focalPoint[n]) * viewPlaneNormal[n], 0);
  const [x, y] = viewport.worldToCanvas(world);
  return { x, y, distance: Math.abs(distance) };
}

/** Distance of neighbouring planes of the volume along a viewport's line of sight, in mm. */
export function planeDistance(image, viewport) {
  const { viewPlaneNormal } = viewport.getCamera();
  const { axes } = gridOf(image.volume);
  return Math.max(...axes.map((axis) => Math.abs(axis.reduce((sum, x, n) => sum + x * viewPlaneNormal[n], 0))));
}

/** Show a voxel in every viewport. */
export function jumpTo(image, voxel) {
  const world = Array.from(image.volume.imageData.indexToWorld(voxel));
  for (const viewport of viewports(image)) {
    viewport.jumpToWorld?.(world);
    viewport.render();
  }
}

function toolGroups(image) {
  const groups = viewports(image).map((viewport) => services().toolGroupService.getToolGroupForViewport(viewport.id));
  return [...new Map(groups.filter(Boolean).map((group) => [group.id, group])).values()];
}

/** Whether the viewer has a tool of this name in the viewports of the image. */
export const hasTool = (image, tool) => toolGroups(image).some((group) => group.hasTool(tool));

/** Put one of OHIF's own tools on the left mouse button. */
export function useTool(image, tool) {
  const toolGroupIds = toolGroups(image).map((group) => group.id);
  window.commandsManager.runCommand("setToolActiveToolbar", { toolName: tool, toolGroupIds });
}

/** Call `then(name)` when a tool of OHIF's is put on the left mouse button of `image()`, by whomever. */
export function onTool(image, then) {
  window.cornerstone.eventTarget.addEventListener(window.cornerstoneTools.Enums.Events.TOOL_ACTIVATED, ({ detail }) => {
    const groups = image() ? toolGroups(image()) : [];
    if (groups.some((group) => group.getActivePrimaryMouseButtonTool() === detail.toolName)) then(detail.toolName);
  });
}

export function setBrushSize(image, millimetres) {
  const { setBrushSizeForToolGroup } = window.cornerstoneTools.utilities.segmentation;
  for (const group of toolGroups(image)) setBrushSizeForToolGroup(group.id, millimetres / 2);
}

/** Call `then` after each drawing of any viewport; returns how to stop. */
export function onDrawn(then) {
  const { IMAGE_RENDERED } = window.cornerstone.Enums.Events;
  // Dispatched on each viewport's element, which comes and goes; it bubbles to nothing, so listen while it passes down.
  document.addEventListener(IMAGE_RENDERED, then, true);
  return () => document.removeEventListener(IMAGE_RENDERED, then, true);
}

/** The viewport whose element holds a place of the page. */
export function viewportUnder(image, target) {
  return viewports(image).find((viewport) => viewport.element.contains(target)) ?? null;
}

/** Close OHIF's own side panels where three would leave the images no room; one click opens either again. */
export function makeRoom() {
  if (window.innerWidth >= 1600) return;
  // An open panel's arrow stands in its header; a closed one's is a bar of its own.
  for (const side of ["left", "right"])
    document.querySelector(`[data-cy="side-panel-header-${side}"].absolute`)?.click();
}
