// The way of a token: the text as a row of tokens to choose from, and the river of the chosen one.
function drawTokens() {
  const strip = spot("tokens");
  const items = E.tokens.map((token, place) => element("span", {
    role: "option", "data-item": true, "aria-selected": "false", class: token.special ? "token special" : "token",
    "aria-label": `${tokenAt(place)}, token ${token.place + 1} of ${E.total}`,
  }, element("bdi", {}, tokenAt(place))));
  strip.replaceChildren(...items);
  const mark = roving(strip, state.place, place => choose({ place }));
  const show = () => {
    mark(state.place);
    const chosen = items[state.place];
    strip.scrollLeft = chosen.offsetLeft - strip.offsetLeft - (strip.clientWidth - chosen.offsetWidth) / 2;
    const token = E.tokens[state.place];
    spot("chosen-token").textContent = `token ${whole(token.place + 1)} of ${whole(E.total)}`;
  };
  watch(["place"], show);
}

function step(title, ...children) {
  return element("li", {}, element("h4", {}, title), ...children);
}

function positionText() {
  const { positions } = E.build;
  if (positions === "learned") return `A vector of length ${number(E.stream.positions.at(state.place))} for the place is added to it.`;
  if (positions === "rotary") return "Nothing is added for the place: each layer turns queries and keys by an angle that grows with it.";
  if (positions === "none") return "This model adds nothing for the place.";
  return "How this model marks places is not known here.";
}

function drawWay() {
  const { place } = state;
  const token = E.tokens[place];
  const start = E.stream.start.row(place);
  const high = Math.max(...start.map(Math.abs)) || 1;
  const strip = heat(1, start.length, (_, j) => signedShade(start[j] / high), `The first ${start.length} numbers of the vector: ${start.slice(0, 4).map(number).join(", ")} …`);
  strip.classList.add("strip");
  fill(spot("way-in"),
    step("Text to token", element("p", {}, chip(tokenAt(place)), ` ${token.special ? "is a special token, which text cannot spell" : "is one piece of the vocabulary"}.`)),
    step("Token to id", element("p", { class: "big" }, whole(token.id)), element("p", {}, `of ${whole(E.build.vocab)} ids`)),
    step("Id to vector", strip, element("p", {}, `Row ${whole(token.id)} of the embedding: ${whole(E.build.dim)} numbers, of length ${number(E.stream.states.at(place, 0))}; the first ${start.length} are drawn.`)),
    step("Position", element("p", {}, positionText())));
  const last = E.grid.shares.shape[1] - 1;
  const ids = E.grid.ids[place][last];
  const actual = E.ending.actual[place];
  const bars = element("ol", { class: "bars" }, ...ids.map((id, k) => {
    const share = E.grid.shares.at(place, last, k);
    return element("li", {}, element("bdi", { class: "what" }, named(id)), bar(share), element("span", { class: "share" }, percent(share)));
  }));
  fill(spot("way-out"),
    step("Vector to logits", element("p", {}, `The last state is normed and multiplied with the head: ${whole(E.build.vocab)} logits, one for each id${E.build.tied ? ". The head is the embedding itself." : "."}`)),
    step("Logits to probabilities", bars),
    step("The next token", element("p", { class: "big" }, chip(named(ids[0]))),
      element("p", {}, actual ? "In the text stands " : "The text ends here; this is what the model says.", actual ? chip(tokenAt(place + 1)) : null,
        actual ? `, rank ${whole(actual[0])} with ${percent(actual[1])}.` : null),
      actual ? element("p", {}, element("button", { type: "button", class: "plain", click: () => choose({ place: place + 1 }) }, "Go on to that token")) : null));
  drawRiver();
}

/** Which places a layer's heads take from at a place, the most first: [[place, share]]. */
function sourcesOf(layer, place) {
  if (!E.stream.taken || place < SKIPPED) return [];
  const t = place - SKIPPED;
  return Array.from({ length: t + 1 }, (_, s) => [SKIPPED + s, E.stream.taken.at(layer, pair(t, s))]).sort((a, b) => b[1] - a[1]);
}

function drawRiver() {
  const { place } = state;
  const box = spot("river");
  const flat = box.clientWidth >= 640;
  const room = Math.max(300, box.clientWidth);
  const length = flat ? Math.max(room - 2, LAYERS * 9 + 90) : LAYERS * 24 + 70;
  const breadth = flat ? 330 : room;
  const [from, to] = flat ? [46, length - 24] : [30, length - 30];
  const middle = breadth / 2;
  const step = (to - from) / LAYERS;
  const { states, attention, mlp } = E.stream;
  const sizes = Array.from({ length: LAYERS + 1 }, (_, n) => states.at(place, n));
  const added = [attention, mlp].map(part => part ? part.row(place) : null);
  const most = Math.sqrt(Math.max(...sizes));
  const mostAdded = Math.sqrt(Math.max(1e-9, ...added.flatMap(part => part ?? [])));
  const unit = Math.min((flat ? 62 : breadth * .2) / most, .46 * step / mostAdded, (breadth * .16) / mostAdded);
  const half = sizes.map(size => unit * Math.sqrt(size));
  const at = n => from + n * step;
  const point = (along, across) => (flat ? `${along.toFixed(1)} ${across.toFixed(1)}` : `${across.toFixed(1)} ${along.toFixed(1)}`);
  const edge = (order, side) => order.map((n, i) => {
    const here = point(at(n), middle + side * half[n]);
    if (!i) return here;
    const before = order[i - 1];
    const between = (at(n) + at(before)) / 2;
    return `C ${point(between, middle + side * half[before])}, ${point(between, middle + side * half[n])}, ${here}`;
  }).join(" ");
  const all = sizes.map((_, n) => n);
  const drawing = svg("svg", {
    width: flat ? length : breadth, height: flat ? breadth : length, viewBox: flat ? `0 0 ${length} ${breadth}` : `0 0 ${breadth} ${length}`,
    role: "listbox", "aria-label": `The stream of token ${tokenAt(place)} through ${LAYERS} layers`, "aria-orientation": flat ? "horizontal" : "vertical",
  });
  const ribbons = svg("g");
  for (const [part, side, name] of [[added[0], -1, "attention"], [added[1], 1, "mlp"]]) {
    (part ?? []).forEach((size, layer) => {
      const wide = unit * Math.sqrt(size);
      const center = at(layer) + (side < 0 ? .3 : .62) * step;
      const outer = middle + side * (breadth / 2 - (flat ? 34 : 44));
      const inner = middle + side * (half[layer] + (half[layer + 1] - half[layer]) * .5) * .9;
      const bend = (outer + inner) / 2;
      const back = center - .9 * step;
      const way = (shift, order) => order ? `${point(center + shift, inner)} C ${point(center + shift, bend)}, ${point(back + shift, bend)}, ${point(back + shift, outer)}`
        : `${point(back + shift, outer)} C ${point(back + shift, bend)}, ${point(center + shift, bend)}, ${point(center + shift, inner)}`;
      ribbons.append(svg("path", { class: `ribbon ${name}`, d: `M ${way(-wide, false)} L ${way(wide, true)} Z`, "data-layer": layer }));
    });
  }
  drawing.append(ribbons, svg("path", { class: "stream", d: `M ${edge(all, -1)} L ${edge([...all].reverse(), 1)} Z` }));
  const label = (along, across, text, kind) => svg("text", { ...(flat ? { x: along, y: across } : { x: across, y: along }), class: kind }, text);
  const stride = Math.ceil((flat ? 22 : 16) / step);
  const middles = Array.from({ length: LAYERS }, (_, layer) => at(layer + .5));
  for (let layer = 0; layer < LAYERS; layer += stride) drawing.append(flat ? label(middles[layer], breadth - 8, layer, "tick middle") : label(middles[layer] + 4, 14, layer, "tick middle"));
  if (flat) drawing.append(label(4, 16, "attention", "tick attention"), label(4, breadth - 30, "MLP", "tick mlp"), label(4, middle + 4, "stream", "tick"), label(4, breadth - 8, "layer", "tick"));
  else drawing.append(label(14, 34, "attention", "tick attention"), label(14, breadth - 34, "MLP", "tick mlp"), label(14, middle - 18, "stream", "tick"));
  for (let layer = 0; layer < LAYERS; layer += 1) {
    const share = E.grid.shares.at(place, layer + 1, 0);
    const said = `layer ${layer}: stream ${number(sizes[layer + 1])}, would say ${named(E.grid.ids[place][layer + 1][0])} with ${percent(share)}`;
    const area = flat ? { x: at(layer), y: 22, width: step, height: breadth - 44 } : { x: 24, y: at(layer), width: breadth - 26, height: step };
    drawing.append(svg("rect", { ...area, class: "layer", "data-item": true, role: "option", "aria-selected": "false", "aria-label": said, rx: 3 }));
  }
  fill(box, drawing);
  roving(drawing, Math.min(state.layer, LAYERS - 1), layer => choose({ layer }));
  drawLayer();
}

function drawLayer() {
  const { place, layer } = state;
  spot("river").querySelectorAll("rect.layer").forEach((item, i) => {
    item.setAttribute("aria-selected", String(i === layer));
    item.setAttribute("tabindex", i === layer ? "0" : "-1");
  });
  const { states, attention, mlp } = E.stream;
  const sources = sourcesOf(layer, place).filter(([, share]) => share >= .02).slice(0, 5);
  const row = layer + 1;
  const parts = attention ? ` Attention adds a vector of length ${number(attention.at(place, layer))}, the MLP one of ${number(mlp.at(place, layer))}.` : "";
  fill(spot("layer-detail"),
    element("p", {}, element("strong", {}, `Layer ${layer}. `), `The stream is ${number(states.at(place, layer))} long before and ${number(states.at(place, row))} after it.${parts} If the model ended here, it would say `,
      chip(named(E.grid.ids[place][row][0])), ` (${percent(E.grid.shares.at(place, row, 0))}).`),
    sources.length ? element("p", {}, "Its heads take most from ", ...sources.flatMap(([source, share], i) => [i ? ", " : "",
      chip(tokenAt(source), () => choose({ place: source }), { "aria-label": `Follow ${tokenAt(source)}` }), ` ${percent(share)}`]), ".") : null);
}
