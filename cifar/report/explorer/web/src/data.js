// The page's data: unpacked, in columns, with what is computed from it for a choice of axes.

import { UNITS } from "./format.js";

async function unpack(id) {
  const element = document.getElementById(id);
  if (!element) return null;
  const text = atob(element.textContent.trim());
  const bytes = Uint8Array.from(text, (letter) => letter.charCodeAt(0));
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
  return new Uint8Array(await new Response(stream).arrayBuffer());
}

const parseJson = (bytes) => JSON.parse(new TextDecoder().decode(bytes));

export async function loadTable() {
  const table = parseJson(await unpack("explorer-table"));
  const { points, runs } = table;
  table.count = points.label.length;
  table.runsOf = Array.from({ length: table.count }, () => []);
  table.apart = [];
  runs.point.forEach((point, run) => (point < 0 ? table.apart : table.runsOf[point]).push(run));
  table.families = [...new Set(points.family)];
  const tagsOf = (run) => (runs.tags ? runs.tags[run].map((tag) => table.tags[tag]) : []);
  table.tagsOf = table.runsOf.map((of) => new Set(of.flatMap(tagsOf)));
  table.texts = points.label.map((label, i) =>
    normalise([label, ...table.runsOf[i].flatMap((run) => [runs.id[run], runs.name[run], ...tagsOf(run)])].join(" ")));
  table.apartTexts = new Map(table.apart.map((run) => [run, normalise([runs.id[run], runs.name[run], runs.state[run], runs.why[run], ...tagsOf(run)].join(" "))]));
  defineAxes(table);
  return table;
}

// Text as it is searched: "ResNet-20" finds resnet20.
export const normalise = (text) => text.toLowerCase().replace(/([a-z])[-_](?=\d)/g, "$1");

let curves, details;

// Run number -> {epochs, "val/acc": [...], ...}, in at most 32 points. NaN: no value.
export async function loadCurves(table) {
  curves ??= unpack("explorer-curves").then((bytes) => {
    const { metrics, scales } = table.curves, count = table.runs.id.length;
    let start = 0;
    const readBlock = (size) => { // low bytes, then high bytes
      const at = start;
      start += 2 * size;
      return Uint16Array.from({ length: size }, (_, i) => bytes[at + i] | (bytes[at + size + i] << 8));
    };
    const counts = readBlock(count), total = counts.reduce((sum, n) => sum + n, 0);
    const blocks = [readBlock(total), ...metrics.map(() => readBlock(total))];
    let first = 0;
    const readLine = (block, length, scale) => {
      const line = new Array(length);
      let value = 0;
      for (let i = 0; i < length; i++) {
        const coded = block[first + i];
        value = (value + (coded & 1 ? -(coded + 1) / 2 : coded / 2)) & 0xffff;
        line[i] = scale === 0 ? value : value === 0xffff ? NaN : value / scale;
      }
      return line;
    };
    return Array.from(counts, (length) => {
      const curve = { epochs: readLine(blocks[0], length, 0) };
      metrics.forEach((metric, m) => { curve[metric] = readLine(blocks[m + 1], length, scales[m]); });
      first += length;
      return curve;
    });
  });
  return curves;
}

// Run id -> its details, for the runs that have some. Where a server has sent the page, it has those of every run.
export async function loadDetails(ids) {
  details ??= unpack("explorer-details").then((bytes) => (bytes ? parseJson(bytes) : {}));
  const known = await details;
  if (document.documentElement.dataset.served) {
    await Promise.all(ids.filter((id) => !known[id]?.heat || !Object.keys(known[id].heat).length).slice(0, 24).map(async (id) => {
      const answer = await fetch(`/details/${encodeURIComponent(id)}`).catch(() => null);
      if (answer?.ok) known[id] = await answer.json();
    }));
  }
  return known;
}

// Calls `onChange` when the server says that the runs have changed since the page was made.
export function watchServer(onChange) {
  const served = document.documentElement.dataset.served;
  if (!served) return;
  let last = 0; // of what the reader did: the page does not change in the middle of it
  for (const kind of ["pointermove", "pointerdown", "keydown", "input", "wheel"]) addEventListener(kind, () => { last = Date.now(); }, { passive: true });
  const ask = async () => {
    const isTyping = document.activeElement?.matches("input:not([type=range], [type=checkbox], [type=radio])");
    const answer = Date.now() - last < (isTyping ? 8000 : 2500) ? null : await fetch("/stamp").catch(() => null);
    if (answer?.ok && (await answer.json()) !== served) onChange();
    else setTimeout(ask, 3000);
  };
  setTimeout(ask, 3000);
}

// -- axes --------------------------------------------------------------------------------------------------------------

const mean = (values) => values.reduce((sum, value) => sum + value, 0) / values.length;
const known = (values) => values.filter((value) => value !== null && Number.isFinite(value));
const meanOfRuns = (column) => (table, i) => {
  const values = known(table.runsOf[i].map((run) => column(table, run)));
  return values.length ? mean(values) : NaN;
};

// name: for narrow places. isSetting: no cost, so that there is no front along it.
export const X_AXES = {
  macs: { label: "multiply-adds of one image", name: "MACs", read: (table, i) => table.points.macs[i] },
  flops: { label: "FLOPs of one image (2 × MACs)", name: "FLOPs", read: (table, i) => 2 * table.points.macs[i] },
  params: { label: "parameters", name: "parameters", read: (table, i) => table.points.params[i] },
  seconds: { label: "training time of a run", name: "seconds", read: meanOfRuns((table, run) => table.runs.seconds[run]) },
  train_flops: {
    label: "FLOPs of the training (6 × MACs × images)", name: "training FLOPs",
    read: (table, i) => meanOfRuns((t, run) => t.runs.images[run])(table, i) * 6 * table.points.macs[i],
  },
};

// Measured costs that some run has, and the numbers among the settings, are axes too.
function defineAxes(table) {
  for (const { key, label, unit } of table.costs ?? []) {
    UNITS[key] = unit;
    X_AXES[key] = { label, name: label, read: meanOfRuns((t, run) => t.runs[key][run]) };
  }
  for (const { name, number, log } of table.keys) {
    if (!number) continue;
    UNITS[`setting:${name}`] = null;
    X_AXES[`setting:${name}`] = { label: name, name, isSetting: true, isLog: log, read: (t, i) => t.points.values[name][i] ?? NaN };
  }
}

export const Y_AXES = {
  val: { label: "validation accuracy, last epoch" },
  test: { label: "test accuracy, one view" },
  test_views: { label: "test accuracy, all views (MACs of one view)" },
};

export const listY = (table) => Object.keys(Y_AXES).filter((y) =>
  table.runs[y].some((value) => value !== null) &&
  (y !== "test_views" || table.runs.views.some((views) => views > 1)));
export const listX = (table) => Object.keys(X_AXES).filter((x) => {
  const values = known(Array.from({ length: table.count }, (_, i) => X_AXES[x].read(table, i)));
  return X_AXES[x].isSetting ? new Set(values).size > 1 : values.some((value) => value > 0);
});

// The mean accuracy of a point's seeds, of those that have one.
export const readAccuracy = (table, y, i) => meanOfRuns((t, run) => t.runs[y][run])(table, i);

// For each point: x, and of its seeds' accuracies y (mean), n, values, half (of the 95 % interval; NaN below three seeds).
export function measure(table, x, y, tQuantile) {
  const count = table.count, out = {
    x: new Float64Array(count), y: new Float64Array(count), half: new Float64Array(count).fill(NaN),
    cost: new Float64Array(count), std: new Float64Array(count).fill(NaN), values: new Array(count), seeds: new Array(count),
  };
  for (let i = 0; i < count; i++) {
    const runs = table.runsOf[i].filter((run) => table.runs[y][run] !== null);
    const values = runs.map((run) => table.runs[y][run]), n = values.length;
    out.x[i] = X_AXES[x].read(table, i);
    out.cost[i] = X_AXES[x].isSetting ? table.points.macs[i] : out.x[i];
    out.values[i] = values;
    out.seeds[i] = runs.map((run) => table.runs.seed[run]);
    out.y[i] = n ? mean(values) : NaN;
    if (n > 1) out.std[i] = Math.sqrt(values.reduce((sum, v) => sum + (v - out.y[i]) ** 2, 0) / (n - 1));
    if (n > 2) out.half[i] = (tQuantile(0.95, n - 1) * out.std[i]) / Math.sqrt(n);
  }
  return out;
}

// The points that no other one beats, cheapest first: numbers of points. Along a setting, the cost is that in MACs.
export function findFront({ cost, y }, isShown) {
  const order = [];
  for (let i = 0; i < cost.length; i++)
    if (isShown[i] && cost[i] > 0 && Number.isFinite(y[i])) order.push(i);
  order.sort((a, b) => cost[a] - cost[b] || y[b] - y[a]);
  const front = [];
  let best = -Infinity;
  for (const i of order) if (y[i] > best) { best = y[i]; front.push(i); }
  return front;
}
