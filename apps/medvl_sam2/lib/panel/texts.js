// The tab "Text": the page of the image on screen. Every series keeps its own, with what was typed and not stored.

import { make, replace } from "./dom.js";
import { TextPage } from "./text_page.js";

export class Texts {
  /** `panel` has `image()` and what a page needs. */
  constructor(panel) {
    this.panel = panel;
    this.pages = new Map(); // by series
    this.page = null;
    this.others = make("p", { class: "hint" });
    this.place = make("div", {}, make("p", { class: "hint" }, "No image on screen yet"));
    this.element = make("div", {}, this.place, this.others);
    panel.work.onChange(() => this.page?.refresh());
  }

  /** Images with a text that was typed or corrected and not stored. */
  unsaved() {
    return this.#unsavedPages().map((page) => page.image);
  }

  #unsavedPages() {
    return [...this.pages.values()].filter((page) => page.unsaved().length);
  }

  /** Store them all; resolves to whether every one is. */
  async storeAll() {
    for (const page of this.#unsavedPages())
      for (const kind of page.unsaved()) if (!(await page.store(kind))) return false;
    return true;
  }

  /** The annotator lets go what is not stored. */
  forgetChanges() {
    this.pages.clear();
  }

  /** Another image came on screen. */
  async refresh() {
    const image = this.panel.image();
    if (!image) return;
    this.page?.hideEvidence();
    this.page = this.pages.get(image.series) ?? new TextPage(this.panel, image, () => this.#tellOthers());
    this.pages.set(image.series, this.page);
    replace(this.place, this.page.element);
    this.#tellOthers();
    await this.panel.work.run("texts", "Reading the texts", (signal) => this.page.load(signal));
  }

  #tellOthers() {
    const others = this.unsaved().filter((image) => image !== this.page?.image);
    const named = others.map((image) => image.description || image.series);
    this.others.textContent = named.length ? `Not stored either: ${named.join(", ")}` : "";
  }
}
