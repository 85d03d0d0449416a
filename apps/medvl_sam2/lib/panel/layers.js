// What lies under the structures of a label map, which holds one value a voxel: what one covers comes back when it goes.

export class Layers {
  constructor(length) {
    this.under = new Uint8Array(length);
    this.top = null; // as we left it: what differs now was painted by another tool
  }

  /**
   * The label map after every structure of `replaced` got exactly the voxels where `wanted` has its value. All arrays
   * are of values: `now` and `wanted` a voxel, `replaced` and `locked` tables of 256; locked ones stay as they are.
   */
  place(now, wanted, replaced, locked) {
    this.settle(now);
    const { under } = this;
    const next = new Uint8Array(now.length);
    for (let n = 0; n < now.length; n++) {
      const old = now[n];
      if (replaced[under[n]]) under[n] = 0; // it is told anew, and is not here unless `wanted` says so
      if (locked[old]) next[n] = old;
      else if (wanted[n]) {
        if (!replaced[old]) under[n] = old;
        next[n] = wanted[n];
      } else if (replaced[old]) {
        next[n] = under[n];
        under[n] = 0;
      } else next[n] = old;
    }
    this.top = next.slice();
    return next;
  }

  /** A hand edit since we left it is final: nothing is under it. */
  settle(now) {
    const { under, top } = this;
    if (top) for (let n = 0; n < now.length; n++) if (now[n] !== top[n]) under[n] = 0;
    this.top = now.slice();
  }

  /** Everything was replaced by `values`. */
  reset(values) {
    this.under.fill(0);
    this.top = values.slice();
  }
}
