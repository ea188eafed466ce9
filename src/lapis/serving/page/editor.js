// A text being edited in its place, with save and cancel; Ctrl + Enter saves, Escape cancels.
import { button, element, freshId } from "./dom.js";
import { t } from "./language.js";

export class Editor {
  /** done(text) is called once: with the new text, or with null where nothing is to change. */
  constructor(text, label, save, note, done) {
    const id = freshId("edit");
    this.area = element("textarea", { id, rows: String(Math.min(16, text.split("\n").length + 1)), dir: "auto" });
    this.area.value = text;
    const finish = () => { if (this.area.value.trim()) done(this.area.value); };
    this.place = element("form", {
      class: "editor",
      submit: event => { event.preventDefault(); finish(); },
      keydown: event => {
        if (event.isComposing) return;
        if (event.key === "Escape") { event.stopPropagation(); done(null); }
        if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) finish();
      },
    },
    element("label", { for: id, class: "hidden" }, label), this.area,
    note ? element("p", { class: "note" }, note) : null,
    element("p", { class: "tools" },
      element("button", { type: "submit", class: "plain" }, save), button(t("cancel"), () => done(null), { class: "quiet" })));
  }

  focus() {
    this.area.focus();
    this.area.setSelectionRange(this.area.value.length, this.area.value.length);
  }
}
