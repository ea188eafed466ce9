// The form beside the conversation: which models answer, and how. Reads it; shows which models the server has.
import { element } from "./dom.js";
import { t } from "./language.js";

const first = document.getElementById("first");
const second = document.getElementById("second");
const field = name => document.getElementById(name);

let served = [];  // { name, chats } each

const option = ({ name, chats }) =>
  element("option", { value: name, disabled: !chats }, chats ? name : t("no_template", { model: name }));

/** Fills the two lists; where exactly two models can chat, they stand side by side from the start. */
export function showModels(models) {
  served = models;
  const able = models.filter(model => model.chats).map(model => model.name);
  first.replaceChildren(...models.map(option));
  first.value = able[0] ?? "";
  showSecond(able.length === 2 ? able[1] : "");
}

/** The second list: all models but the first one, or none. */
export function showSecond(choice = second.value) {
  const others = served.filter(model => model.name !== first.value);
  second.replaceChildren(element("option", { value: "" }, t("none")), ...others.map(option));
  second.value = others.some(model => model.name === choice && model.chats) ? choice : "";
  second.closest(".field").hidden = served.length < 2;
}

/** Both lists in another language; what is chosen stays. */
export function renameModels() {
  const chosen = first.value;
  first.replaceChildren(...served.map(option));
  first.value = chosen;
  showSecond();
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

// On a wide screen the settings stand open at the side; on a narrow one they are folded.
const fold = field("fold");
const wide = matchMedia("(min-width: 56.01rem)");
const follow = () => { fold.open = wide.matches; };
wide.addEventListener("change", follow);
follow();
