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

/** Control characters as pictures of themselves: a token that is one must not be an empty place. */
export function pictured(text) {
  return text
    .replace(/[\x00-\x08\x0b-\x1f]/g, control => String.fromCodePoint(0x2400 + control.codePointAt(0)))
    .replace(/[\x7f-\x9f]/g, "\ufffd");
}

/** A text with its spaces to be seen; what else nobody sees (spaces of other widths, joiners) stands as its number. */
export function visible(text) {
  const shown = pictured(text.replaceAll(" ", "␣").replaceAll("\n", "↵").replaceAll("\t", "⇥"));
  return shown.replace(/[\p{Z}\p{Cf}]/gu, hidden => {
    return `<U+${hidden.codePointAt(0).toString(16).toUpperCase().padStart(4, "0")}>`;
  });
}

/** A token of the server by itself: bytes of half a character as such, a row of the head without a text by its number. */
export function tokenName({ token, bytes, id }) {
  if (token === "") return `<row ${id ?? "?"}>`;
  if (!token.includes("\ufffd") || !bytes?.length) return visible(token);
  return bytes.map(byte => byte < 0x80 ? visible(String.fromCharCode(byte)) : `\\x${byte.toString(16)}`).join("");
}
