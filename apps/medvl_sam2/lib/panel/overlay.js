// Marks of placed prompts on the images, and the clicks that place them.

import { onCanvas, onDrawn, planeDistance, viewportUnder, viewports, voxelAt } from "./viewer.js";

const SVG = "http://www.w3.org/2000/svg";
const SWALLOWED = ["mousedown", "mouseup", "click", "dblclick", "touchstart"];

function shape(tag, attributes, text) {
  const element = document.createElementNS(SVG, tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  if (text) element.textContent = text;
  return element;
}

/**
 * Draws `marks()` (`{points: [{voxel, label}], box: [low, high] or null}`) on every viewport of `image()`, and hands
 * clicks on while `tool` is "add", "remove" or "box". Other buttons and the wheel stay OHIF's.
 */
export class Overlay {
  constructor({ image, marks, onPoint, onBox, onRemovePoint, onMiss }) {
    Object.assign(this, { image, marks, onPoint, onBox, onRemovePoint, onMiss });
    this.tool = null;
    this.drag = null;
    onDrawn(() => this.draw());
    document.addEventListener("pointerdown", (event) => this.#down(event), true);
    document.addEventListener("pointermove", (event) => this.#move(event), true);
    document.addEventListener("pointerup", (event) => this.#up(event), true);
    for (const name of SWALLOWED) document.addEventListener(name, (event) => this.#swallow(event), true);
  }

  use(tool) {
    this.tool = tool;
    document.documentElement.classList.toggle("medvl-placing", Boolean(tool));
    this.draw();
  }

  #viewport(event) {
    const image = this.tool && event.button !== 1 && event.button !== 2 && this.image();
    return image ? viewportUnder(image, event.target) : null;
  }

  #swallow(event) {
    if (!this.#viewport(event)) return;
    event.preventDefault();
    event.stopImmediatePropagation();
  }

  #down(event) {
    const viewport = this.#viewport(event);
    if (!viewport) return;
    this.#swallow(event);
    const mark = event.target.closest?.("[data-medvl-point]");
    if (mark) return this.onRemovePoint(this.marks().points[mark.dataset.medvlPoint]);
    const image = this.image();
    const voxel = voxelAt(image, viewport, event.clientX, event.clientY);
    if (!voxel) return this.onMiss();
    if (this.tool === "box") this.drag = { image, viewport, from: voxel, to: voxel };
    else this.onPoint(voxel, this.tool === "add" ? 1 : 0);
  }

  #move(event) {
    if (!this.drag) return;
    const voxel = voxelAt(this.drag.image, this.drag.viewport, event.clientX, event.clientY);
    if (voxel) this.drag.to = voxel;
    this.draw();
  }

  #up() {
    if (!this.drag) return;
    const { image, from, to } = this.drag;
    this.drag = null;
    const left = this.image()?.series !== image.series;
    if (left || from.every((n, axis) => n === to[axis])) this.draw();
    else this.onBox(from, to);
  }

  draw() {
    const image = this.image();
    if (!image) return;
    const { points, box } = this.marks();
    const drawn = this.drag?.image.series === image.series ? [this.drag.from, this.drag.to] : box;
    for (const viewport of viewports(image)) {
      let layer = viewport.element.querySelector(":scope > svg.medvl-marks");
      if (!layer) {
        layer = shape("svg", { class: "medvl-marks" });
        viewport.element.append(layer);
      }
      const near = 0.6 * planeDistance(image, viewport);
      layer.replaceChildren(
        ...(drawn ? boxShape(image, viewport, drawn, near) : []),
        ...this.#points(image, viewport, points, near),
      );
    }
  }

  #points(image, viewport, points, near) {
    return points.flatMap(({ voxel, label }, n) => {
      const { x, y, distance } = onCanvas(image, viewport, voxel);
      if (distance > near) return [];
      const mark = shape("g", {
        "data-medvl-point": n,
        class: label ? "add" : "remove",
        transform: `translate(${x} ${y})`,
      });
      mark.append(shape("circle", { r: 7 }), shape("text", { y: 4, "text-anchor": "middle" }, label ? "+" : "−"));
      return [mark];
    });
  }
}

function boxShape(image, viewport, [a, b], near) {
  const [p, q] = [onCanvas(image, viewport, a), onCanvas(image, viewport, b)];
  const thin = [0, 1, 2].some((axis) => a[axis] === b[axis]);
  if (thin && Math.min(p.distance, q.distance) > near) return [];
  const [x, y] = [Math.min(p.x, q.x), Math.min(p.y, q.y)];
  return [shape("rect", { x, y, width: Math.abs(p.x - q.x), height: Math.abs(p.y - q.y) })];
}
