// The list of what is placed for the chosen structure: each goes with a click.

import { button, make, replace } from "./dom.js";

export class PlacedList {
  /** `change(edit)` is called with what a click does to the `Prompts`. */
  constructor(change) {
    this.change = change;
    this.element = make("ul", { class: "placed", "aria-label": "Placed prompts" });
  }

  #item(text, edit) {
    const remove = button("×", () => this.change(edit), { "aria-label": `Remove ${text}` });
    return make("li", {}, make("span", {}, text), remove);
  }

  /** `prompts` may be undefined: nothing was placed. */
  refresh(prompts) {
    const items = (prompts?.points ?? []).map((point) =>
      this.#item(`${point.label ? "inside" : "outside"} ${point.voxel.join(", ")}`, (all) => all.removePoint(point)),
    );
    const without = (key, empty) => (all) => Object.assign(all, { [key]: empty });
    if (prompts?.box)
      items.push(this.#item(`box ${prompts.box.map((corner) => corner.join(", ")).join(" to ")}`, without("box", null)));
    if (prompts?.words) items.push(this.#item(`“${prompts.words}”`, without("words", "")));
    replace(this.element, ...items);
  }
}
