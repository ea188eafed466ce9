// Attention: all heads as thumbnails, the map of one, and its three readings on the model's own numbers.
const windowOf = layer => E.build.windows[layer] ?? null;
const shareOf = () => Math.max(1, Math.round((E.build.heads ?? 1) / (E.build.kv_heads ?? E.build.heads ?? 1)));
let thumbs = null;

function drawHeads() {
  const [layers, heads] = E.attention.weights.shape;
  const box = spot("heads");
  const share = shareOf();
  const [left, top, gap] = [64, 20, share > 1 && heads > share ? 5 : 0];
  const size = Math.max(22, Math.min(58, Math.floor((box.clientWidth - left) / layers)));
  const y = head => top + head * size + Math.floor(head / share) * gap;
  const ratio = Math.min(2, devicePixelRatio || 1);
  const [width, height] = [left + layers * size, y(heads - 1) + size + 2];
  const canvas = element("canvas", { width: width * ratio, height: height * ratio, "aria-hidden": "true" });
  canvas.style.width = `${width}px`;
  canvas.style.height = `${height}px`;
  const pen = canvas.getContext("2d");
  pen.scale(ratio, ratio);
  const small = element("canvas", { width: A, height: A });
  const brush = small.getContext("2d");
  const inner = size - 3;
  for (let layer = 0; layer < layers; layer += 1) {
    for (let head = 0; head < heads; head += 1) {
      const picture = brush.createImageData(A, A);
      for (let t = 0; t < A; t += 1) for (let s = 0; s < A; s += 1) {
        const weight = s > t ? NaN : weightAt(layer, head, t, s);
        picture.data.set([...shade(Number.isNaN(weight) ? NaN : Math.sqrt(weight)), Number.isNaN(weight) ? 0 : 255], 4 * (t * A + s));
      }
      brush.putImageData(picture, 0, 0);
      pen.imageSmoothingEnabled = A > inner;
      pen.drawImage(small, left + layer * size, y(head), inner, inner);
    }
  }
  pen.font = `11px ${css("--sans")}`;
  pen.fillStyle = css("--quiet");
  const stride = Math.ceil(20 / size);
  pen.textAlign = "center";
  for (let layer = 0; layer < layers; layer += stride) pen.fillText(String(layer), left + layer * size + inner / 2, 12);
  pen.textAlign = "left";
  pen.fillText("layer", 0, 12);
  pen.strokeStyle = css("--quiet");
  for (let head = 0; head < heads; head += 1) pen.fillText(`head ${head}`, 0, y(head) + inner / 2 + 4);
  if (share > 1) for (let group = 0; group < heads / share; group += 1) {
    const [first, last] = [y(group * share) + 1, y((group + 1) * share - 1) + inner - 1];
    pen.beginPath();
    pen.moveTo(left - 6, first);
    pen.lineTo(left - 10, first);
    pen.lineTo(left - 10, last);
    pen.lineTo(left - 6, last);
    pen.stroke();
  }
  thumbs = { left, size, y, inner, mark: element("span", { class: "here", "aria-hidden": "true" }) };
  canvas.addEventListener("click", event => {
    const layer = Math.floor((event.offsetX - left) / size);
    const head = Array.from({ length: heads }, (_, i) => i).findLast(i => y(i) <= event.offsetY);
    if (layer >= 0 && layer < layers && head !== undefined) choose({ layer, head });
  });
  box.replaceChildren(element("div", { class: "sheet" }, canvas, thumbs.mark));
}

function drawHeadChoice() {
  const { layer, head } = state;
  for (const [name, value] of [["choose-layer", layer], ["choose-head", head]]) spot(name).value = String(value);
  const { left, size, y, inner, mark } = thumbs;
  Object.assign(mark.style, { left: `${left + layer * size - 2}px`, top: `${y(head) - 2}px`, width: `${inner + 4}px`, height: `${inner + 4}px` });
  const share = shareOf();
  const range = windowOf(layer);
  const group = Math.floor(head / share);
  const peers = Array.from({ length: share }, (_, i) => group * share + i).filter(other => other !== head);
  const keys = share > 1 ? ` It shares the keys and values of group ${group} with head${peers.length > 1 ? "s" : ""} ${peers.join(", ")}: only their queries differ.` : "";
  const sees = !E.build.windows.length ? "" : range ? ` A window lets each token of this layer see ${whole(range)} tokens, itself included.` : " Each token sees itself and all before it.";
  spot("head-text").textContent = `Head ${layer}.${head}.${keys}${sees}`;
  spot("detailed").replaceChildren(...E.attention.heads.flatMap((one, i) => [i ? " " : "",
    element("button", { type: "button", class: "plain", "aria-pressed": String(one.layer === layer && one.head === head), click: () => choose({ layer: one.layer, head: one.head }) }, `${one.layer}.${one.head}`)]));
}

function drawMap() {
  const { layer, head, place } = state;
  const box = spot("map");
  const cell = Math.max(11, Math.min(22, Math.floor((Math.min(box.clientWidth, 640) - 96) / A)));
  const [left, top] = [92, A > 1 ? 70 : 40];
  const clip = text => (text.length > 11 ? `${text.slice(0, 10)}…` : text);
  const extra = SKIPPED || E.total > P ? 1 : 0;  // a column for all tokens before those that are shown
  const size = (A + extra) * cell;
  const drawing = svg("svg", { width: left + size + 8, height: top + A * cell + 4, class: "map", role: "img", "aria-label": `Where head ${layer}.${head} looks: a row for each of ${A} tokens, a column for each token that it may look at` });
  drawing.append(svg("defs", {}, svg("pattern", { id: "hatch", width: 5, height: 5, patternUnits: "userSpaceOnUse", patternTransform: "rotate(45)" }, svg("line", { x1: 0, x2: 0, y1: 0, y2: 5, class: "hatch" }))));
  drawing.append(svg("rect", { x: left, y: top, width: size, height: A * cell, fill: "url(#hatch)" }));
  const now = place - SKIPPED;
  for (let t = 0; t < A; t += 1) {
    const kind = t === now ? "tick end now" : "tick end";
    drawing.append(svg("text", { x: left - 6, y: top + t * cell + cell / 2 + 4, class: kind }, clip(tokenAt(SKIPPED + t))));
    drawing.append(svg("text", { transform: `translate(${left + (t + extra) * cell + cell / 2 + 4} ${top - 6}) rotate(-60)`, class: t === now ? "tick now" : "tick" }, clip(tokenAt(SKIPPED + t))));
    let before = 1;
    for (let s = 0; s <= t; s += 1) {
      const weight = weightAt(layer, head, t, s);
      if (Number.isNaN(weight)) continue;
      before -= weight;
      drawing.append(svg("rect", { x: left + (s + extra) * cell, y: top + t * cell, width: cell - .6, height: cell - .6, fill: rgb(shade(Math.sqrt(weight))), class: "cell", "data-row": t },
        svg("title", {}, `${tokenAt(SKIPPED + t)} looks at ${tokenAt(SKIPPED + s)}: ${percent(weight)}`)));
    }
    if (extra) drawing.append(svg("rect", { x: left, y: top + t * cell, width: cell - .6, height: cell - .6, fill: rgb(shade(Math.sqrt(Math.max(0, before)))), class: "cell", "data-row": t },
      svg("title", {}, `${tokenAt(SKIPPED + t)} looks at tokens before those shown: ${percent(Math.max(0, before))}`)));
  }
  if (extra) drawing.append(svg("text", { transform: `translate(${left + cell / 2 + 4} ${top - 6}) rotate(-60)`, class: "tick" }, "before"));
  if (now >= 0) drawing.append(svg("rect", { x: left - 1, y: top + now * cell - 1, width: size + 1, height: cell + 1, class: "row-mark" }));
  drawing.addEventListener("click", event => {
    const row = event.target.closest("[data-row]")?.dataset.row;
    if (row !== undefined) choose({ place: SKIPPED + Number(row) });
  });
  fill(box, drawing);
}

/** What the chosen token looks at: [{ s, weight, score, moved }], the largest weight first. */
function lookups() {
  const t = state.place - SKIPPED;
  if (t < 0) return [];
  const detail = detailOf(state.layer, state.head);
  return Array.from({ length: t + 1 }, (_, s) => ({
    s, weight: weightAt(state.layer, state.head, t, s), score: detail?.scores.at(t, s), moved: detail?.moved.at(t, s),
  })).filter(one => !Number.isNaN(one.weight)).sort((a, b) => b.weight - a.weight);
}

function lacking() {
  return element("p", { class: "note" }, state.place < SKIPPED ? "This token is before those that the maps have room for; choose a later one."
    : "The vectors of this head are not kept in the page; those of the heads named above are.");
}

function drawSum() {
  const rows = lookups();
  const detail = detailOf(state.layer, state.head);
  if (!rows.length) return fill(spot("sum"), lacking());
  const top = rows.slice(0, 6);
  const others = rows.slice(6).reduce((sum, row) => sum + row.weight, 0);
  const before = 1 - rows.reduce((sum, row) => sum + row.weight, 0);
  const width = detail ? detail.values.shape[1] : 0;
  const t = state.place - SKIPPED;
  const mixed = detail ? Array.from({ length: width }, (_, e) => rows.reduce((sum, { s, weight }) => sum + weight * detail.values.at(s, e), 0)) : [];
  const high = detail ? Math.max(...mixed.map(Math.abs), ...top.flatMap(({ s }) => detail.values.row(s).map(Math.abs))) || 1 : 1;
  const strip = (at, label) => { const made = heat(1, width, (_, e) => signedShade(at(e) / high), label); made.classList.add("strip"); return made; };
  const length = values => Math.sqrt(values.reduce((sum, value) => sum + value * value, 0));
  const line = (sign, weight, name, drawn, note) => element("li", {}, element("span", { class: "sign", "aria-hidden": "true" }, sign),
    element("span", { class: "share" }, weight === null ? "" : percent(weight)), name, drawn ?? element("span"), element("span", { class: "size" }, note));
  fill(spot("sum"), element("ol", { class: "sum" },
    ...top.map(({ s, weight }, i) => line(i ? "+" : "", weight, chip(tokenAt(SKIPPED + s), () => choose({ place: SKIPPED + s })),
      detail ? strip(e => detail.values.at(s, e), `its value, of length ${number(length(detail.values.row(s)))}`) : bar(weight), detail ? `× ${number(length(detail.values.row(s)))}` : "")),
    others > 0 ? line("+", others, element("span", {}, `${rows.length - 6} other tokens`), null, "") : null,
    before > 5e-4 && (SKIPPED || E.total > P) ? line("+", before, element("span", {}, "tokens before those shown"), null, "") : null,
    detail ? line("=", null, element("strong", {}, "what the head reads"), strip(e => mixed[e], "the sum"), number(length(mixed))) : null),
  detail ? null : lacking(),
  detail ? element("p", { class: "note" }, `A value has ${width} numbers; behind × stands its length. Strips that cancel add up to a short vector: the sum is ${number(length(mixed))} long.${before > 5e-4 && SKIPPED + (E.total - P) ? " Values before the shown tokens are not in the strip." : ""}`) : null);
}

function matrix(name, picture, rows, columns, rank, text = "") {
  return element("li", {}, element("h5", {}, name), picture,
    element("p", {}, `${rows} × ${columns}`, rank === null ? "" : element("span", { class: "rank" }, `rank ${rank}`)), text ? element("p", { class: "note" }, text) : null);
}

function drawProducts() {
  const detail = detailOf(state.layer, state.head);
  const { layer, head } = state;
  if (!detail) return fill(spot("products"), lacking());
  const { ranks, queries, keys, values, scores, states, gram, cubic } = detail;
  const [width, dim] = [queries.shape[1], E.build.dim];
  const drawn = (array, label) => signedHeat(array.shape[0], array.shape[1], (i, j) => array.at(i, j), label);
  const weight = (t, s) => (s > t ? NaN : weightAt(layer, head, t, s));
  const mixed = (t, e) => { let sum = 0; for (let s = 0; s <= t; s += 1) sum += (weight(t, s) || 0) * values.at(s, e); return sum; };
  const columns = states.shape[1];
  const part = columns < dim ? `the first ${columns} of ${whole(dim)} columns are drawn` : "";
  fill(spot("products"),
    element("ol", { class: "matrices" },
      matrix("X, the states", drawn(states, "states"), A, dim, ranks.states, part),
      matrix("Q = norm(X) W_q", drawn(queries, "queries"), A, width, ranks.queries),
      matrix("K = norm(X) W_k", drawn(keys, "keys"), A, width, ranks.keys),
      matrix(`Q Kᵀ × ${detail.scale.toPrecision(3)}`, drawn(scores, "scores"), A, A, ranks.scores, `at most ${Math.min(A, width)}`),
      matrix("softmax, masked", heat(A, A, (t, s) => shade(Math.sqrt(weight(t, s))), "weights"), A, A, ranks.weights),
      matrix("V = norm(X) W_v", drawn(values, "values"), A, width, ranks.values),
      matrix("weights × V", signedHeat(A, width, mixed, "what the head reads"), A, width, ranks.mixed)),
    element("p", {}, `Rows are the ${A} tokens that are shown. Scores come from vectors of ${width} numbers, so their rank is at most ${width}; the softmax bends them, and its matrix has rank ${ranks.weights} here.`),
    element("h4", {}, "Why f(X) = X Xᵀ X keeps the shape"),
    element("ol", { class: "matrices" },
      matrix("X", drawn(states, "states"), A, dim, ranks.states),
      matrix("X Xᵀ: each token with each", drawn(gram, "products of states"), A, A, ranks.gram),
      matrix("X Xᵀ X: mixtures of rows", drawn(cubic, "mixed states"), A, dim, ranks.cubic)),
    element("p", {}, cubicText(ranks)));
}

function cubicText(ranks) {
  const [m, n] = [A, E.build.dim];
  const least = Math.min(m, n);
  const whole = `X is ${m} × ${n}; X Xᵀ is ${m} × ${m}, one number for each pair of tokens; times X it is ${m} × ${n} again. Attention is this product with learned maps between, and a softmax around the middle. `
    + `With X = U Σ Vᵀ, X Xᵀ X = U Σ³ Vᵀ: a direction is lost only where its singular value is 0, so the rank is that of X, and min(${m}, ${n}) = ${least} where no row is a mixture of others. `;
  if (ranks.cubic === ranks.states && ranks.states === least) return `${whole}Measured: ${ranks.states}, ${ranks.gram} and ${ranks.cubic}.`;
  if (ranks.states < least) return `${whole}Measured: ${ranks.states}, ${ranks.gram} and ${ranks.cubic}. It is below ${least}, since some rows of X are the same or mixtures of others, as those of a token that stands twice.`;
  return `${whole}Measured: ${ranks.states}, ${ranks.gram} and ${ranks.cubic}. Cubes of small singular values beside those of large ones fall below what float64 tells from 0; X itself has rank ${ranks.states}.`;
}

function drawLookup() {
  const rows = lookups();
  const detail = detailOf(state.layer, state.head);
  if (!rows.length) return fill(spot("lookup"), lacking());
  const best = rows.slice(0, 10);
  const head = element("tr", {}, ...["key", "place", ...(detail ? ["score"] : []), "weight", "", ...(detail ? ["moves the stream by"] : [])]
    .map((name, i) => element("th", { scope: "col", class: i && name ? "number" : null }, name || element("span", { class: "hidden" }, "bar"))));
  const body = best.map(({ s, weight, score, moved }) => element("tr", {},
    element("th", { scope: "row" }, chip(tokenAt(SKIPPED + s), () => choose({ place: SKIPPED + s }), { "aria-label": `Follow ${tokenAt(SKIPPED + s)}` })),
    element("td", { class: "number" }, whole(E.tokens[SKIPPED + s].place + 1)), detail ? element("td", { class: "number" }, number(score)) : null,
    element("td", { class: "number" }, percent(weight)), element("td", { class: "bars" }, bar(weight)), detail ? element("td", { class: "number" }, number(moved)) : null));
  fill(spot("lookup"),
    element("p", {}, "Query: ", chip(tokenAt(state.place)), `. Its best keys among ${rows.length}:`),
    element("div", { class: "wide" }, element("table", { "aria-label": `What ${tokenAt(state.place)} looks up in head ${state.layer}.${state.head}` }, element("thead", {}, head), element("tbody", {}, ...body))),
    detail ? null : lacking());
}

function startAttention() {
  if (!E.attention) return;
  const [layers, heads] = E.attention.weights.shape;
  for (const [name, count, key] of [["choose-layer", layers, "layer"], ["choose-head", heads, "head"]]) {
    const select = spot(name);
    select.append(...Array.from({ length: count }, (_, i) => element("option", { value: i }, i)));
    select.addEventListener("change", () => choose({ [key]: Number(select.value) }));
  }
  watch([], drawHeads);
  watch(["layer", "head"], drawHeadChoice);
  watch(["layer", "head", "place"], () => { drawMap(); drawSum(); drawLookup(); });
  watch(["layer", "head"], drawProducts);
}
