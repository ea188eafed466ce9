// Two models on one text: the token and the layer where they part.
const shortName = name => safe(name.split("/").filter(Boolean).at(-1) ?? name);

function drawAgainst() {
  const { kl, grid, parted, distance } = E.against;
  const [mine, theirs] = [shortName(E.model), shortName(E.against.name)];
  const high = Math.max(...kl.values) || 1;
  const rows = E.tokens.map((token, p) => {
    const paint = shade(kl.at(p) / high, "amber");
    const amount = element("td", { class: "number" }, kl.at(p).toFixed(3));
    amount.style.background = rgb(paint);
    amount.style.color = textOn(paint);
    return element("tr", { class: p === state.place ? "mark" : null },
      element("th", { scope: "row" }, chip(tokenAt(p), () => choose({ place: p }), { "aria-label": `Follow ${tokenAt(p)}` })), amount,
      element("td", {}, element("bdi", {}, named(E.grid.ids[p].at(-1)[0]))), element("td", {}, element("bdi", {}, named(grid.ids[p].at(-1)[0], E.against.texts))),
      element("td", {}, parted[p] === null ? "nowhere" : stateName(parted[p])));
  });
  const heads = ["behind", "KL, nats", `${mine} says`, `${theirs} says`, "part at"];
  fill(spot("token-kl"), element("table", { "aria-label": "KL at each token" }, element("thead", {}, element("tr", {}, ...heads.map((text, i) => element("th", { scope: "col", class: i === 1 ? "number" : null }, text)))), element("tbody", {}, ...rows)));
  const { place } = state;
  const layers = Array.from({ length: LAYERS + 1 }, (_, n) => n).filter(n => n < grid.ids[place].length).map(n => {
    const [one, other] = [E.grid.ids[place][n][0], grid.ids[place][n][0]];
    return element("tr", { class: parted[place] === n ? "mark" : null }, element("th", { scope: "row" }, n ? n - 1 : "embed"),
      element("td", { class: "said" }, element("bdi", {}, named(one)), ` ${percent(E.grid.shares.at(place, n, 0))}`),
      element("td", { class: one === other ? "said" : "said differs" }, element("bdi", {}, named(other, E.against.texts)), ` ${percent(grid.shares.at(place, n, 0))}`),
      distance ? element("td", { class: "number" }, number(distance.at(place, n))) : null);
  });
  fill(spot("layer-by-layer"), element("p", {}, "At ", chip(tokenAt(place)), parted[place] === null ? ": both end with the same best token." : `: from ${stateName(parted[place])} on their best tokens differ.`),
    element("div", { class: "wide", tabindex: "0", role: "region", "aria-label": "Both models, layer by layer" }, element("table", { "aria-label": "Both models, layer by layer" }, element("thead", {}, element("tr", {}, ...["layer", mine, theirs, ...(distance ? ["distance"] : [])].map((text, i) => element("th", { scope: "col", class: i === 3 ? "number" : null }, text)))), element("tbody", {}, ...layers))),
    distance ? element("p", { class: "note" }, "Distance: how far apart their states are, as a share of the first one's length.") : null);
}

function drawEnds() {
  const { grid } = E.against;
  const list = (title, of, p, texts) => element("div", {}, element("h4", {}, title), element("ol", { class: "bars" }, ...of.ids[p].at(-1).map((id, k) => {
    const share = of.shares.at(p, of.shares.shape[1] - 1, k);
    return element("li", {}, element("bdi", { class: "what" }, named(id, texts)), bar(share), element("span", { class: "share" }, percent(share)));
  })));
  fill(spot("token-kl"), element("div", { class: "beside" }, list(`${shortName(E.model)} says next`, E.grid, P - 1, E.texts), list(`${shortName(E.against.name)} says next`, grid, grid.ids.length - 1, E.against.texts)));
}
