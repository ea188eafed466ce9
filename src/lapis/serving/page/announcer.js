// What a screen reader is told: one sentence per event, and a reply once, as a whole, when it is there.
// A reply that grows is outside of any live region, so that nobody hears every token on its own.

const place = document.getElementById("announcer");

/** Says a sentence politely, after what is being read. */
export function announce(text) {
  const line = document.createElement("p");
  line.textContent = text;
  place.append(line);
  while (place.childElementCount > 4) place.firstElementChild.remove();
}
