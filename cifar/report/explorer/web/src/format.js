// Numbers as text.

const PREFIXES = [[1e15, "P"], [1e12, "T"], [1e9, "G"], [1e6, "M"], [1e3, "k"]];

const trim = (value, digits = 3) => String(Number(value.toPrecision(digits)));

export function formatAmount(value, unit = "") {
  if (!Number.isFinite(value)) return "–";
  const [size, prefix] = PREFIXES.find(([limit]) => Math.abs(value) >= limit) ?? [1, ""];
  return `${trim(value / size)}${prefix || unit ? " " : ""}${prefix}${unit}`;
}

export function formatSeconds(value) {
  if (!Number.isFinite(value)) return "–";
  if (value < 1e-3) return `${trim(1e6 * value)} µs`;
  if (value < 1) return `${trim(1000 * value)} ms`;
  if (value < 120) return `${trim(value)} s`;
  return value < 7200 ? `${trim(value / 60)} min` : `${trim(value / 3600)} h`;
}

// The unit of each axis; "": a count; null: a setting, which is written as it is.
export const UNITS = { macs: "MACs", flops: "FLOPs", train_flops: "FLOPs", seconds: "s", params: "" };

export function formatX(axis, value) {
  const unit = UNITS[axis];
  if (unit === null) return formatValue(value);
  return unit === "s" ? formatSeconds(value) : formatAmount(value, unit ?? "");
}

// "20M", "1.2 GMACs", "5e7": what a reader may type for an amount. NaN for anything else.
export function parseAmount(text) {
  const match = text.trim().match(/^(\d*\.?\d+(?:e[+-]?\d+)?)\s*([kmgtp]?)(?:macs?|flops?|j|s)?$/i);
  return match ? Number(match[1]) * { "": 1, k: 1e3, m: 1e6, g: 1e9, t: 1e12, p: 1e15 }[match[2].toLowerCase()] : NaN;
}
export const formatPercent = (value, digits = 2) => (Number.isFinite(value) ? (100 * value).toFixed(digits) : "–");

export function formatValue(value) {
  if (value === null || value === undefined) return "–";
  if (typeof value !== "number" || Number.isInteger(value)) return String(value);
  return Math.abs(value) < 1e-4 ? Number(value.toPrecision(3)).toExponential() : trim(value, 4);
}

// "91.23 ± 0.12 %": the interval of three and more seeds, within what an accuracy can be; both values of two seeds.
export function formatAccuracy(measured, i) {
  const y = measured.y[i], half = measured.half[i], values = measured.values[i];
  if (!Number.isFinite(y)) return "no accuracy";
  if (values.length === 2) return `${formatPercent(y)} % (seeds: ${values.map((v) => formatPercent(v)).join(", ")})`;
  return Number.isFinite(half) ? `${formatPercent(y)} ± ${formatPercent(half)} % (n = ${values.length})`
    : `${formatPercent(y)} % (n = ${values.length})`;
}

export const formatPoints = (value) => `${value >= 0 ? "+" : "−"}${Math.abs(100 * value).toFixed(2)}`; // of a difference of accuracies
export const formatP = (p) => (p < 0.001 ? "p < 0.001" : `p = ${p.toFixed(3)}`);
