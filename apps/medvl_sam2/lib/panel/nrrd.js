// NRRD label maps: one byte a voxel, first axis fastest, in left-posterior-superior mm, as the viewer's volumes are.

async function through(bytes, stream) {
  return new Uint8Array(await new Response(new Blob([bytes]).stream().pipeThrough(stream)).arrayBuffer());
}

const vectorsOf = (text) =>
  Array.from((text ?? "").matchAll(/\(([^)]*)\)/g), (match) => match[1].split(",").map(Number));

/**
 * Read a label map. Returns `{sizes: [I, J, K], axes: [[x, y, z], ...], origin: [x, y, z], voxels: Uint8Array}`:
 * `axes` are the steps from voxel to voxel in LPS mm.
 */
export async function readNrrd(buffer) {
  const bytes = new Uint8Array(buffer);
  const end = bytes.findIndex((byte, n) => byte === 10 && bytes[n + 1] === 10);
  const lines = new TextDecoder().decode(bytes.subarray(0, end)).split("\n");
  if (end < 0 || !lines[0].startsWith("NRRD")) throw new Error("the server's mask is no NRRD file");
  const header = Object.fromEntries(
    lines
      .filter((line) => line.includes(":") && !line.startsWith("#"))
      .map((line) => {
        const at = line.indexOf(":");
        return [
          line.slice(0, at).trim().toLowerCase(),
          line
            .slice(at + 1)
            .replace(/^=/, "")
            .trim(),
        ];
      }),
  );
  const body = bytes.subarray(end + 2);
  const voxels = ["gzip", "gz"].includes(header.encoding) ? await through(body, new DecompressionStream("gzip")) : body;
  const sizes = header.sizes.split(/\s+/).map(Number);
  if (voxels.length !== sizes.reduce((product, size) => product * size, 1)) {
    throw new Error(`the server's mask has ${voxels.length} bytes for ${sizes.join(" x ")} voxels`);
  }
  return { sizes, axes: vectorsOf(header["space directions"]), origin: vectorsOf(header["space origin"])[0], voxels };
}

/** Write a label map on a grid (as `readNrrd` returns it, without voxels) to a compressed Blob. */
export async function writeNrrd(grid, voxels) {
  const vector = (values) => `(${values.join(",")})`;
  const header = [
    "NRRD0004",
    "type: uint8",
    "dimension: 3",
    "space: left-posterior-superior",
    `sizes: ${grid.sizes.join(" ")}`,
    `space directions: ${grid.axes.map(vector).join(" ")}`,
    "kinds: domain domain domain",
    "encoding: gzip",
    `space origin: ${vector(grid.origin)}`,
    "",
    "",
  ].join("\n");
  return new Blob([header, await through(voxels, new CompressionStream("gzip"))]);
}
