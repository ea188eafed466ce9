// Elements out of names and text. Text only ever becomes text: nothing here, or anywhere on the page, parses HTML.

/**
 * Makes an element.
 * @param {string} tag
 * @param {Object} attributes name -> value; true is an empty attribute, false and null leave it out, a function listens
 * @param {...(Node|string|null)} children strings become text
 */
export function element(tag, attributes = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (typeof value === "function") made.addEventListener(name, value);
    else if (value === true) made.setAttribute(name, "");
    else if (value !== false && value !== null && value !== undefined) made.setAttribute(name, value);
  }
  made.append(...children.filter(child => child !== null && child !== undefined));
  return made;
}

/** A button that does not send a form. */
export function button(text, press, attributes = {}) {
  return element("button", { type: "button", click: press, ...attributes }, text);
}

let made = 0;

/** An id that no other element has, for labels and what they name. */
export function freshId(name) {
  made += 1;
  return `${name}-${made}`;
}
