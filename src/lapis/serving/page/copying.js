// Text to the clipboard and to a file.
import { announce } from "./announcer.js";
import { element } from "./dom.js";
import { t } from "./language.js";

/** Copies a text, also where the page was opened over plain http from another machine, which has no clipboard. */
export async function copyText(text) {
  try {
    await navigator.clipboard.writeText(text);
  } catch {
    const before = document.activeElement;
    const area = element("textarea", { class: "hidden", "aria-hidden": "true" });
    area.value = text;
    document.body.append(area);
    area.select();
    document.execCommand("copy");
    area.remove();
    before?.focus();
  }
  announce(t("copied"));
}

/** Hands a text to the browser as a file to be saved. */
export function saveFile(name, text) {
  const address = URL.createObjectURL(new Blob([text], { type: "application/jsonl" }));
  element("a", { href: address, download: name }).click();
  setTimeout(() => URL.revokeObjectURL(address), 10_000);
}
