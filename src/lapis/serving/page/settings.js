// The form beside the conversation: which models answer, and how. Reads it; shows which models the server has.
import { element } from "./dom.js";
import { list, t } from "./language.js";

const first = document.getElementById("first");
const second = document.getElementById("second");
const field = name => document.getElementById(name);

let served = [];  // { name, chats, completes } each

const option = ({ name, chats, completes }) =>
  element("option", { value: name, disabled: !completes }, chats ? name : t(completes ? "completes" : "writes_nothing", { model: name }));

/** Fills the two lists; where exactly two models write, they stand side by side from the start, the one that chats first. */
export function showModels(models) {
  served = models;
  const able = models.filter(model => model.completes).sort((a, b) => b.chats - a.chats).map(model => model.name);
  first.replaceChildren(...models.map(option));
  first.value = able[0] ?? "";
  showSecond(able.length === 2 ? able[1] : "");
}

/** The second list: all models but the first one, or none. */
export function showSecond(choice = second.value) {
  const others = served.filter(model => model.name !== first.value);
  second.replaceChildren(element("option", { value: "" }, t("none")), ...others.map(option));
  second.value = others.some(model => model.name === choice && model.completes) ? choice : "";
  second.closest(".field").hidden = served.length < 2;
  explain();
}

/** Both lists in another language; what is chosen stays. */
export function renameModels() {
  const chosen = first.value;
  first.replaceChildren(...served.map(option));
  first.value = chosen;
  showSecond();
}

/** Whether a model takes turns; one that does not goes on with text. */
export function chats(name) {
  return served.find(model => model.name === name)?.chats !== false;
}

/** Says of the chosen models without a chat template what they do with what is written. */
function explain() {
  const note = field("completes-note");
  const alone = chosenModels().filter(name => !chats(name));
  note.hidden = !alone.length;
  note.textContent = alone.length ? t("completes_note", { models: list(alone) }) : "";
}

/** The models that are to answer, one or two. */
export function chosenModels() {
  return [first.value, second.value].filter(Boolean);
}

/** What the system prompt says, as it stands. */
export function systemPrompt() {
  return field("system").value;
}

/** Temperature, seed and longest reply, or the field that is wrong. A seed that is not given is drawn. */
export function sampling() {
  for (const name of ["temperature", "longest", "seed"]) {
    if (!field(name).checkValidity()) return { wrong: field(name) };
  }
  const seed = field("seed").value;
  return {
    temperature: Number(field("temperature").value),
    longest: Number(field("longest").value),
    seed: seed === "" ? Math.floor(Math.random() * 2 ** 31) : Number(seed),
  };
}

first.addEventListener("change", () => showSecond());
second.addEventListener("change", explain);

// On a wide screen the settings stand open at the side; on a narrow one they are folded.
const fold = field("fold");
const wide = matchMedia("(min-width: 56.01rem)");
const follow = () => { fold.open = wide.matches; };
wide.addEventListener("change", follow);
follow();
