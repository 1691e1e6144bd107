// What a setting does, of the points that are shown: a table of its values, or a rank correlation where it has many.

import { make } from "./dom.js";
import { formatPercent, formatValue, formatPoints, formatP } from "./format.js";
import { meanDifference, spearman } from "./stats.js";

const MAX_VALUES = 8;

export class Effect {
  constructor(view, root) { Object.assign(this, { view, root }); }

  draw() {
    const key = this.view.settingInView();
    const found = key && measureEffect(this.view, key);
    this.root.hidden = !found;
    if (!found) return;
    const head = make("h3", {}, `Effect of ${key}, of what is shown`);
    this.root.replaceChildren(head, found.rows ? describeRows(found) : describeCorrelation(key, found));
  }
}

// {rows} for a key of few values: of each, points, mean, and against the value before it the difference of points that have
// all other settings alike. {correlation} for a number of many values. null: nothing to say.
export function measureEffect(view, key) {
  const { table, measured, shown } = view, column = table.points.values[key];
  const members = shown.filter((i) => column[i] !== null && Number.isFinite(measured.y[i]));
  const isNumber = table.keys.find(({ name }) => name === key).number;
  const values = [...new Set(members.map((i) => column[i]))].sort((a, b) => (isNumber ? a - b : String(a).localeCompare(String(b), "en", { numeric: true })));
  if (values.length < 2) return null;
  if (values.length > MAX_VALUES) return isNumber ? { correlation: spearman(members.map((i) => column[i]), members.map((i) => measured.y[i])) } : null;
  const others = [...table.keys.map(({ name }) => name), ...table.also].filter((name) => name !== key);
  const groups = new Map(); // the other settings -> value -> accuracy
  for (const i of members) {
    const name = JSON.stringify(others.map((other) => table.points.values[other][i]));
    if (!groups.has(name)) groups.set(name, new Map());
    groups.get(name).set(column[i], measured.y[i]);
  }
  return {
    rows: values.map((value, n) => {
      const accuracies = members.filter((i) => column[i] === value).map((i) => measured.y[i]);
      const pairs = n ? [...groups.values()].filter((group) => group.has(value) && group.has(values[n - 1])) : [];
      return { value, count: accuracies.length, mean: accuracies.reduce((a, b) => a + b, 0) / accuracies.length, step: meanDifference(pairs.map((group) => group.get(value) - group.get(values[n - 1]))) };
    }),
  };
}

function describeRows({ rows }) {
  const head = ["value", "points", "mean accuracy %", "against the value above, all else equal"].map((name, n) => make("th", { scope: "col", class: n && n < 3 ? "number" : null }, name));
  const step = ({ difference, half, p, n }) => {
    if (!n) return "no two points with all else equal";
    return `${formatPoints(difference)} points${Number.isFinite(half) ? ` (${formatPoints(difference - half)} to ${formatPoints(difference + half)}, paired t-test, ${formatP(p)})` : ""}, ${n} ${n === 1 ? "pair" : "pairs"}`;
  };
  return make("div", { class: "scroll", tabindex: "0", role: "region", "aria-label": "effect of the setting" }, make("table", {}, make("thead", {}, make("tr", {}, head)),
    make("tbody", {}, rows.map((row, n) => make("tr", {}, make("th", { scope: "row" }, formatValue(row.value)), make("td", { class: "number" }, String(row.count)),
      make("td", { class: "number" }, formatPercent(row.mean)), make("td", {}, n ? step(row.step) : ""))))));
}

function describeCorrelation(key, { correlation: { rho, low, high, p, n } }) {
  if (!Number.isFinite(low)) return make("p", { class: "hint" }, n > 4 ? "All accuracies are equal, so there is no relation to show." : `${n} points are too few.`);
  const number = (value) => `${value < 0 ? "−" : "+"}${Math.abs(value).toFixed(2)}`;
  const verdict = low > 0 ? `more ${key} goes with a higher accuracy` : high < 0 ? `more ${key} goes with a lower accuracy` : "no rising or falling relation is shown";
  return make("p", {}, make("strong", {}, `Rank correlation with accuracy ${number(rho)}`), ` (Spearman, 95 % interval ${number(low)} to ${number(high)}, ${formatP(p)}, ${n} points): ${verdict}. The other settings vary as well.`);
}
