// What the page holds: the records of the explanation, arrays unpacked, and what the reader has chosen.
const DATA = JSON.parse(document.getElementById("explanation").textContent);
const STEPS = 65534;
const HIDDEN = 65535;  // of shares: what a mask hides

/** An array of the explanation: at(i, j, ...) reads a number; NaN is what a mask hides. */
class Numbers {
  constructor({ shape, type, data }) {
    const bytes = Uint8Array.from(atob(data), character => character.charCodeAt(0));
    this.shape = shape;
    this.values = type === "u16" ? new Uint16Array(bytes.buffer) : new Float32Array(bytes.buffer);
    this.shares = type === "u16";
  }

  at(...place) {
    let index = 0;
    for (let axis = 0; axis < this.shape.length; axis += 1) index = index * this.shape[axis] + place[axis];
    const value = this.values[index];
    return this.shares ? (value === HIDDEN ? NaN : value / STEPS) : value;
  }

  /** The numbers of one row of the last axis. */
  row(...place) {
    return Array.from({ length: this.shape.at(-1) }, (_, i) => this.at(...place, i));
  }
}

function unpack(value) {
  if (Array.isArray(value)) return value.map(unpack);
  if (value === null || typeof value !== "object") return value;
  if ("data" in value && "shape" in value) return new Numbers(value);
  return Object.fromEntries(Object.entries(value).map(([name, item]) => [name, unpack(item)]));
}

const E = unpack(DATA);
const P = E.tokens.length;
const LAYERS = E.build.layers;
const A = E.attention ? E.attention.places : 0;
const SKIPPED = P - A;  // places that the attention maps have no room for
const pair = (t, s) => t * (t + 1) / 2 + s;

/** The weight of a head at two places of its map. */
const weightAt = (layer, head, t, s) => E.attention.weights.at(layer, head, pair(t, s));
const detailOf = (layer, head) => E.attention?.heads.find(one => one.layer === layer && one.head === head);

/** A name in which control characters, and those that would turn the text around them, can be seen. */
function safe(text) {
  return Array.from(text, character => {
    const code = character.codePointAt(0);
    if (code < 0x20) return String.fromCodePoint(0x2400 + code);
    if (code === 0x7f || (code >= 0x80 && code < 0xa0) || (code >= 0xd800 && code < 0xe000)) return "\ufffd";
    const turns = code === 0x61c || code === 0x200e || code === 0x200f || (code >= 0x202a && code <= 0x202e) || (code >= 0x2066 && code <= 0x2069);
    return turns ? `⟨U+${code.toString(16).toUpperCase().padStart(4, "0")}⟩` : character;
  }).join("");
}

/** A token: its spaces and line ends can be seen, too. */
const shown = text => safe(text.replaceAll(" ", "␣").replaceAll("\n", "↵").replaceAll("\t", "⇥"));
const tokenAt = place => shown(E.tokens[place].text);
const named = (id, texts = E.texts) => shown(texts[id] ?? `id ${id}`);
const stateName = row => row ? `layer ${row - 1}` : "embedding";

const percent = share => `${(100 * share).toFixed(1)} %`;
function number(value) {
  if (!Number.isFinite(value)) return "–";
  const size = Math.abs(value);
  const text = size >= 1000 ? Math.round(value).toLocaleString("en") : size >= 100 ? value.toFixed(0) : size >= 10 ? value.toFixed(1) : value.toFixed(2);
  return text.replace("-", "−");
}
const plain = value => String(Number(value.toPrecision(3))).replace("-", "−");
const whole = value => value.toLocaleString("en");
const signed = value => (value > 0 ? "+" : "") + number(value);
function inShort(value) {
  for (const [size, unit] of [[1e12, " T"], [1e9, " G"], [1e6, " M"], [1e3, " k"]]) if (value >= size) return plain(value / size) + unit;
  return plain(value);
}

/** Chooses the first head to look at: one of those that did most, that does not only look at the first token. */
function firstHead() {
  const looks = head => {
    const row = Array.from({ length: A }, (_, s) => weightAt(head.layer, head.head, A - 1, s) || 0);
    return row.indexOf(Math.max(...row)) > 0;
  };
  return E.attention?.heads.find(looks) ?? E.attention?.heads[0] ?? { layer: LAYERS - 1, head: 0 };
}

const state = { place: P - 1, layer: firstHead().layer, head: firstHead().head, word: 0 };
const views = [];

/** Draws again what depends on a choice. needs: the names of what it depends on; "look" is width and colors. */
function watch(needs, draw) {
  views.push({ needs: new Set([...needs, "look"]), draw });
}

function choose(change) {
  const changed = Object.keys(change).filter(name => state[name] !== change[name]);
  Object.assign(state, change);
  if (changed.length) redraw(changed);
}

function redraw(changed) {
  for (const { needs, draw } of views) if (changed.some(name => needs.has(name))) draw();
}
