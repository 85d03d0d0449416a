// Small helpers to build elements without a framework.

/** An element: `make("button", {class: "primary", onclick: run, "aria-label": "Run"}, "Run")`. */
export function make(tag, attributes = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (value === undefined || value === null || value === false) continue;
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else if (value === true) element.setAttribute(name, "");
    else element.setAttribute(name, value);
  }
  element.append(...children.filter((child) => child !== null && child !== undefined));
  return element;
}

export function button(text, onclick, attributes = {}) {
  return make("button", { type: "button", onclick, ...attributes }, text);
}

/** A labelled field: the label is bound to the control, which keeps its own id. */
export function field(text, control) {
  return make("div", { class: "field" }, make("label", { for: control.id }, text), control);
}

/** A form of one line that calls `submitted` and leaves the page where it is. */
export function form(submitted, ...children) {
  const onsubmit = (event) => {
    event.preventDefault();
    submitted();
  };
  return make("form", { class: "row", onsubmit }, ...children);
}

export function select(id, values, attributes = {}) {
  const options = values.map((value) => {
    const [name, text] = Array.isArray(value) ? value : [value, value];
    return make("option", { value: name }, text);
  });
  return make("select", { id, ...attributes }, ...options);
}

export function replace(element, ...children) {
  element.replaceChildren(...children.filter((child) => child !== null && child !== undefined));
}

/** `kidney_right` as a person says it; names of one's own stay as they are. */
export function spoken(name) {
  const words = name.split("_");
  if (words.length > 1 && ["left", "right"].includes(words.at(-1))) words.unshift(words.pop());
  return words.join(" ");
}

export function counted(number, singular, plural = `${singular}s`) {
  return `${number.toLocaleString("en")} ${number === 1 ? singular : plural}`;
}

/** Time of a version as the annotator's clock shows it. */
export function clock(iso) {
  const time = new Date(iso);
  return Number.isNaN(time.getTime())
    ? String(iso ?? "")
    : time.toLocaleString([], { dateStyle: "short", timeStyle: "short" });
}
