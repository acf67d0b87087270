// Rates of cumulative counters. The server hands counters out as they are; what happens between two looks is worked out here.

/** Seconds over which rates and quantiles are. */
export const WINDOW = 10;
/** Seconds that are drawn. */
export const SHOWN = 180;

/** Whether `now` can be what `before` has grown to: counters that shrank were begun again. */
export function hasGrown(before, now) {
  if (now.success < before.success || now.rows < before.rows || now.batches < before.batches) return false;
  if (Object.entries(now.failures).some(([reason, count]) => count < before.failures[reason])) return false;
  return now.buckets.every((row, stage) => row.every((count, index) => count >= before.buckets[stage][index]));
}

function total(failures) {
  return Object.values(failures).reduce((sum, count) => sum + count, 0);
}

function less(now, before) {
  return now.map((count, index) => count - before[index]);
}

/** What was counted between two looks, per second; null where they are too near or begun anew. */
export function difference(before, now) {
  const seconds = now.clock - before.clock;
  if (!(seconds > 0.05) || !hasGrown(before.counters, now.counters)) return null;
  const [old, fresh] = [before.counters, now.counters];
  return {
    seconds,
    requests: (fresh.success - old.success) / seconds,
    rows: (fresh.rows - old.rows) / seconds,
    batches: (fresh.batches - old.batches) / seconds,
    failures: (total(fresh.failures) - total(old.failures)) / seconds,
    buckets: fresh.buckets.map((row, stage) => less(row, old.buckets[stage])),
    batch_buckets: less(fresh.batch_buckets, old.batch_buckets),
  };
}

/** The value below which a part `q` of what was counted lies, interpolated within its bucket; null where nothing was counted. */
export function quantile(edges, counts, q) {
  const all = counts.reduce((sum, count) => sum + count, 0);
  if (!all) return null;
  let below = 0;
  for (const [index, count] of counts.entries()) {
    if (count && below + count >= q * all) {
      // Beyond the last edge there is nothing to interpolate to: it is at least that.
      if (index >= edges.length) return edges[edges.length - 1];
      const low = index ? edges[index - 1] : 0;
      return low + ((edges[index] - low) * (q * all - below)) / count;
    }
    below += count;
  }
  return edges[edges.length - 1];
}

/** The looks at one loaded copy of a version: whole ones for WINDOW seconds, rates for SHOWN. */
class Track {
  constructor() {
    this.looks = [];
    this.rates = [];
  }

  add(look) {
    const before = this.looks.at(-1);
    if (before && !(look.clock > before.clock)) return;
    if (before) {
      const step = difference(before, look);
      if (step === null && !hasGrown(before.counters, look.counters)) this.looks = [];
      if (step !== null) this.rates.push({ clock: look.clock, requests: step.requests, rows: step.rows, failures: step.failures });
    }
    this.looks.push(look);
    // One look at the edge of the window is kept, so that there is a whole window to look back on.
    while (this.looks.length > 2 && this.looks[1].clock <= look.clock - WINDOW) this.looks.shift();
    while (this.rates.length && this.rates[0].clock < look.clock - SHOWN) this.rates.shift();
  }

  recent() {
    return this.looks.length < 2 ? null : difference(this.looks[0], this.looks.at(-1));
  }
}

/** All versions' looks. Owns what has been seen since the page was opened, or since the server was started again. */
export class Rates {
  constructor() {
    this.run = "";
    this.tracks = new Map();
    this.totals = [];
  }

  add(state) {
    const { run, clock } = state.server;
    if (run !== this.run) [this.run, this.tracks, this.totals] = [run, new Map(), []];
    const there = new Set();
    for (const model of state.models) {
      for (const version of model.versions) {
        if (version.counters === null) continue;
        const key = `${model.name}:${version.id}`;
        there.add(key);
        if (!this.tracks.has(key)) this.tracks.set(key, new Track());
        this.tracks.get(key).add({ clock, counters: version.counters });
      }
    }
    for (const key of this.tracks.keys()) if (!there.has(key)) this.tracks.delete(key);
    this.#sumUp(clock);
  }

  #sumUp(clock) {
    if (this.totals.length && !(clock > this.totals.at(-1).clock)) return;
    const last = [...this.tracks.values()].map((track) => track.rates.at(-1)).filter((step) => step && step.clock === clock);
    if (!last.length) return;
    const sum = (name) => last.reduce((whole, step) => whole + step[name], 0);
    this.totals.push({ clock, requests: sum("requests"), rows: sum("rows"), failures: sum("failures") });
    while (this.totals[0].clock < clock - SHOWN) this.totals.shift();
  }

  of(model, version) {
    const track = this.tracks.get(`${model.name}:${version.id}`);
    return { recent: track?.recent() ?? null, history: track?.rates ?? [] };
  }

  /** Over all versions: null before there are two looks. */
  together() {
    const recent = [...this.tracks.values()].map((track) => track.recent()).filter((each) => each !== null);
    if (!recent.length) return null;
    const sum = (name) => recent.reduce((whole, each) => whole + each[name], 0);
    const merged = recent[0].buckets[0].map((_, index) => recent.reduce((whole, each) => whole + each.buckets[0][index], 0));
    return { requests: sum("requests"), rows: sum("rows"), failures: sum("failures"), request_buckets: merged };
  }
}
