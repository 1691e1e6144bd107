// Numbers as text.

const PREFIXES = [[1e18, "E"], [1e15, "P"], [1e12, "T"], [1e9, "G"], [1e6, "M"], [1e3, "k"]];

const trim = (value, digits = 3) => String(Number(value.toPrecision(digits)));

export function formatAmount(value, unit = "") {
  if (!Number.isFinite(value)) return "–";
  const [size, prefix] = PREFIXES.find(([limit]) => value >= limit) ?? [1, ""];
  return `${trim(value / size)}${prefix || unit ? " " : ""}${prefix}${unit}`;
}

export function formatSeconds(value) {
  if (!Number.isFinite(value)) return "–";
  if (value < 1) return `${trim(1000 * value, 2)} ms`;
  if (value < 120) return `${trim(value)} s`;
  return value < 7200 ? `${trim(value / 60)} min` : `${trim(value / 3600)} h`;
}

export const formatX = (axis, value) => (axis === "seconds" ? formatSeconds(value)
  : formatAmount(value, { macs: "MACs", flops: "FLOPs", train_flops: "FLOPs" }[axis] ?? ""));
export const formatPercent = (value, digits = 2) => (Number.isFinite(value) ? (100 * value).toFixed(digits) : "–");

export function formatValue(value) {
  if (value === null || value === undefined) return "–";
  return typeof value === "number" && !Number.isInteger(value) ? trim(value, 4) : String(value);
}

// "91.23 ± 0.12 %": the interval of three and more seeds, within what an accuracy can be; both values of two seeds.
export function formatAccuracy(measured, i) {
  const y = measured.y[i], half = measured.half[i], values = measured.values[i];
  if (!Number.isFinite(y)) return "no accuracy";
  if (values.length === 2) return `${formatPercent(y)} % (seeds: ${values.map((v) => formatPercent(v)).join(", ")})`;
  return Number.isFinite(half) ? `${formatPercent(y)} ± ${formatPercent(half)} % (n = ${values.length})`
    : `${formatPercent(y)} % (n = ${values.length})`;
}
