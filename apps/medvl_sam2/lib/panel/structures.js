// The list of structures that have a mask: go there, hide, protect.

import { button, make, replace, spoken } from "./dom.js";
import * as labelmap from "./labelmap.js";

export class Structures {
  /** `choose(name)` is called for a structure that is clicked, `changed()` after it was hidden or protected. */
  constructor({ choose, changed }) {
    Object.assign(this, { choose, changed });
    this.element = make("ul", { class: "structures", "aria-label": "Structures with a mask" });
  }

  /** `known` as `labelmap.structures` gives it, `counts` of their voxels by value. */
  refresh(image, known, counts) {
    const items = known.filter(({ index }) => counts[index]).map((item) => this.#item(image, item, counts[item.index]));
    replace(this.element, ...(items.length ? items : [make("li", { class: "hint" }, "none yet")]));
  }

  #item(image, { name, index, locked, colour }, count) {
    const hidden = !labelmap.isVisible(image, index);
    const toggle = (text, set, label, act) => {
      const change = () => {
        act();
        this.changed();
      };
      return button(text, change, {
        class: set ? "set" : null,
        "aria-label": `${label} ${spoken(name)}`,
        title: label,
      });
    };
    return make(
      "li",
      { "data-structure": name },
      make("span", { class: "chip", style: `background: rgb(${colour.slice(0, 3).join(" ")})`, "aria-hidden": "true" }),
      button(spoken(name), () => this.choose(name), { class: "link", title: "Choose it and go there" }),
      make("span", { class: "count" }, count.toLocaleString("en")),
      toggle(hidden ? "show" : "hide", hidden, hidden ? "Show" : "Hide", () =>
        labelmap.setVisible(image, index, hidden),
      ),
      toggle(locked ? "unlock" : "lock", locked, locked ? "Release" : "Protect from being overwritten:", () =>
        labelmap.setLocked(image, index, !locked),
      ),
    );
  }
}
