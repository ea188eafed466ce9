// What somebody said, as paragraphs of plain text and blocks of code between ``` fences; nothing else has a meaning.
import { element } from "./dom.js";

const FENCE = /^ {0,3}(`{3,}|~{3,})[^`]*$/;

/** The text in blocks: [{ code: boolean, text: string }]. A fence that is still open goes to the end. */
export function blocksOf(text) {
  const blocks = [];
  let lines = [];
  let fence = "";
  const close = code => {
    const body = lines.join("\n");
    if (code || body.trim()) blocks.push({ code, text: code ? body : body.replace(/^\n+|\s+$/g, "") });
    lines = [];
  };
  for (const line of text.split("\n")) {
    const mark = FENCE.exec(line)?.[1];
    if (!fence && mark) {
      close(false);
      fence = mark;
    } else if (fence && mark?.startsWith(fence) && line.trim() === mark) {
      close(true);
      fence = "";
    } else {
      lines.push(line);
    }
  }
  if (fence || lines.length) close(Boolean(fence));
  return blocks;
}

/** Puts the text into `place`, in place of what was there. */
export function showText(place, text) {
  place.replaceChildren(
    ...blocksOf(text).map(({ code, text: body }) =>
      code ? element("pre", { tabindex: "0", dir: "ltr" }, element("code", {}, body)) : element("p", { dir: "auto" }, body)
    )
  );
}

/** A token with its spaces to be seen. */
export function visible(token) {
  return token.replaceAll(" ", "␣").replaceAll("\n", "↵").replaceAll("\t", "⇥");
}
