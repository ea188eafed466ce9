// The page's words in five languages: chosen by the browser, changeable by the reader, one file a language.
// Elements of index.html name their words: data-text (its text), data-label (aria-label), data-hint (placeholder).

export const LANGUAGES = { en: "English", ms: "Bahasa Melayu", ko: "한국어", uk: "Українська", zh: "中文" };
const CHOICE = "lapis-language";

let code = "en";
let words = {};

/** The language to begin with: what the reader chose here before, else the first of the browser's that there is. */
export function preferred() {
  const wishes = [chosenBefore(), ...navigator.languages].filter(Boolean);
  return wishes.map(wish => wish.toLowerCase().split("-")[0]).find(wish => wish in LANGUAGES) ?? "en";
}

/** Reads a language and puts its words on the page. */
export async function useLanguage(name, remember = false) {
  words = (await import(`./languages/${name}.js`)).default;
  code = name;
  if (remember) keepChoice(name);
  document.documentElement.lang = name === "zh" ? "zh-Hans" : name;
  document.title = t("title");
  for (const place of document.querySelectorAll("[data-text]")) place.textContent = t(place.dataset.text);
  for (const place of document.querySelectorAll("[data-label]")) place.setAttribute("aria-label", t(place.dataset.label));
  for (const place of document.querySelectorAll("[data-hint]")) place.placeholder = t(place.dataset.hint);
}

/** The words of a name, with {values} put in. */
export function t(name, values = {}) {
  return words[name].replace(/\{(\w+)\}/g, (_, value) => values[value]);
}

/** A number as the language writes it. */
export function number(value, digits = 0) {
  return new Intl.NumberFormat(code, { maximumFractionDigits: digits }).format(value);
}

/** Names one after another, as the language lists them. */
export function list(names) {
  return new Intl.ListFormat(code, { type: "conjunction" }).format(names);
}

/** A signed number with two digits. */
export function signed(value) {
  const format = { signDisplay: "always", minimumFractionDigits: 2, maximumFractionDigits: 2 };
  return new Intl.NumberFormat(code, format).format(value);
}

/** A probability in percent: 43 %, 2.1 %, and what is below a tenth of a percent as that. */
export function percent(share) {
  const digits = share >= 0.0995 && share < 0.9995 ? 0 : 1;
  const format = new Intl.NumberFormat(code, { style: "percent", maximumFractionDigits: share > 0.9995 ? 0 : digits });
  if (share < 0.0005) return `< ${format.format(0.001)}`;
  return format.format(share);
}

function chosenBefore() {
  try {
    return localStorage.getItem(CHOICE);
  } catch {
    return null;  // a browser that keeps nothing
  }
}

function keepChoice(name) {
  try {
    localStorage.setItem(CHOICE, name);
  } catch {
    // then it holds until the page is closed
  }
}
