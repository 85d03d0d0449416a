// The annotation server: every request of the panel leaves here, every error carries the server's reason.

const BASE = new URL("../..", import.meta.url);
const REPLY_OPTIONS = { result_extension: ".nrrd", result_dtype: "uint8", result_compress: true };

class ServerError extends Error {
  constructor(status, reason) {
    super(reason);
    this.status = status;
  }
}

function address(path, query = {}) {
  const url = new URL(path, BASE);
  for (const [name, value] of Object.entries(query)) url.searchParams.set(name, value);
  return url;
}

async function reasonOf(response) {
  const text = await response.text();
  try {
    const { detail } = JSON.parse(text);
    if (Array.isArray(detail)) return detail.map((item) => `${(item.loc ?? []).at(-1)}: ${item.msg}`).join("; ");
    return String(detail ?? text);
  } catch {
    return text || `the server answered ${response.status}`;
  }
}

async function ask(method, path, { query, body, json, signal } = {}) {
  const headers = json === undefined ? undefined : { "Content-Type": "application/json" };
  let response;
  try {
    response = await fetch(address(path, query), {
      method,
      headers,
      signal,
      body: json === undefined ? body : JSON.stringify(json),
    });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ServerError(0, "The server cannot be reached; is it running?");
  }
  if (!response.ok) throw new ServerError(response.status, await reasonOf(response));
  return response;
}

const get = async (path, options) => (await ask("GET", path, options)).json();
const post = async (path, options) => (await ask("POST", path, options)).json();

/**
 * Run a model. `params` go out as they are; `mask` is a Blob with the mask to start from.
 * Returns `{params, file}`: the reply's parameters and the NRRD as an ArrayBuffer (null where there is none).
 */
export async function infer(model, image, params, { mask, signal } = {}) {
  const form = new FormData();
  form.set("params", JSON.stringify({ ...REPLY_OPTIONS, ...params }));
  if (mask) form.set("label", mask, "start.nrrd");
  const response = await ask("POST", `infer/${model}`, { query: { image, output: "all" }, body: form, signal });
  if ((response.headers.get("content-type") ?? "").startsWith("application/json")) {
    return { params: await response.json(), file: null };
  }
  const parts = await response.formData();
  const [stated, file] = [parts.get("params"), parts.get("image")];
  const text = typeof stated === "string" ? stated : await stated.text();
  return { params: JSON.parse(text), file: await file.arrayBuffer() };
}

/** What keeps the server from working, as `/medvl/health` says it, which answers 503 then. */
export async function health(options) {
  const response = await fetch(address("medvl/health"), options);
  return response.json();
}

/** Series of a study as the DICOM server tells them: DICOM JSON. */
export async function seriesOf(study, options) {
  const response = await ask("GET", `proxy/dicom/qido/studies/${encodeURIComponent(study)}/series`, options);
  return response.status === 204 ? [] : response.json();
}

/** Refuses as the DICOM server does when the viewer asks for a study; what it would send is not read. */
export async function checkStudy(study, options) {
  const response = await ask("GET", `proxy/dicom/wado/studies/${encodeURIComponent(study)}/metadata`, options);
  await response.body?.cancel();
}

export const info = (options) => get("info/", options);
export const jobs = (options) => get("medvl/jobs", options);
export const cases = (options) => get("medvl/cases", options);
export const nextCase = (strategy, clientId) => post(`activelearning/${strategy}`, { json: { client_id: clientId } });

export const versions = (image, options) => get("medvl/labels", { query: { image }, ...options });
export const compare = (image, a, b, options) => get("medvl/labels/compare", { query: { image, a, b }, ...options });
export const agreement = (image, options) => get("medvl/labels/agreement", { query: { image }, ...options });
export const restore = (image, version, body, options) =>
  post("medvl/labels/restore", { query: { image, version }, json: body, ...options });

export async function labelFile(image, version, options) {
  return (
    await ask("GET", "medvl/labels/file", { query: { image, version, format: "nrrd" }, ...options })
  ).arrayBuffer();
}

/** What one label of the annotators' latest versions would be: `{versions, structures, file}`; nothing is stored. */
export async function consensus(image, options) {
  const response = await ask("GET", "medvl/labels/consensus", { query: { image }, ...options });
  return { ...JSON.parse(response.headers.get("MedVL-Consensus")), file: await response.arrayBuffer() };
}

export function saveLabel(image, mask, params, options) {
  const form = new FormData();
  form.set("label", mask, "label.nrrd");
  form.set("params", JSON.stringify(params));
  return post("medvl/labels", { query: { image }, body: form, ...options });
}

export const askQuestion = (body, options) => post("medvl/texts/ask", { json: body, ...options });
export const draftReport = (body, options) => post("medvl/texts/report", { json: body, ...options });
export const texts = (image, options) => get("medvl/texts", { query: { image }, ...options });
export const storeText = (image, body, options) => post("medvl/texts", { query: { image }, json: body, ...options });

export async function evidenceMask(image, name, options) {
  return (await ask("GET", "medvl/texts/mask", { query: { image, name }, ...options })).arrayBuffer();
}
