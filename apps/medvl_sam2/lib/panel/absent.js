// The line above the tabs while no image is on screen, and why none comes: the viewer only stays empty.

import * as api from "./api.js";
import { button, make, replace } from "./dom.js";
import { IMAGES, isAnnotating, studyAddress, studyInAddress } from "./viewer.js";

export const NO_IMAGE = "No image on screen yet";

const PATIENCE_MS = 10_000;
const MODALITY = "00080060";
const MOST_WORDS = 200; // a server in between may answer with a page of its own

/** Why the viewer shows nothing of a study, in words. */
export async function whyAbsent(study) {
  const { dicomweb_reachable: reachable, reasons } = await api.health().catch(() => ({})); // who can be asked says more
  if (reachable === false) {
    return `The DICOM server does not answer (${reasons.filter((reason) => reason.includes("DICOMweb")).join("; ")})`;
  }
  try {
    const series = await api.seriesOf(study);
    if (!series.length) return `The DICOM server has no study ${study}`;
    const modalities = new Set(series.map((one) => one[MODALITY]?.Value?.[0] ?? "unknown"));
    if (!IMAGES.some((name) => modalities.has(name))) {
      return `The study has no CT or MR series (but ${[...modalities].join(", ")})`;
    }
    await api.checkStudy(study);
  } catch ({ status, message }) {
    if (status === 0) return message;
    if (!status) return `The DICOM server's answer cannot be read (${message})`;
    const said = `(${status}: ${message.slice(0, MOST_WORDS)})`;
    if (status === 404) return `The DICOM server has no study ${study} ${said}`;
    return status < 500 ? `The DICOM server does not give this study ${said}` : `The DICOM server does not answer ${said}`;
  }
  return "The viewer shows no image of this study";
}

export class Absent {
  /** `line` is the element, which is another's while an image is on screen. */
  constructor(line) {
    this.line = line;
    this.visit = null; // the page of the viewer: `{address, since, asked}`
    this.saying = false;
  }

  /** What the viewer shows now, or null; called again and again, it asks once a visit, and only before the first image. */
  look(image) {
    const address = `${location.pathname} ${studyInAddress()}`;
    if (address !== this.visit?.address) {
      this.visit = { address, since: Date.now(), asked: false };
      this.saying = false;
    }
    if (image) {
      this.visit.asked = true; // the study could be loaded
      if (this.saying) replace(this.line);
    } else if (!this.saying) this.#sayNone();
    this.saying = !image;
    if (!this.visit.asked && isAnnotating() && studyInAddress() && Date.now() - this.visit.since > PATIENCE_MS) {
      this.#explain(this.visit);
    }
  }

  #sayNone() {
    const study = studyInAddress();
    const link = study && !isAnnotating();
    replace(this.line, link ? make("a", { href: studyAddress(study) }, "Open this study for annotation") : NO_IMAGE);
  }

  async #explain(visit) {
    visit.asked = true;
    const why = await whyAbsent(studyInAddress().split(",")[0]); // of several, the first
    if (visit !== this.visit || !this.saying) return;
    replace(this.line, `${why} `, button("Load again", () => location.reload()));
  }
}
