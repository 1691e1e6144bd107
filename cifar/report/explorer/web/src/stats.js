// Student's t, Welch's interval of a difference, and the paired test over seeds.

function logGamma(x) { // Lanczos, g = 7, n = 9
  const terms = [0.99999999999980993, 676.5203681218851, -1259.1392167224028, 771.32342877765313, -176.61502916214059,
    12.507343278686905, -0.13857109526572012, 9.9843695780195716e-6, 1.5056327351493116e-7];
  if (x < 0.5) return Math.log(Math.PI / Math.sin(Math.PI * x)) - logGamma(1 - x);
  const t = x + 6.5;
  const sum = terms.slice(1).reduce((total, term, i) => total + term / (x + i), terms[0]);
  return 0.5 * Math.log(2 * Math.PI) + (x - 0.5) * Math.log(t) - t + Math.log(sum);
}

// The regularised incomplete beta function, by its continued fraction (Lentz's method).
export function incompleteBeta(x, a, b) {
  if (x <= 0) return 0;
  if (x >= 1) return 1;
  if (x > (a + 1) / (a + b + 2)) return 1 - incompleteBeta(1 - x, b, a);
  const front = Math.exp(logGamma(a + b) - logGamma(a) - logGamma(b) + a * Math.log(x) + b * Math.log1p(-x)) / a;
  let f = 1, c = 1, d = 0;
  for (let i = 0; i <= 400; i++) {
    const m = i >> 1;
    const term = i === 0 ? 1 : i % 2 === 0
      ? (m * (b - m) * x) / ((a + 2 * m - 1) * (a + 2 * m))
      : -((a + m) * (a + b + m) * x) / ((a + 2 * m) * (a + 2 * m + 1));
    d = 1 / (1 + term * d || 1e-300);
    c = 1 + term / c || 1e-300;
    f *= c * d;
    if (Math.abs(1 - c * d) < 1e-14) break;
  }
  return front * (f - 1);
}

// P(|T| > |t|) for Student's T with df degrees of freedom, which need not be a whole number.
export const tTail = (t, df) => incompleteBeta(df / (df + t * t), df / 2, 0.5);

export function tQuantile(confidence, df) {
  let low = 0, high = 1;
  while (1 - tTail(high, df) < confidence) high *= 2;
  for (let i = 0; i < 80; i++) {
    const middle = (low + high) / 2;
    if (1 - tTail(middle, df) < confidence) low = middle; else high = middle;
  }
  return high;
}

const ROUNDING = 1e-12; // a scatter of accuracies below it comes from rounding
const mean = (values) => values.reduce((sum, value) => sum + value, 0) / values.length;
const variance = (values) => {
  const middle = mean(values);
  return values.reduce((sum, value) => sum + (value - middle) ** 2, 0) / (values.length - 1);
};

// Mean of a minus mean of b, and its 95 % interval: Welch's, for seeds that have nothing to do with each other.
export function welch(a, b) {
  const difference = mean(a) - mean(b);
  if (a.length < 2 || b.length < 2) return { difference, half: NaN, p: NaN, df: NaN };
  const va = variance(a) / a.length, vb = variance(b) / b.length, v = va + vb;
  if (Math.sqrt(v) < ROUNDING) return { difference, half: NaN, p: NaN, df: NaN, isFlat: true };
  const df = (v * v) / ((va * va) / (a.length - 1) + (vb * vb) / (b.length - 1));
  return { difference, half: tQuantile(0.95, df) * Math.sqrt(v), p: tTail(difference / Math.sqrt(v), df), df };
}

// The same over the seeds that both have: the mean of the differences seed by seed.
export function paired(seedsA, a, seedsB, b) {
  const differences = [];
  seedsA.forEach((seed, i) => {
    const j = seedsB.indexOf(seed);
    if (seed !== null && j >= 0) differences.push(a[i] - b[j]);
  });
  return meanDifference(differences);
}

// Spearman's rank correlation, its 95 % interval (Fisher's z with Bonett and Wright's error, 2000) and its p value (Student's t).
export function spearman(x, y) {
  const a = ranks(x), b = ranks(y), n = a.length, va = n > 1 ? variance(a) : 0, vb = n > 1 ? variance(b) : 0;
  if (!(va > 0 && vb > 0)) return { rho: NaN, low: NaN, high: NaN, p: NaN, n };
  const ma = mean(a), mb = mean(b);
  const rho = Math.max(-1, Math.min(1, a.reduce((sum, value, i) => sum + (value - ma) * (b[i] - mb), 0) / (n - 1) / Math.sqrt(va * vb)));
  if (n < 5) return { rho, low: NaN, high: NaN, p: NaN, n };
  const error = (1.959964 * Math.sqrt(1 + (rho * rho) / 2)) / Math.sqrt(n - 3), z = Math.atanh(Math.max(-1 + 1e-12, Math.min(1 - 1e-12, rho)));
  return { rho, low: Math.tanh(z - error), high: Math.tanh(z + error), p: Math.abs(rho) === 1 ? 0 : tTail(rho * Math.sqrt((n - 2) / (1 - rho * rho)), n - 2), n };
}

// Rank 1 for the smallest; equal values share the mean of their ranks.
function ranks(values) {
  const order = values.map((_, i) => i).sort((i, j) => values[i] - values[j]), found = new Array(values.length);
  for (let start = 0, end; start < order.length; start = end) {
    for (end = start; end < order.length && values[order[end]] === values[order[start]]; end++);
    for (let k = start; k < end; k++) found[order[k]] = (start + end + 1) / 2;
  }
  return found;
}

// The mean of differences, and its 95 % interval: of pairs.
export function meanDifference(differences) {
  const n = differences.length, difference = n ? mean(differences) : NaN;
  const spread = n > 1 ? Math.sqrt(variance(differences) / n) : NaN;
  if (!(spread >= ROUNDING)) return { difference, half: NaN, p: NaN, n };
  return { difference, half: tQuantile(0.95, n - 1) * spread, p: tTail(difference / spread, n - 1), n };
}
