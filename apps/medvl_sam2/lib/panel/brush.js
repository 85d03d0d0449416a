// OHIF's own brush and eraser, which its MONAI Label mode has but shows no buttons for.

import { button, make } from "./dom.js";
import { hasTool, setBrushSize, useTool } from "./viewer.js";

const TOOLS = { Brush: "CircularBrush", Eraser: "CircularEraser" };
const FIRST_MM = 20;

export class Brush {
  /** `begin()` is called before a tool is taken up, for the structure to paint must be the active one then; whether it is. */
  constructor(panel, begin) {
    this.panel = panel;
    this.begin = begin;
    this.tools = Object.entries(TOOLS).map(([text, tool]) =>
      button(text, () => this.use(tool), { "data-brush": tool, "aria-pressed": "false" }),
    );
    const resize = () => {
      this.width.textContent = `Width ${this.size.value} mm`;
      if (panel.image()) this.#resize();
    };
    this.size = make("input", { id: "medvl-brush", type: "range", min: 2, max: 60, value: FIRST_MM, oninput: resize });
    this.width = make("label", { for: "medvl-brush" });
    this.element = make(
      "div",
      {},
      make("h3", {}, "By hand"),
      make("div", { class: "row", role: "group", "aria-label": "The viewer's own tools" }, ...this.tools),
      make("div", { class: "field" }, this.width, this.size),
    );
    resize();
  }

  refresh(image) {
    this.element.hidden = !Object.values(TOOLS).every((tool) => hasTool(image, tool));
  }

  use(tool) {
    if (!this.panel.image()) return;
    const pressed = this.tools.find((control) => control.dataset.brush === tool).getAttribute("aria-pressed");
    if (pressed === "true") return this.putAway();
    if (!this.begin()) return;
    useTool(this.panel.image(), tool);
    this.#resize();
  }

  /** This tool is on the left mouse button now. */
  show(tool) {
    for (const control of this.tools) control.setAttribute("aria-pressed", String(control.dataset.brush === tool));
  }

  putAway() {
    if (this.tools.every((control) => control.getAttribute("aria-pressed") === "false")) return;
    useTool(this.panel.image(), "WindowLevel");
  }

  #resize() {
    setBrushSize(this.panel.image(), Number(this.size.value));
  }
}
