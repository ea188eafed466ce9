// Text whose contrast with what is behind it is below WCAG's 4.5, controls without a name, and the like.
() => {
  const paint = document.createElement("canvas").getContext("2d", { willReadFrequently: true });
  const rgba = color => {
    paint.clearRect(0, 0, 1, 1); paint.fillStyle = color; paint.fillRect(0, 0, 1, 1);
    return [...paint.getImageData(0, 0, 1, 1).data];
  };
  const light = ([r, g, b]) => {
    const [x, y, z] = [r, g, b].map(v => (v /= 255) <= .04045 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4);
    return .2126 * x + .7152 * y + .0722 * z;
  };
  const behind = element => {
    for (let at = element; at; at = at.parentElement) {
      const color = rgba(getComputedStyle(at).backgroundColor);
      if (color[3] > 250) return color;
    }
    return [255, 255, 255, 255];
  };
  const faults = [];
  for (const element of document.body.querySelectorAll("*")) {
    const own = [...element.childNodes].some(node => node.nodeType === 3 && node.textContent.trim());
    if (!own || !element.checkVisibility() || element.closest(".hidden, .skip, option, :disabled")) continue;
    const [a, b] = [light(rgba(getComputedStyle(element).color)), light(behind(element))].sort((x, y) => y - x);
    const ratio = (a + .05) / (b + .05);
    if (ratio < 4.5) faults.push(`contrast ${ratio.toFixed(2)}: ${element.className} ${element.textContent.slice(0, 40)}`);
  }
  for (const control of document.querySelectorAll("button, input, select, textarea, [role=option], [role=listbox]")) {
    const label = control.getAttribute("aria-label") ?? control.labels?.[0]?.textContent ?? control.textContent;
    if (!label.trim()) faults.push(`no name: ${control.outerHTML.slice(0, 90)}`);
  }
  const ids = [...document.querySelectorAll("[id]")].map(element => element.id);
  faults.push(...ids.filter((id, i) => ids.indexOf(id) !== i).map(id => `id twice: ${id}`));
  for (const name of ["aria-labelledby", "aria-describedby", "aria-controls"]) {
    for (const element of document.querySelectorAll(`[${name}]`)) {
      if (!document.getElementById(element.getAttribute(name))) faults.push(`${name} leads nowhere: ${element.outerHTML.slice(0, 90)}`);
    }
  }
  const levels = [...document.querySelectorAll("h1, h2, h3")].filter(h => h.checkVisibility()).map(h => Number(h.tagName[1]));
  levels.forEach((level, i) => { if (i && level > levels[i - 1] + 1) faults.push(`a heading of level ${level} after ${levels[i - 1]}`); });
  for (const wide of document.querySelectorAll("html, main, article, #composer, .lens")) {
    if (wide.scrollWidth > wide.clientWidth + 1) faults.push(`scrolls sideways: ${wide.tagName} ${wide.className}`);
  }
  return faults;
}
