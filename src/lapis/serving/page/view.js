// The conversation on the page: a block for each turn, the reader's words first, the replies below or side by side.
import { button, element } from "./dom.js";
import { Editor } from "./editor.js";
import { t } from "./language.js";
import { copyText } from "./copying.js";
import { ReplyView } from "./reply.js";

export class ConversationView {
  /**
   * @param {HTMLElement} place
   * @param {Object} acts what the page does: answer(turn, model), rewrite(turn, text)
   */
  constructor(place, acts) {
    this.place = place;
    this.acts = acts;
    this.turns = new Map();    // turn -> its block
    this.replies = new Map();  // reply -> ReplyView
  }

  /** Draws anew, as in another language. */
  redraw(...now) {
    this.turns.clear();
    this.replies.clear();
    this.place.replaceChildren();
    this.draw(...now);
  }

  /**
   * Brings the page up to date.
   * @param {Conversation} conversation
   * @param {string[]} models those that answer now
   * @param {boolean} busy whether a reply is being written
   */
  draw(conversation, models, busy) {
    const { turns } = conversation;
    for (const [turn, block] of this.turns) {
      if (!turns.includes(turn)) {
        block.place.remove();
        this.turns.delete(turn);
      }
    }
    turns.forEach((turn, index) => {
      if (!this.turns.has(turn)) this.#begin(turn, index);
      this.#fill(turn, turn === turns.at(-1), models, busy);
    });
    const present = new Set(turns.flatMap(turn => [...turn.replies.values()]));
    for (const reply of this.replies.keys()) if (!present.has(reply)) this.replies.delete(reply);
    this.place.hidden = !turns.length;
  }

  #begin(turn, index) {
    const answers = element("div", { class: "answers" });
    const tools = element("p", { class: "tools" });
    const prompt = element("p", { class: "prompt", dir: "auto" }, turn.text);
    const place = element("article", { "aria-label": t("turn", { number: index + 1 }) },
      element("div", { class: "said" }, element("h2", { class: "hidden" }, t("you")), prompt, tools), answers);
    this.turns.set(turn, { place, answers, tools, prompt });
    this.place.append(place);
  }

  #fill(turn, last, models, busy) {
    const { answers, tools, prompt } = this.turns.get(turn);
    const missing = last && !busy ? models.filter(model => !turn.replies.has(model)) : [];
    const columns = [...turn.replies.values()].map(reply => this.#viewOf(turn, reply, last, busy).place);
    columns.push(...missing.map(model => element("section", { class: "reply" },
      element("h3", { class: "who", dir: "auto" }, model),
      element("p", { class: "tools" }, button(t("answer"), () => this.acts.answer(turn, model), { class: "plain" })))));
    const same = columns.length === answers.childElementCount && columns.every((c, i) => c === answers.children[i]);
    if (!same) answers.replaceChildren(...columns);
    answers.classList.toggle("single", columns.length < 2);
    if (tools.contains(document.activeElement)) return;
    tools.replaceChildren(...(busy ? [] : [
      button(t("edit"), () => this.#edit(turn, last), { class: "quiet" }),
      button(t("copy"), () => copyText(turn.text), { class: "quiet" }),
    ]));
    prompt.hidden = false;
  }

  #viewOf(turn, reply, last, busy) {
    let view = this.replies.get(reply);
    const retry = last ? () => this.acts.answer(turn, reply.model) : null;
    const acts = { retry, changed: this.acts.changed, shown: this.acts.shown };
    if (!view) {
      view = new ReplyView(reply, acts);
      this.replies.set(reply, view);
    }
    view.acts = acts;
    view.update(busy);
    return view;
  }

  /** The view of a reply that grows. */
  grow(reply) {
    this.replies.get(reply)?.grow();
  }

  #edit(turn, last) {
    const { prompt, tools } = this.turns.get(turn);
    const editor = new Editor(turn.text, t("edit_message"), t("send_again"), last ? "" : t("edit_note"), text => {
      editor.place.remove();
      prompt.hidden = tools.hidden = false;
      if (text === null) tools.querySelector("button")?.focus();
      else this.acts.rewrite(turn, text);
    });
    prompt.hidden = tools.hidden = true;
    prompt.after(editor.place);
    editor.focus();
  }
}
