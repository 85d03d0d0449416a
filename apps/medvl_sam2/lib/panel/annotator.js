// Who works here: a name for the record of every version, and an id for this browser's sessions.

const NAME = "medvl.author";
const CLIENT = "medvl.client";

export function author() {
  return (localStorage.getItem(NAME) ?? "").trim();
}

export function setAuthor(name) {
  localStorage.setItem(NAME, name.trim());
}

/** One id a browser, kept: a session on the server goes on where it was after the page is opened again. */
export function clientId() {
  let id = localStorage.getItem(CLIENT);
  if (!id) {
    const bytes = crypto.getRandomValues(new Uint8Array(8));
    id = `ohif-${Array.from(bytes, (byte) => byte.toString(16).padStart(2, "0")).join("")}`;
    localStorage.setItem(CLIENT, id);
  }
  return id;
}
