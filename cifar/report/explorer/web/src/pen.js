// The same drawing on a canvas and as SVG: the page draws on canvases, which are fast, and an export may be either.

export class CanvasPen {
  constructor(canvas, width, height, scale = devicePixelRatio || 1) {
    const pixels = [Math.round(width * scale), Math.round(height * scale)];
    this.context = canvas.getContext("2d");
    if (canvas.width === pixels[0] && canvas.height === pixels[1]) { // to clear it is cheaper than to make it anew
      this.context.setTransform(1, 0, 0, 1, 0, 0);
      this.context.clearRect(0, 0, ...pixels);
    } else {
      [canvas.width, canvas.height] = pixels;
      canvas.style.width = `${width}px`;
      canvas.style.height = `${height}px`;
    }
    this.context.scale(scale, scale);
  }

  rect(x, y, width, height, { fill, alpha = 1 }) {
    this.context.globalAlpha = alpha;
    this.context.fillStyle = fill;
    this.context.fillRect(x, y, width, height);
  }

  // d: a function that draws the path with moveTo, lineTo, arc and closePath
  path(d, { fill, stroke, width = 1, alpha = 1, dash = [] }) {
    const c = this.context;
    c.globalAlpha = alpha;
    c.beginPath();
    d(c);
    if (fill) { c.fillStyle = fill; c.fill(); }
    if (stroke) { c.strokeStyle = stroke; c.lineWidth = width; c.setLineDash(dash); c.stroke(); c.setLineDash([]); }
  }

  text(x, y, text, { fill, size = 12, anchor = "start", baseline = "alphabetic", rotate = 0, weight = "" }) {
    const c = this.context;
    c.save();
    c.globalAlpha = 1;
    c.translate(x, y);
    c.rotate((rotate * Math.PI) / 180);
    c.fillStyle = fill;
    c.font = `${weight} ${size}px system-ui, "Segoe UI", Roboto, "Liberation Sans", sans-serif`;
    c.textAlign = { start: "left", middle: "center", end: "right" }[anchor];
    c.textBaseline = baseline;
    c.fillText(text, 0, 0);
    c.restore();
  }

  clip(x, y, width, height, draw) {
    this.context.save();
    this.context.beginPath();
    this.context.rect(x, y, width, height);
    this.context.clip();
    draw();
    this.context.restore();
  }
}

const round = (value) => Math.round(value * 100) / 100;
const escapeXml = (text) => String(text).replace(/[&<>"]/g, (c) => ({ "&": "&amp;", "<": "&lt;", ">": "&gt;", '"': "&quot;" })[c]);

class SvgPath {
  constructor() { this.d = ""; }
  moveTo(x, y) { this.d += `M${round(x)} ${round(y)}`; }
  lineTo(x, y) { this.d += `L${round(x)} ${round(y)}`; }
  closePath() { this.d += "Z"; }
  arc(x, y, r) { this.d += `M${round(x - r)} ${round(y)}a${r} ${r} 0 1 0 ${2 * r} 0a${r} ${r} 0 1 0 ${-2 * r} 0`; } // a circle
}

export class SvgPen {
  constructor(width, height) { Object.assign(this, { width, height, parts: [], clips: 0 }); }

  rect(x, y, width, height, { fill, alpha = 1 }) {
    this.parts.push(`<rect x="${round(x)}" y="${round(y)}" width="${round(width)}" height="${round(height)}" fill="${fill}" fill-opacity="${alpha}"/>`);
  }

  path(d, { fill, stroke, width = 1, alpha = 1, dash = [], name = "" }) {
    const path = new SvgPath();
    d(path);
    if (path.d) this.parts.push(`<path d="${path.d}" fill="${fill || "none"}" stroke="${stroke || "none"}" stroke-width="${width}" opacity="${alpha}"${name ? ` class="${name}"` : ""}${dash.length ? ` stroke-dasharray="${dash.join(" ")}"` : ""}/>`);
  }

  text(x, y, text, { fill, size = 12, anchor = "start", baseline = "alphabetic", rotate = 0, weight = "" }) {
    const shift = { middle: "0.35em", top: "0.8em", alphabetic: "0" }[baseline];
    this.parts.push(`<text x="0" y="0" dy="${shift}" transform="translate(${round(x)} ${round(y)}) rotate(${rotate})" fill="${fill}" font-size="${size}" text-anchor="${anchor}"${weight ? ` font-weight="${weight}"` : ""}>${escapeXml(text)}</text>`);
  }

  clip(x, y, width, height, draw) {
    const id = `clip${this.clips++}`;
    this.parts.push(`<clipPath id="${id}"><rect x="${x}" y="${y}" width="${width}" height="${height}"/></clipPath><g clip-path="url(#${id})">`);
    draw();
    this.parts.push("</g>");
  }

  toString() {
    return `<svg xmlns="http://www.w3.org/2000/svg" width="${this.width}" height="${this.height}" viewBox="0 0 ${this.width} ${this.height}" font-family="system-ui, Segoe UI, Roboto, Liberation Sans, sans-serif">${this.parts.join("")}</svg>`;
  }
}

// Outlines of marks of about the same area around (x, y). Families differ in shape too, not in colour alone.
export const SHAPES = [
  (c, x, y, r) => { c.moveTo(x + r, y); c.arc(x, y, r, 0, 2 * Math.PI); },
  (c, x, y, r) => polygon(c, x, y, r * 1.25, 4, Math.PI / 4),
  (c, x, y, r) => polygon(c, x, y, r * 1.3, 3, -Math.PI / 2),
  (c, x, y, r) => polygon(c, x, y, r * 1.3, 4, 0),
  (c, x, y, r) => polygon(c, x, y, r * 1.3, 3, Math.PI / 2),
  (c, x, y, r) => polygon(c, x, y, r * 1.1, 6, 0),
  (c, x, y, r) => polygon(c, x, y, r * 1.15, 5, -Math.PI / 2),
  (c, x, y, r) => cross(c, x, y, r * 1.1),
];

function polygon(c, x, y, r, corners, start) {
  for (let i = 0; i < corners; i++) {
    const angle = start + (2 * Math.PI * i) / corners;
    c[i ? "lineTo" : "moveTo"](x + r * Math.cos(angle), y + r * Math.sin(angle));
  }
  c.closePath();
}

function cross(c, x, y, r) {
  const a = r * 0.4;
  [[-a, -r], [a, -r], [a, -a], [r, -a], [r, a], [a, a], [a, r], [-a, r], [-a, a], [-r, a], [-r, -a], [-a, -a]].forEach(([dx, dy], i) =>
    c[i ? "lineTo" : "moveTo"](x + dx, y + dy));
  c.closePath();
}

// The colours of the page's theme, light or dark, as they are now.
export function readTheme() {
  const style = getComputedStyle(document.documentElement);
  const read = (name) => style.getPropertyValue(name).trim();
  return { ink: read("--ink"), muted: read("--muted"), line: read("--line"), paper: read("--paper"), accent: read("--accent") };
}

// Okabe and Ito's palette for colour-blind readers; its yellow is darker here, to be seen on white.
export const COLOURS = ["#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#d55e00", "#9a8700", "#808890"];
export const LIGHT_COLOURS = ["#4aa3df", "#f0b63c", "#2fc598", "#e39cc5", "#7cc8f2", "#f08a4b", "#d3c23a", "#a8b0b8"]; // on dark paper

// A picture that leaves the page says itself if its data is not CIFAR-10.
export function paintBanner(pen, banner, left = 62) {
  if (!banner) return;
  pen.rect(left, 1, 8.4 * banner.length + 16, 22, { fill: "#ffe9b8" });
  pen.text(left + 8, 16, banner, { fill: "#5c3c00", size: 13, weight: "bold" });
}
