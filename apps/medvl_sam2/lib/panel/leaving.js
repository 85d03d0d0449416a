// OHIF's ways out of a study that load no page: its back arrow, and the browser's back and forward.

const ARROW = '[data-cy="return-to-work-list"]';

/** Holds OHIF back while `unsaved()`, until `mayLeave()` resolves to true. OHIF itself is not changed. */
export class Leaving {
  constructor({ unsaved, mayLeave }) {
    Object.assign(this, { unsaved, mayLeave });
    this.passing = false;
    document.addEventListener("click", (event) => this.#clicked(event), true);
    // "popstate" comes too late: OHIF's router may hear it first. A browser without this only guards the arrow.
    window.navigation?.addEventListener("navigate", (event) => this.#traversed(event));
  }

  async #clicked(event) {
    const arrow = event.target.closest?.(ARROW);
    if (!arrow || this.passing || !this.unsaved()) return;
    event.stopImmediatePropagation();
    event.preventDefault();
    if (await this.mayLeave()) this.#pass(() => arrow.dispatchEvent(new MouseEvent("click", { bubbles: true })));
  }

  async #traversed(event) {
    const { navigationType, cancelable, destination } = event;
    if (navigationType !== "traverse" || !cancelable || !destination.sameDocument) return; // others load a page
    if (this.passing || destination.url === location.href || !this.unsaved()) return;
    event.preventDefault();
    if (await this.mayLeave()) this.#pass(() => window.navigation.traverseTo(destination.key).finished);
  }

  async #pass(leave) {
    this.passing = true;
    try {
      await leave();
    } finally {
      this.passing = false;
    }
  }
}
