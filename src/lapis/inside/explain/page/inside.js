// Inside a block: what each part adds to a word's logit, and what every state would say.
function drawShares() {
  const box = spot("shares");
  const word = E.words[state.word];
  const [layers, heads] = word.heads.shape;
  const columns = heads + (heads ? 1 : 2);
  const values = Array.from({ length: layers }, (_, layer) => [
    ...(heads ? word.heads.row(layer) : [word.attention.at(layer)]), word.mlp.at(layer)]);
  const high = Math.max(...values.flat().map(Math.abs)) || 1;
  const [left, top] = [64, 22];
  const cell = Math.max(16, Math.min(44, Math.floor((box.clientWidth - left - 4) / layers)));
  const tall = Math.max(13, Math.min(22, cell));
  const names = heads ? [...Array.from({ length: heads }, (_, head) => `head ${head}`), "MLP"] : ["attention", "MLP"];
  const gap = row => (row === names.length - 1 ? 8 : 0);
  const drawing = svg("svg", { width: left + layers * cell + 2, height: top + names.length * tall + 12, role: "img", class: "map", "aria-label": `What each head and MLP adds to the logit of ${shown(word.word)}` });
  const stride = Math.ceil(20 / cell);
  for (let layer = 0; layer < layers; layer += stride) drawing.append(svg("text", { x: left + layer * cell + cell / 2, y: 13, class: "tick middle" }, layer));
  drawing.append(svg("text", { x: 0, y: 13, class: "tick" }, "layer"));
  names.forEach((name, row) => {
    drawing.append(svg("text", { x: 0, y: top + row * tall + gap(row) + tall / 2 + 4, class: "tick" }, name));
    for (let layer = 0; layer < layers; layer += 1) {
      const value = values[layer][row];
      const isHead = heads && row < heads;
      drawing.append(svg("rect", { x: left + layer * cell, y: top + row * tall + gap(row), width: cell - 1, height: tall - 1, fill: rgb(signedShade(value / high)), class: isHead ? "cell" : "", "data-layer": layer, "data-head": isHead ? row : null },
        svg("title", {}, `${isHead ? `head ${layer}.${row}` : `${name} ${layer}`}: ${signed(value)}`)));
    }
  });
  if (heads && E.attention) drawing.append(svg("rect", { x: left + state.layer * cell - 1, y: top + state.head * tall - 1, width: cell + 1, height: tall + 1, class: "row-mark" }));
  drawing.addEventListener("click", event => {
    const { layer, head } = event.target.closest("[data-layer]")?.dataset ?? {};
    if (layer !== undefined) choose(head === undefined ? { layer: Number(layer) } : { layer: Number(layer), head: Number(head) });
  });
  fill(box, drawing);
  const parts = values.flatMap((row, layer) => row.map((value, i) => ({ layer, value, head: heads && i < heads ? i : null, name: i < columns - 1 ? (heads ? `head ${layer}.${i}` : `attention ${layer}`) : `MLP ${layer}` })));
  if (heads) word.attention.values.forEach((value, layer) => { if (value) parts.push({ layer, value, head: null, name: `attention bias ${layer}` }); });
  for (const [name, value] of Object.entries(word.rest)) parts.push({ layer: null, value, head: null, name });
  parts.sort((a, b) => Math.abs(b.value) - Math.abs(a.value));
  const best = parts.slice(0, 8);
  const most = Math.abs(best[0].value) || 1;
  const others = parts.slice(8).reduce((sum, { value }) => sum + value, 0);
  const line = (name, value, part) => element("li", {}, part && part.head !== null && E.attention ? chip(name, () => { choose({ layer: part.layer, head: part.head }); spot("heads").scrollIntoView({ block: "center" }); }, { "aria-label": `Look at ${name}` }) : element("span", { class: "what" }, name),
    bar(Math.abs(value) / most, value < 0 ? "minus" : ""), element("span", { class: "share" }, signed(value)));
  fill(spot("share-list"), element("ol", { class: "bars" }, ...best.map(part => line(part.name, part.value, part)), line(`all ${parts.length - best.length} others`, others, null)),
    element("p", {}, "Together: the logit ", element("strong", {}, number(word.logit)), "."));
}

/** What the cells of the grid are colored by: name -> [share of the strongest color, text] of a state. */
function gridColors() {
  const { shares, entropy, kl, ranks } = E.grid;
  const most = array => Math.max(...array.values) || 1;
  const colors = {
    probability: (p, n) => [shares.at(p, n, 0), percent(shares.at(p, n, 0))],
    entropy: (p, n) => [entropy.at(p, n) / most(entropy), `${number(entropy.at(p, n))} nats`],
    "KL to the last layer": (p, n) => [kl.at(p, n) / most(kl), `${number(kl.at(p, n))} nats`],
  };
  for (const word of Object.keys(ranks)) colors[`rank of ${E.labels[word]}`] = (p, n) => [1 - Math.log(ranks[word][p][n]) / Math.log(E.build.vocab), `rank ${whole(ranks[word][p][n])}`];
  return colors;
}

function drawGrid() {
  const color = gridColors()[spot("grid-color").value];
  const rows = LAYERS + 1;
  const head = element("tr", {}, element("td"), ...E.tokens.map((_, p) => element("th", { scope: "col" }, element("bdi", {}, tokenAt(p)))));
  const lines = Array.from({ length: rows }, (_, n) => element("tr", {}, element("th", { scope: "row" }, n ? n - 1 : "embed"),
    ...E.tokens.map((_, p) => {
      const [share, text] = color(p, n);
      const paint = shade(share);
      const said = named(E.grid.ids[p][n][0]);
      const cell = element("td", { "data-item": true, title: `${tokenAt(p)}, ${stateName(n)}: ${said}, ${text}`, "aria-label": `${said}, ${text}` }, element("bdi", {}, said));
      cell.style.background = rgb(paint);
      cell.style.color = textOn(paint);
      return cell;
    })));
  const box = spot("grid");
  const scroll = box.scrollLeft;
  fill(box, element("table", { "aria-label": "What each layer would say at each token" }, element("thead", {}, head), element("tbody", {}, ...lines)));
  box.scrollLeft = scroll || box.scrollWidth;
  roving(box, 0, i => choose({ place: i % P, layer: Math.max(0, Math.floor(i / P) - 1) }), P);
  markGrid();
}

function markGrid() {
  const cells = spot("grid").querySelectorAll("[data-item]");
  cells.forEach((cell, i) => {
    const here = i % P === state.place && Math.floor(i / P) === state.layer + 1;
    cell.classList.toggle("here", here);
    cell.classList.toggle("column", i % P === state.place);
    cell.tabIndex = here ? 0 : -1;
  });
}

function drawCurves() {
  const { place } = state;
  const at = tokenAt(place);
  const line = read => Array.from({ length: LAYERS }, (_, layer) => [layer, read(layer + 1)]);
  const x = { name: "layer", whole: true, show: value => String(Math.round(value)) };
  const nats = { name: "nats", low: 0, show: plain };
  const common = { x, mark: state.layer, height: 220 };
  chart(spot("entropy"), { ...common, label: `Entropy of each layer at ${at}`, y: nats, series: [{ name: "nats", points: line(n => E.grid.entropy.at(place, n)) }] });
  chart(spot("kl"), { ...common, label: `KL from the last layer at ${at}`, y: nats, series: [{ name: "nats", points: line(n => E.grid.kl.at(place, n)) }] });
  chart(spot("ranks"), { ...common, label: `Ranks of words at ${at}`, y: { name: "rank", log: true, show: whole }, reverse: true,
    series: Object.entries(E.grid.ranks).map(([word, ranks]) => ({ name: shown(word), points: line(n => ranks[place][n]) })) });
}

function startInside() {
  if (E.words.length) {
    const select = spot("choose-word");
    select.append(...E.words.map((word, i) => element("option", { value: i }, E.labels[word.word] ?? shown(word.word))));
    select.addEventListener("change", () => choose({ word: Number(select.value) }));
    watch(["word", "layer", "head"], drawShares);
  }
  const colors = spot("grid-color");
  colors.append(...Object.keys(gridColors()).map(name => element("option", { value: name }, name)));
  colors.addEventListener("change", drawGrid);
  watch([], drawGrid);
  watch(["place", "layer"], () => { markGrid(); drawCurves(); });
}
