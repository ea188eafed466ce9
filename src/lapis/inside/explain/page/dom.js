// Elements, drawings and small charts. Text only ever becomes text: nothing on this page parses HTML.
const SVG = "http://www.w3.org/2000/svg";

function make(space, tag, attributes, children) {
  const made = space ? document.createElementNS(space, tag) : document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (typeof value === "function") made.addEventListener(name, value);
    else if (value === true) made.setAttribute(name, "");
    else if (value !== false && value !== null && value !== undefined) made.setAttribute(name, value);
  }
  made.append(...children.filter(child => child !== null && child !== undefined));
  return made;
}
const element = (tag, attributes = {}, ...children) => make(null, tag, attributes, children);
const svg = (tag, attributes = {}, ...children) => make(SVG, tag, attributes, children);
const spot = name => document.getElementById(name);

/** A token as a chip; press makes it a button. */
function chip(text, press = null, attributes = {}) {
  return press ? element("button", { type: "button", class: "chip", click: press, ...attributes }, element("bdi", {}, text))
    : element("bdi", { class: "chip", ...attributes }, text);
}

/** A bar whose length is a share of its place. */
function bar(share, kind = "") {
  const made = element("span", { class: `bar ${kind}`, "aria-hidden": "true" });
  made.style.setProperty("--share", Math.max(0, Math.min(1, share)).toFixed(5));
  return made;
}

const css = name => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
let shades = null;

/** Reads the scales of the style sheet: at first, and when dark becomes light. */
function readShades() {
  const scale = name => Array.from({ length: 6 }, (_, i) => {
    const hex = css(`--${name}-${i}`);
    return [1, 3, 5].map(at => parseInt(hex.slice(at, at + 2), 16));
  });
  shades = { blue: scale("blue"), amber: scale("amber"), hidden: [1, 3, 5].map(at => parseInt(css("--paper").slice(at, at + 2), 16)) };
}

/** A color from a scale, as [red, green, blue]: share 0 is the paper, 1 the strongest. */
function shade(share, name = "blue") {
  if (Number.isNaN(share)) return shades.hidden;
  const at = Math.max(0, Math.min(1, share)) * 5;
  const low = Math.min(4, Math.floor(at));
  return shades[name][low].map((value, i) => Math.round(value + (shades[name][low + 1][i] - value) * (at - low)));
}
const signedShade = value => shade(Math.abs(value), value < 0 ? "amber" : "blue");
const rgb = color => `rgb(${color.join(",")})`;
const textOn = color => (0.299 * color[0] + 0.587 * color[1] + 0.114 * color[2] > 140 ? "#14171b" : "#fcfbf8");

/** A matrix as a picture of one pixel for each number; the style sheet enlarges it. color(i, j) -> [r, g, b]. */
function heat(rows, columns, color, label) {
  const canvas = element("canvas", { width: columns, height: rows, class: "heat", role: label ? "img" : null, "aria-label": label, "aria-hidden": label ? null : "true" });
  const picture = canvas.getContext("2d").createImageData(columns, rows);
  for (let i = 0; i < rows; i += 1) for (let j = 0; j < columns; j += 1) picture.data.set([...color(i, j), 255], 4 * (i * columns + j));
  canvas.getContext("2d").putImageData(picture, 0, 0);
  return canvas;
}

/** A matrix of numbers of both signs; the strongest color is its 85th percentile, since some are far larger. */
function signedHeat(rows, columns, at, label) {
  const sizes = [];
  for (let i = 0; i < rows; i += 1) for (let j = 0; j < columns; j += 1) sizes.push(Math.abs(at(i, j)));
  sizes.sort((a, b) => a - b);
  const high = sizes[Math.floor(0.85 * (sizes.length - 1))] || 1;
  return heat(rows, columns, (i, j) => signedShade(at(i, j) / high), label);
}

/** Makes children one stop of the Tab key, among which arrow keys, Home and End move. act(index) chooses one. */
function roving(box, now, act, columns = 1) {
  const items = [...box.querySelectorAll("[data-item]")];
  const mark = chosen => items.forEach((item, i) => {
    item.tabIndex = i === chosen ? 0 : -1;
    if (item.hasAttribute("aria-selected")) item.setAttribute("aria-selected", String(i === chosen));
  });
  mark(now);
  items.forEach((item, i) => item.addEventListener("click", () => act(i)));
  box.onkeydown = event => {
    const at = items.indexOf(event.target.closest("[data-item]"));
    const goal = { ArrowRight: at + 1, ArrowLeft: at - 1, ArrowDown: at + columns, ArrowUp: at - columns, Home: 0, End: items.length - 1, Enter: at, " ": at }[event.key];
    if (at < 0 || goal === undefined || event.ctrlKey || event.metaKey || event.altKey) return;
    event.preventDefault();
    if (goal < 0 || goal >= items.length) return;
    act(goal);
    ([...box.querySelectorAll("[data-item]")][goal] ?? items[goal]).focus();
  };
  return mark;
}

/** Redraws into a place and keeps the keyboard where it was. */
function fill(place, ...children) {
  const at = place.contains(document.activeElement) ? [...place.querySelectorAll("[data-item]")].indexOf(document.activeElement) : -1;
  place.replaceChildren(...children.filter(child => child !== null && child !== undefined));
  if (at >= 0) place.querySelectorAll("[data-item]")[at]?.focus();
}

const HUES = ["lapis", "orange", "teal", "gold", "purple", "slate"];
const DASHES = ["", "7 3", "2 3", "8 3 2 3", "12 4", "12 3 3 3"];

/** A line chart. series: [{ name, points: [[x, y]] }]; x and y: { name, log, show(value) }; mark: an x that is set off. */
function chart(place, { label, series, x, y, mark = null, height = 240, reverse = false }) {
  const width = Math.max(280, Math.min(620, place.clientWidth || 280));
  const names = Math.max(...series.map(one => Math.min(16, one.name.length)));
  const [left, right, top, bottom] = [56, 16 + 7.5 * names, 12, 40];
  const points = series.flatMap(one => one.points).filter(([, b]) => Number.isFinite(b) && (!y.log || b > 0));
  if (!points.length) return fill(place, element("p", { class: "note" }, "Nothing was measured here."));
  const scale = (axis, values, from, to) => {
    const turn = value => axis.log ? Math.log10(value) : value;
    let [low, high] = [Math.min(...values.map(turn)), Math.max(...values.map(turn))];
    if (!axis.log) low = Math.min(low, axis.low ?? low);
    if (high === low) high = low + 1;
    const at = value => from + (turn(value) - low) / (high - low) * (to - from);
    const ticks = [];
    if (axis.log) {
      const step = Math.max(1, Math.ceil((high - low) / 5));
      for (let power = Math.ceil(low - 1e-9); power <= high + 1e-9; power += step) ticks.push(10 ** power);
    } else {
      const raw = (high - low) / 4;
      const size = 10 ** Math.floor(Math.log10(raw));
      const step = Math.max(axis.whole ? 1 : 0, size * [1, 2, 5, 10].find(times => times * size >= raw));
      for (let value = Math.ceil(low / step - 1e-9) * step; value <= high + 1e-9 * step; value += step) ticks.push(value);
    }
    return { at, ticks };
  };
  const across = scale(x, points.map(([a]) => a), left, width - right);
  const along = scale(y, points.map(([, b]) => b), ...(reverse ? [top, height - bottom] : [height - bottom, top]));
  const drawing = svg("svg", { viewBox: `0 0 ${width} ${height}`, width, height, role: "img", "aria-label": label, class: "chart" });
  for (const tick of along.ticks) drawing.append(
    svg("line", { x1: left, x2: width - right, y1: along.at(tick), y2: along.at(tick), class: "grid" }),
    svg("text", { x: left - 6, y: along.at(tick) + 4, class: "tick end" }, y.show(tick)));
  for (const tick of across.ticks) drawing.append(svg("text", { x: across.at(tick), y: height - bottom + 16, class: "tick middle" }, x.show(tick)));
  drawing.append(svg("text", { x: left, y: height - 6, class: "tick" }, x.name));
  if (mark !== null) drawing.append(svg("line", { x1: across.at(mark), x2: across.at(mark), y1: top, y2: height - bottom, class: "mark" }));
  const ends = series.map((one, i) => {
    const drawn = one.points.filter(([, b]) => Number.isFinite(b) && (!y.log || b > 0)).map(([a, b]) => [across.at(a), along.at(b)]);
    drawing.append(svg("polyline", { points: drawn.map(point => point.map(value => value.toFixed(1)).join(",")).join(" "), class: "line", stroke: `var(--${HUES[i % 6]})`, "stroke-dasharray": DASHES[i % 6] }));
    return { i, name: one.name, y: drawn.length ? drawn.at(-1)[1] : top };
  }).sort((a, b) => a.y - b.y);
  let last = -Infinity;
  for (const end of ends) {
    last = Math.max(last + 14, end.y);
    drawing.append(svg("text", { x: width - right + 6, y: last + 4, class: "name", fill: `var(--${HUES[end.i % 6]})` }, end.name.length > 16 ? `${end.name.slice(0, 15)}…` : end.name));
  }
  fill(place, drawing);
}
