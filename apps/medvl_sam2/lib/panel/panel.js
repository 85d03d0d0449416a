// The companion panel: a docked, collapsible side of OHIF's page for what MONAI Label's own panel cannot do.

import { Absent, NO_IMAGE } from "./absent.js";
import * as api from "./api.js";
import { author, clientId, setAuthor } from "./annotator.js";
import { button, make, replace, select } from "./dom.js";
import { Labels } from "./labels.js";
import * as labelmap from "./labelmap.js";
import { Leaving } from "./leaving.js";
import { Segment } from "./segment.js";
import { Server } from "./server.js";
import { Texts } from "./texts.js";
import { current, isStudyList, makeRoom, studyAddress } from "./viewer.js";
import { Work } from "./work.js";

const LOOK_MS = 500;
const COLLAPSED = "medvl.collapsed";

class Panel {
  constructor() {
    this.work = new Work();
    this.shown = null;
    this.served = null;
    this.segment = new Segment(this);
    this.labels = new Labels(this);
    this.texts = new Texts(this);
    this.server = new Server(this);
    this.tabs = { Segment: this.segment, Save: this.labels, Text: this.texts, Server: this.server };
    this.#build();
    this.collapse(localStorage.getItem(COLLAPSED) === "yes");
  }

  image() {
    return this.shown;
  }

  /** Whether an image is on screen, for what waited meanwhile. */
  shows(image) {
    return Boolean(image) && this.shown?.series === image.series;
  }

  /** As `shows`; says so when it is not. */
  stillShows(image) {
    if (!this.shows(image)) this.work.complain("That image is no longer on screen; nothing was done");
    return this.shows(image);
  }

  /** What is said of an image ends with its name when another one is on screen: ` of later CT`, else nothing. */
  ofOther(image) {
    return this.shows(image) ? "" : ` of ${image.description || image.series}`;
  }

  info() {
    return this.served;
  }

  /** Names of the label map to begin with: the server's labels. */
  names() {
    return this.served?.labels ?? [];
  }

  /** What the semantic model knows by name. */
  classes() {
    return Object.keys(this.served?.models?.medvl_semantic?.labels ?? {});
  }

  modelVersion() {
    return this.version ?? "";
  }

  // --- the frame ------------------------------------------------------------------------------------------------

  #build() {
    this.caseLine = make("p", { class: "case" }, NO_IMAGE);
    this.absent = new Absent(this.caseLine);
    this.author = make("input", {
      id: "medvl-author",
      autocomplete: "name",
      maxlength: 64,
      value: author(),
      placeholder: "kept in this browser",
      onchange: () => setAuthor(this.author.value),
    });
    this.strategy = select("medvl-strategy", [], { "aria-label": "How the next case is chosen" });
    this.next = button("Next case", () => this.nextCase());
    this.question = make("div", { class: "question" });
    const tabs = Object.keys(this.tabs).map((name) =>
      make(
        "button",
        {
          type: "button",
          role: "tab",
          id: `medvl-tab-${name}`,
          "aria-controls": `medvl-page-${name}`,
          onclick: () => this.open(name),
        },
        name,
      ),
    );
    this.tabList = make("div", { class: "tabs", role: "tablist", onkeydown: (event) => this.#tabKey(event) }, ...tabs);
    this.pages = Object.entries(this.tabs).map(([name, tab]) =>
      make(
        "section",
        { role: "tabpanel", id: `medvl-page-${name}`, "aria-labelledby": `medvl-tab-${name}`, hidden: true },
        tab.element,
      ),
    );
    this.toggle = button("", () => this.collapse(!document.documentElement.classList.contains("medvl-collapsed")), {
      class: "toggle",
    });
    this.body = make(
      "div",
      { class: "body" },
      make(
        "header",
        {},
        make("h2", {}, "MedVL-SAM2 ", make("small", {}, "not for clinical use")),
        this.caseLine,
        make("div", { class: "field" }, make("label", { for: "medvl-author" }, "Your name"), this.author),
        make("div", { class: "row" }, this.next, this.strategy),
      ),
      this.question,
      this.tabList,
      make("div", { class: "pages" }, ...this.pages),
      this.work.element,
    );
    this.element = make("aside", { "aria-label": "MedVL-SAM2" }, this.toggle, this.body);
    // OHIF binds single keys of the whole page; what is typed here is not for it.
    for (const kind of ["keydown", "keypress", "keyup"])
      this.element.addEventListener(kind, (event) => event.stopPropagation());
    this.open("Segment");
  }

  collapse(collapsed) {
    document.documentElement.classList.toggle("medvl-collapsed", collapsed);
    this.body.hidden = collapsed;
    this.toggle.textContent = collapsed ? "‹" : "›";
    this.toggle.setAttribute("aria-label", collapsed ? "Open the MedVL-SAM2 panel" : "Close the MedVL-SAM2 panel");
    this.toggle.setAttribute("aria-expanded", String(!collapsed));
    localStorage.setItem(COLLAPSED, collapsed ? "yes" : "no");
    window.dispatchEvent(new Event("resize"));
  }

  open(name) {
    for (const tab of this.tabList.children) {
      const chosen = tab.id === `medvl-tab-${name}`;
      tab.setAttribute("aria-selected", String(chosen));
      tab.tabIndex = chosen ? 0 : -1;
    }
    for (const page of this.pages) page.hidden = page.id !== `medvl-page-${name}`;
    for (const [other, tab] of Object.entries(this.tabs)) if (other !== name) tab.left?.();
    this.tabs[name].entered?.();
  }

  #tabKey(event) {
    const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
    if (!step) return;
    const names = Object.keys(this.tabs);
    const now = Array.from(this.tabList.children).findIndex((tab) => tab.tabIndex === 0);
    const next = (now + step + names.length) % names.length;
    this.open(names[next]);
    this.tabList.children[next].focus();
  }

  askAuthor() {
    this.work.complain("Type your name first; it stands with every version");
    this.author.focus();
    return null;
  }

  // --- cases ----------------------------------------------------------------------------------------------------

  async nextCase() {
    if (!(await this.mayLeave("go to the next case"))) return;
    await this.work.run("next", "Choosing the next case", async () => {
      const sample = await api.nextCase(this.strategy.value || "random", clientId());
      if (!sample.StudyInstanceUID) throw new Error("there is no case left to annotate");
      this.#leaveFor(sample.StudyInstanceUID);
    });
  }

  async goToStudy(study) {
    if (await this.mayLeave("open another case")) this.#leaveFor(study);
  }

  #leaveFor(study) {
    this.#forgetChanges();
    location.assign(studyAddress(study));
  }

  /** OHIF drops the masks with their study. */
  async #mayGoBack() {
    const may = await this.mayLeave("leave this study");
    if (may) this.#forgetChanges();
    return may;
  }

  /** They were asked about already. */
  #forgetChanges() {
    this.labels.forgetChanges();
    this.texts.forgetChanges();
  }

  #hasUnsaved() {
    return this.labels.unsaved().length > 0 || this.texts.unsaved().length > 0;
  }

  /**
   * Resolves to whether all masks and texts may go, or the masks of `images`: at once when they are saved, else as the
   * annotator says.
   */
  async mayLeave(what, images = null) {
    const masks = this.labels.unsaved().filter((image) => !images || images.some((one) => one.series === image.series));
    const texts = images ? [] : this.texts.unsaved();
    if (!masks.length && !texts.length) return true;
    const named = (these) => these.map((image) => image.description || image.series).join(", ");
    const unsaved = [
      masks.length && `The masks of ${named(masks)} changed since the last version`,
      texts.length && `The text on ${named(texts)} is not stored`,
    ];
    const text = `${unsaved.filter(Boolean).join(". ")}; ${what}?`;
    const answer = await this.ask("Unsaved changes", text, ["Save first", "Without saving", "Stay"]);
    if (answer !== "Save first") return answer !== "Stay";
    for (const image of masks) if (!(await this.labels.store("draft", image))) return false;
    const again = this.labels.unsaved().filter((image) => masks.some((one) => one.series === image.series));
    if (again.length) {
      this.work.complain(`The masks of ${named(again)} were changed while they were saved; save them again`);
      return false;
    }
    return !texts.length || this.texts.storeAll();
  }

  /** Ask in the panel, where nothing blocks the viewer; the last of `answers` is given by Escape and when another question comes. */
  ask(title, text, answers) {
    this.dismiss?.();
    if (this.body.hidden) this.collapse(false);
    const before = this.element.getRootNode().activeElement;
    return new Promise((resolve) => {
      const give = (answer) => {
        this.dismiss = null;
        replace(this.question);
        before?.focus();
        resolve(answer);
      };
      this.dismiss = () => give(answers.at(-1));
      const buttons = answers.map((answer) => button(answer, () => give(answer)));
      replace(
        this.question,
        make(
          "div",
          { role: "alertdialog", "aria-label": title, onkeydown: (event) => event.key === "Escape" && this.dismiss() },
          make("p", {}, text),
          make("div", { class: "row" }, ...buttons),
        ),
      );
      buttons[0].focus();
    });
  }

  // --- following the viewer -------------------------------------------------------------------------------------

  async start() {
    const host = make("div", { id: "medvl-panel" });
    const styles = make("link", { rel: "stylesheet", href: new URL("panel.css", import.meta.url) });
    host.attachShadow({ mode: "open" }).append(styles, this.element);
    document.body.append(host);
    setInterval(() => this.#look(), LOOK_MS);
    window.addEventListener("beforeunload", (event) => {
      if (this.#hasUnsaved()) event.preventDefault();
    });
    new Leaving({
      unsaved: () => this.#hasUnsaved(),
      mayLeave: () => this.#mayGoBack(),
    });
    clientId();
    await this.#connect();
  }

  async #connect() {
    await this.work.run("info", "Connecting", async (signal) => {
      this.served = await api.info({ signal });
      replace(
        this.strategy,
        ...Object.keys(this.served.strategies ?? {}).map((name) => make("option", { value: name }, name)),
      );
    });
    if (!this.served) setTimeout(() => this.#connect(), 10 * LOOK_MS);
  }

  /** OHIF tells no module of another page what it shows, so look: the image may come, go and change. */
  async #look() {
    if (this.looking) return;
    this.looking = true;
    try {
      document.documentElement.classList.toggle("medvl-away", isStudyList());
      const image = isStudyList() ? null : current();
      this.absent.look(image);
      if (image?.series !== this.shown?.series || image?.volume !== this.shown?.volume) await this.#show(image);
    } catch (error) {
      this.work.complain(error.message);
    } finally {
      this.looking = false;
    }
  }

  async #show(image) {
    if (!image || !this.served) {
      this.#leaveImage();
      return;
    }
    if (await labelmap.ensure(image, this.names())) {
      this.segment.forget(image);
      this.labels.forget(image);
    }
    const other = image.series !== this.shown?.series;
    if (other) this.#leaveImage();
    this.shown = image;
    replace(this.caseLine, [image.patient, image.description].filter(Boolean).join(", "));
    if (!other) return;
    if (!this.follows) {
      this.follows = true;
      if (!this.body.hidden) makeRoom();
      labelmap.onChange((image) => this.#edited(image));
    }
    this.segment.refresh();
    // Not waited for: yet another image may come on screen before they are read.
    Promise.all([this.labels.refresh(), this.texts.refresh(), this.#version()]).catch((error) =>
      this.work.complain(error.message),
    );
  }

  /** No image is on screen: what waits for the one before is given up. */
  #leaveImage() {
    if (!this.shown) return;
    this.shown = null;
    this.work.leaveImage();
    this.segment.leave();
    this.labels.refresh();
    this.dismiss?.();
  }

  async #version() {
    try {
      this.version = (await api.jobs()).model.served;
    } catch (error) {
      if (error.status !== 404) throw error;
    }
  }

  #edited(image) {
    this.labels.changed(image);
    clearTimeout(this.counting);
    this.counting = setTimeout(() => this.segment.refresh(), 300);
  }
}

/** OHIF puts its services on the page when the first study is opened, which may be long after the study list. */
async function whenReady() {
  while (!window.services || !window.cornerstone || !window.cornerstoneTools || !window.commandsManager) {
    await new Promise((resolve) => setTimeout(resolve, LOOK_MS));
  }
}

await whenReady();
await new Panel().start();
