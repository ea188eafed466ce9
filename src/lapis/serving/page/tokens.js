// A reply as its tokens: each shaded by how unlikely it was, the one that is chosen with what could have stood there.
//
// Characters of many scripts are made of several tokens; such tokens stand in one group, which is shaded as their
// product. The tokens are one stop of the Tab key: arrow keys, Home and End move among them.
import { button, element, freshId } from "./dom.js";
import { list, number, percent, t } from "./language.js";
import { LensPanel } from "./lens.js";
import { pictured, tokenName, visible } from "./text.js";

// Probabilities below which a token is shaded, one step stronger each; tests/serving/test_page.py measures the contrast.
const STEPS = [0.9, 0.6, 0.3, 0.1];
const encoder = new TextEncoder();

/** How strong a probability is shaded: 0 for what was nearly certain to 4. */
export function shadeOf(probability) {
  return STEPS.filter(step => probability < step).length;
}

/** Whether two entries of the server are one token; its text alone does not tell, as of halves of characters. */
function same(one, other) {
  return one.id === undefined ? one.token === other.token : one.id === other.id;
}

/** How many bytes at the end are the beginning of a character that is not complete. */
function unfinished(bytes) {
  for (let back = 1; back <= Math.min(3, bytes.length); back += 1) {
    const byte = bytes[bytes.length - back];
    if (byte >= 0xc0) return back < (byte >= 0xf0 ? 4 : byte >= 0xe0 ? 3 : 2) ? back : 0;
    if (byte < 0x80) return 0;
  }
  return 0;
}

function bytesOf(token) {
  return token.bytes ?? [...encoder.encode(token.token)];
}

/** Tokens in groups that are whole characters: [{ first, last, text, probability }]. */
export function groupsOf(tokens, start = 0, final = true) {
  const groups = [];
  let bytes = [];
  let first = start;
  for (let i = start; i < tokens.length; i += 1) {
    bytes.push(...bytesOf(tokens[i]));
    // a character goes on only where the next token begins with a byte that continues one
    const goesOn = i + 1 < tokens.length ? (bytesOf(tokens[i + 1])[0] & 0xc0) === 0x80 : !final;
    if (unfinished(bytes) && goesOn) continue;
    const text = new TextDecoder().decode(new Uint8Array(bytes));
    const logprob = tokens.slice(first, i + 1).reduce((sum, token) => sum + token.logprob, 0);
    groups.push({ first, last: i, text, probability: Math.exp(logprob) });
    bytes = [];
    first = i + 1;
  }
  return groups;
}

/** The tokens of one reply, what could have stood in the place of the chosen one, and the lens. */
export class TokenView {
  /** state: { place, lens }, which the caller keeps, so that a redrawn page shows the same token. */
  constructor(reply, state) {
    this.reply = reply;
    this.state = state;
    this.groups = [];
    this.strip = element("div", {
      class: "tokens", role: "listbox", "aria-orientation": "horizontal", dir: "auto",
      "aria-label": t("tokens_of", { model: reply.model }),
      keydown: event => this.#press(event),
      click: event => this.#click(event),
    });
    this.detail = element("div", { class: "detail" });
    this.lens = new LensPanel(reply);
    this.place = element("div", { class: "inside" }, this.strip, legend(), this.detail);
    this.grow();
  }

  /** Shows the tokens that have come since; at the end of the reply also the place behind it. */
  grow() {
    const final = this.reply.state !== "writing";
    const known = this.groups.length ? this.groups.at(-1).last + 1 : 0;
    for (const group of groupsOf(this.reply.tokens, known, final)) this.#add(group, this.#textOf(group), this.#labelOf(group));
    if (final && !this.ended) this.#end();
    if (this.state.place !== null && this.groups.some(group => group.last >= this.state.place)) this.#mark();
    else if (this.groups.length) this.groups[0].option.tabIndex = 0;
    this.#explain();
  }

  /** A reply that ended by itself has its end token as the last; behind any other stands the place of what comes next. */
  #end() {
    this.ended = true;
    const { tokens, text, reason } = this.reply;
    if (reason !== "stop" || text.endsWith(tokens.at(-1).token)) {
      this.#add({ first: tokens.length, last: tokens.length }, t("end"), t("end_label"));
    }
    this.strip.lastElementChild.classList.add("end");
  }

  #add(group, text, label) {
    group.option = element("span", {
      role: "option", tabindex: "-1", "aria-selected": "false", "aria-label": label,
      class: group.probability === undefined ? "token" : `token shade-${shadeOf(group.probability)}`,
    }, text);
    this.groups.push(group);
    this.strip.append(group.option);
  }

  /** A group as it stands in the text. */
  #textOf(group) {
    if (/^\p{Cf}*$/u.test(group.text)) return tokenName(this.reply.tokens[group.first]);
    return pictured(group.text).replaceAll("\n", "↵\n");
  }

  #labelOf(group) {
    const token = this.reply.tokens[group.first];
    const alone = group.first === group.last;
    const values = { token: alone ? tokenName(token) : visible(group.text), share: percent(group.probability) };
    const rest = (token.top_logprobs ?? []).filter(other => !same(other, token)).slice(0, 2);
    if (!rest.length || !alone) return t("token_label", values);
    const others = rest.map(other => `${tokenName(other)} ${percent(Math.exp(other.logprob))}`);
    return `${t("token_label", values)}. ${t("instead")}: ${list(others)}`;
  }

  #click(event) {
    const group = this.groups.find(candidate => candidate.option === event.target);
    if (group) this.choose(group.first);
  }

  #press(event) {
    const last = this.groups.at(-1).last;
    const now = this.state.place ?? -1;
    const goal = { ArrowRight: now + 1, ArrowDown: now + 1, ArrowLeft: now - 1, ArrowUp: now - 1, Home: 0, End: last,
      Enter: Math.max(0, now), " ": Math.max(0, now) }[event.key];
    if (goal === undefined || event.ctrlKey || event.metaKey || event.altKey) return;
    event.preventDefault();
    this.choose(Math.min(Math.max(goal, 0), last));
  }

  /** Chooses the token at a place; the place behind the last token stands for what would come next. */
  choose(place, focus = true) {
    this.state.place = place;
    this.#mark();
    if (focus) this.#group().option.focus();
    this.#explain();
  }

  #group() {
    return this.groups.find(group => group.last >= this.state.place) ?? this.groups.at(-1);
  }

  #mark() {
    const chosen = this.#group();
    if (chosen === this.marked) return;
    for (const group of [this.marked ?? this.groups[0], chosen]) {
      group.option.tabIndex = group === chosen ? 0 : -1;
      group.option.setAttribute("aria-selected", String(group === chosen));
    }
    this.marked = chosen;
  }

  /** Shows what is known of the chosen place. */
  #explain() {
    const { place } = this.state;
    if (place === this.shown && place !== null) return;
    if (place === null) {
      this.detail.replaceChildren(element("p", { class: "note" }, t("choose_token")));
      return;
    }
    if (place > this.reply.tokens.length - (this.ended ? 0 : 1)) return;
    this.shown = place;
    const token = this.reply.tokens[place];
    const open = this.state.lens;
    const id = freshId("lens");
    const toggle = button(t(open ? "lens_close" : "lens_open"), () => this.#toggleLens(), {
      "aria-expanded": String(open), "aria-controls": id, class: "plain",
    });
    this.lens.place.id = id;
    this.lens.place.hidden = !open;
    this.toggle = toggle;
    this.detail.replaceChildren(
      element("p", { class: "chosen" },
        button("←", () => this.choose(Math.max(0, place - 1), false), { "aria-label": t("before"), class: "step" }),
        button("→", () => this.choose(Math.min(this.groups.at(-1).last, place + 1), false), {
          "aria-label": t("after"), class: "step",
        }),
        element("span", {}, token ? this.#sentence(place, token) : t("end_sentence"))),
      token ? alternatives(token) : "",
      element("p", { class: "lens-line" }, toggle),
      this.lens.place);
    if (open) this.lens.show(place);
  }

  #sentence(place, token) {
    const group = this.#group();
    const values = { token: tokenName(token), share: percent(Math.exp(token.logprob)) };
    const said = t("token_sentence", { ...values, place: number(place + 1), count: number(this.reply.tokens.length) });
    if (group.first === group.last) return said;
    const part = { part: place - group.first + 1, count: group.last - group.first + 1, text: visible(group.text) };
    return `${said} ${t("piece", part)}`;
  }

  #toggleLens() {
    this.state.lens = !this.state.lens;
    this.lens.place.hidden = !this.state.lens;
    this.toggle.setAttribute("aria-expanded", String(this.state.lens));
    this.toggle.textContent = t(this.state.lens ? "lens_close" : "lens_open");
    if (this.state.lens) this.lens.show(this.state.place);
  }
}

/** A bar for each token that could have stood there, the likeliest first; the one that was said is marked. */
function alternatives(token) {
  const rows = (token.top_logprobs ?? []).map(other => ({ ...other, said: same(other, token) }));
  if (rows.length && !rows.some(row => row.said)) rows.push({ ...token, said: true });
  if (!rows.length) return element("p", { class: "note" }, t("no_alternatives"));
  return element("ol", { class: "bars", "aria-label": t("alternatives") }, ...rows.map(row => {
    const share = Math.exp(row.logprob);
    const bar = element("span", { class: "bar", "aria-hidden": "true" });
    bar.style.setProperty("--share", share.toFixed(4));
    return element("li", { class: row.said ? "said" : null },
      element("span", { class: "what" }, tokenName(row), row.said ? element("span", { class: "hidden" }, ` (${t("said")})`) : null),
      bar,
      element("span", { class: "share" }, percent(share)));
  }));
}

/** What the shades mean. */
function legend() {
  const names = [...STEPS.map(step => `≥ ${percent(step)}`), `< ${percent(STEPS.at(-1))}`];
  return element("p", { class: "legend" }, element("span", {}, t("legend")),
    ...names.map((name, step) => element("span", { class: `token shade-${step}` }, name)));
}
