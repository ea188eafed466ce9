// The live lens: what every layer would have said at one token, asked of the server when the reader wants to see it.
import { element } from "./dom.js";
import { readLens, ServerError } from "./api.js";
import { errorText } from "./errors.js";
import { list, number, percent, signed, t } from "./language.js";
import { tokenName } from "./text.js";

const PAUSE = 200;  // milliseconds that a place stands still before the server is asked about it

/** The lens of one reply; shows one place at a time and asks once for each. */
export class LensPanel {
  constructor(reply) {
    this.reply = reply;
    this.known = new Map();
    this.place = element("div", { class: "lens" });
  }

  /** Shows the layers at a place of the reply, as soon as the server has read them. */
  async show(place) {
    this.asked?.abort();
    clearTimeout(this.timer);
    if (this.known.has(place)) return this.#draw(this.known.get(place));
    const asked = new AbortController();
    this.asked = asked;
    this.place.setAttribute("aria-busy", "true");
    if (!this.place.childElementCount) this.place.append(element("p", { class: "note" }, t("lens_reading")));
    await new Promise(resolve => { this.timer = setTimeout(resolve, PAUSE); });
    try {
      const { model, before, tokens } = this.reply;
      const seen = await readLens(model, before, tokens.slice(0, place + 1).map(token => token.id), place, asked.signal);
      this.known.set(place, seen);
      if (!asked.signal.aborted) this.#draw(seen);
    } catch (error) {
      if (error.name === "AbortError") return;
      if (!(error instanceof ServerError)) throw error;
      this.place.replaceChildren(element("p", { class: "note failed", role: "alert" }, errorText(error)));
    } finally {
      if (this.asked === asked) this.place.removeAttribute("aria-busy");
    }
  }

  #draw(seen) {
    this.place.replaceChildren(...[verdict(seen), strongest(seen), table(seen)].filter(Boolean));
  }
}

/** Which layer decided, in one sentence. */
function verdict(seen) {
  const token = seen.token;
  const last = seen.layers.at(-1);
  const best = last.top[0];
  const values = {
    token: tokenName(token), layer: number(seen.decided), last: number(last.layer), share: percent(token.probability),
    best: tokenName(best), best_share: percent(best.probability), rank: number(token.rank),
  };
  const name = token.id === best.id ? (seen.at_end ? "lens_next" : "lens_decided") : "lens_drawn";
  return element("p", { class: "verdict" }, t(name, values));
}

/** The parts of the model that did most for the token. */
function strongest(seen) {
  if (!seen.parts.length) return null;
  const names = list(seen.parts.map(part => `${partName(part)} (${signed(part.logit)})`));
  return element("p", { class: "note" }, t("lens_parts", { token: tokenName(seen.token), parts: names }));
}

function partName({ part, layer, head }) {
  if (part === "head") return t("part_head", { layer, head });
  if (part === "mlp") return t("part_mlp", { layer });
  return part === "embed" ? t("part_embed") : `${part}${layer === null ? "" : ` ${layer}`}`;
}

/** A row for the embedding and for each layer: what it would say, with how much of its probability, and the rank. */
function table(seen) {
  const rows = [seen.embedding, ...seen.layers];
  const head = element("tr", {},
    element("th", { scope: "col" }, t("layer")),
    element("th", { scope: "col" }, t("would_say")),
    element("th", { scope: "col", class: "then" }, t("then")),
    element("th", { scope: "col", class: "number" }, t("rank")));
  const body = rows.map(row => {
    const [best, ...others] = row.top;
    const decided = row.layer !== null && row.layer === seen.decided;
    const leads = row.layer !== null && row.layer >= seen.decided;
    const bar = element("span", { class: "bar", "aria-hidden": "true" });
    bar.style.setProperty("--share", best.probability.toFixed(4));
    return element("tr", { class: [decided && "decided", leads && "leads"].filter(Boolean).join(" ") || null },
      element("th", { scope: "row" }, row.layer === null ? t("embedding") : number(row.layer),
        decided ? element("span", { class: "hidden" }, ` (${t("decided")})`) : null),
      element("td", { class: "best" },
        element("span", { class: "what" }, tokenName(best)), bar,
        element("span", { class: "share" }, percent(best.probability))),
      element("td", { class: "then" }, others.slice(0, 2).map(o => `${tokenName(o)} ${percent(o.probability)}`).join("   ")),
      element("td", { class: "number" }, number(row.rank)));
  });
  return element("table", {},
    element("caption", { class: "hidden" }, t("lens_caption")),
    element("thead", {}, head), element("tbody", {}, ...body));
}
