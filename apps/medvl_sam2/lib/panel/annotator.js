// Who works here: a name for the record of every version, and an id for this tab's sessions.

const NAME = "medvl.author";
const CLIENT = "medvl.client";

export function author() {
  return (localStorage.getItem(NAME) ?? "").trim();
}

export function setAuthor(name) {
  localStorage.setItem(NAME, name.trim());
}

let id = null;

/**
 * One id a tab, so that two tabs never share a session on the server; kept when the page is loaded again. A duplicated
 * tab is given its original's storage, so the id is out of the storage while a page holds it.
 */
export function clientId() {
  if (id) return id;
  id = sessionStorage.getItem(CLIENT);
  sessionStorage.removeItem(CLIENT);
  if (!id) {
    const bytes = crypto.getRandomValues(new Uint8Array(8));
    id = `ohif-${Array.from(bytes, (byte) => byte.toString(16).padStart(2, "0")).join("")}`;
  }
  window.addEventListener("pagehide", () => sessionStorage.setItem(CLIENT, id));
  window.addEventListener("pageshow", () => sessionStorage.removeItem(CLIENT));
  return id;
}
