// One model's reply on the page: its text while it grows, how it went, and what can be done with it.
import { announce } from "./announcer.js";
import { button, element, freshId } from "./dom.js";
import { Editor } from "./editor.js";
import { errorText } from "./errors.js";
import { number, t } from "./language.js";
import { copyText } from "./copying.js";
import { showText } from "./text.js";
import { TokenView } from "./tokens.js";

const states = new WeakMap();  // reply -> what of its inside is open; a redrawn page shows the same

export class ReplyView {
  /**
   * @param {Reply} reply
   * @param {Object} acts what the conversation does: retry(), changed()
   */
  constructor(reply, acts) {
    this.reply = reply;
    this.acts = acts;
    if (!states.has(reply)) states.set(reply, { open: false, place: null, lens: false });
    this.state = states.get(reply);
    const id = freshId("who");
    this.text = element("div", { class: "text" });
    this.inside = element("div", { hidden: true, id: freshId("inside") });
    this.notes = element("div");
    this.tools = element("p", { class: "tools" });
    this.how = element("span", { class: "how" });
    this.place = element("section", { class: "reply", "aria-labelledby": id },
      element("div", { class: "head" }, element("h3", { id, class: "who", dir: "auto" }, reply.model), this.how), this.text, this.inside, this.notes, this.tools);
    this.update(false);
  }

  /** Shows what came since the last frame. */
  grow() {
    if (this.waiting) return;
    this.waiting = requestAnimationFrame(() => {
      this.waiting = 0;
      this.#showText();
      if (!this.look && this.reply.tokens.length) this.update(true);
    });
  }

  /** Shows how the reply stands; busy says that some reply of the conversation is being written. */
  update(busy) {
    const { reply } = this;
    this.place.setAttribute("aria-busy", String(reply.state === "writing"));
    this.place.classList.toggle("writing", reply.state === "writing");
    this.#showText();
    this.notes.replaceChildren(...this.#notes());
    this.#showTools(busy);
  }

  #showText() {
    const open = this.state.open && (this.reply.tokens.length > 0 || this.tokens);
    if (open && !this.tokens) {
      this.tokens = new TokenView(this.reply, this.state);
      this.inside.replaceChildren(this.tokens.place);
    } else if (open) this.tokens.grow();
    this.inside.hidden = !open;
    this.text.hidden = Boolean(open);
    if (!open) showText(this.text, this.reply.text);
  }

  #notes() {
    const { reply } = this;
    const notes = [];
    if (reply.state === "failed") notes.push(element("p", { class: "note failed" }, errorText(reply.error)));
    if (reply.state === "stopped") notes.push(element("p", { class: "note" }, t("stopped")));
    if (reply.state === "done" && reply.reason === "length") notes.push(element("p", { class: "note" }, t("cut")));
    if (reply.state === "done" && !reply.text.trim()) notes.push(element("p", { class: "note" }, t("empty")));
    if (reply.edited) notes.push(element("p", { class: "note" }, t("edited")));
    return notes;
  }

  #showTools(busy) {
    const { reply } = this;
    const focused = this.tools.contains(document.activeElement) ? document.activeElement.dataset.name : null;
    const tools = [];
    if (reply.tokens.length) {
      this.look = button(t(this.state.open ? "close_inside" : "look_inside"), () => this.#toggle(), {
        class: "plain", "aria-expanded": String(this.state.open), "aria-controls": this.inside.id, "data-name": "look",
      });
      tools.push(this.look);
    }
    if (reply.state !== "writing") {
      if (reply.text) tools.push(button(t("copy"), () => copyText(reply.text), { class: "quiet", "data-name": "copy" }));
      if (!busy) {
        if (this.acts.retry) tools.push(button(t("retry"), this.acts.retry, { class: "quiet", "data-name": "retry" }));
        tools.push(button(t("edit"), () => this.#edit(), { class: "quiet", "data-name": "edit" }));
      }
      this.how.textContent = reply.tokens.length ? this.#how() : "";
    }
    this.tools.replaceChildren(...tools);
    if (focused) this.tools.querySelector(`[data-name="${focused}"]`)?.focus();
  }

  #how() {
    const { tokens, seconds, seed, temperature } = this.reply;
    const facts = [t("token_count", { count: number(tokens.length) })];
    if (seconds > 0) facts.push(t("speed", { rate: number(tokens.length / seconds, tokens.length / seconds < 10 ? 1 : 0) }));
    if (temperature > 0) facts.push(t("seed_used", { seed }));
    return facts.join(" · ");
  }

  #toggle() {
    this.state.open = !this.state.open;
    this.#showText();
    this.look.textContent = t(this.state.open ? "close_inside" : "look_inside");
    this.look.setAttribute("aria-expanded", String(this.state.open));
    if (this.state.open) this.acts.shown(this.place);
  }

  #edit() {
    const editor = new Editor(this.reply.text, t("edit_reply", { model: this.reply.model }), t("save"), "", text => {
      if (text !== null && text !== this.reply.text) {
        this.reply.edit(text);
        this.tokens = null;
        this.state.open = false;
        announce(t("edited"));
      }
      editor.place.remove();
      this.text.hidden = false;
      this.acts.changed();
      this.tools.hidden = false;
      this.tools.querySelector('[data-name="edit"]')?.focus();
    });
    this.text.hidden = true;
    this.inside.hidden = true;
    this.tools.hidden = true;
    this.text.after(editor.place);
    editor.focus();
  }
}
