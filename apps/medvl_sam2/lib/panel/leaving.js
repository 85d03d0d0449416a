// OHIF's ways out of a study that load no page: its back arrow, and the browser's back and forward.

const ARROW = '[data-cy="return-to-work-list"]';

/** Holds OHIF back while `unsaved()`, until `mayLeave()` resolves to true. OHIF itself is not changed. */
export class Leaving {
  constructor({ unsaved, mayLeave }) {
    Object.assign(this, { unsaved, mayLeave });
    this.passing = false;
    this.returning = false; // the address is on its way back to the study
    this.place = null;
    document.addEventListener("click", (event) => this.#clicked(event), true);
    // Listeners that capture come before OHIF's router, which listens on the same window.
    window.addEventListener("popstate", (event) => this.#moved(event), true);
  }

  /** Take note of the router's place in the history while the address is the study's. */
  note() {
    if (!this.returning) this.place = history.state?.idx ?? null;
  }

  async #clicked(event) {
    const arrow = event.target.closest?.(ARROW);
    if (!arrow || this.passing || !this.unsaved()) return;
    event.stopImmediatePropagation();
    event.preventDefault();
    if (!(await this.mayLeave())) return;
    this.passing = true;
    arrow.dispatchEvent(new MouseEvent("click", { bubbles: true }));
    this.passing = false;
  }

  async #moved(event) {
    if (this.returning) {
      event.stopImmediatePropagation();
      this.returning = false;
      return;
    }
    const step = (history.state?.idx ?? NaN) - this.place;
    if (this.passing || !step || !this.unsaved()) return this.note();
    event.stopImmediatePropagation();
    this.returning = true;
    history.go(-step);
    if (!(await this.mayLeave())) return;
    this.passing = true;
    window.addEventListener("popstate", () => (this.passing = false), { once: true });
    history.go(step);
  }
}
