// Choosing the next token: temperature, then top-k, top-p and min-p, by the rules of lapis.Sampling.
//
// All filters keep a beginning of the ordered logits, so what is chosen is a number: how many tokens are left.

/** How many tokens are left, and the probability of each. logits: largest first. Temperature 0 takes the first. */
function keep(logits, { temperature, topK, topP, minP }) {
  if (temperature === 0) return { count: 1, shares: [1] };
  const size = logits.length;
  const scaled = Float32Array.from(logits, logit => logit / temperature);
  let count = size;
  if (topK) {
    const least = scaled[Math.min(topK, size) - 1];
    count = Math.min(topK, size);
    while (count < size && scaled[count] >= least) count += 1;  // ties with the k-th stay
  }
  const total = until => { let sum = 0; for (let i = 0; i < until; i += 1) sum += Math.exp(scaled[i] - scaled[0]); return sum; };
  if (topP < 1) {
    const whole = total(count);
    let sum = 0;
    for (let i = 0; i < count; i += 1) {
      sum += Math.exp(scaled[i] - scaled[0]) / whole;
      if (sum >= topP) count = i + 1;  // the token that reaches p is still inside
    }
  }
  if (minP) {
    const floor = Math.fround(scaled[0] + Math.log(minP));
    while (count > 1 && scaled[count - 1] < floor) count -= 1;
  }
  const whole = total(count);
  return { count, shares: Array.from({ length: Math.min(count, E.ending.ids.length) }, (_, i) => Math.exp(scaled[i] - scaled[0]) / whole) };
}

const SHOWN = 20;  // tokens with a bar

function drawSampling() {
  const logits = E.ending.logits.values;
  const read = name => Number(spot(name).value);
  const settings = { temperature: read("temperature"), topK: read("top-k"), topP: read("top-p"), minP: read("min-p") };
  spot("temperature-out").textContent = settings.temperature ? settings.temperature.toFixed(2) : "0, the likeliest token";
  spot("top-k-out").textContent = settings.topK || "off";
  spot("top-p-out").textContent = settings.topP < 1 ? settings.topP.toFixed(2) : "off";
  spot("min-p-out").textContent = settings.minP ? settings.minP.toFixed(2) : "off";
  const { count, shares } = keep(logits, settings);
  let whole_ = 0;
  for (const logit of logits) whole_ += Math.exp(logit - logits[0]);
  const before = i => Math.exp(logits[i] - logits[0]) / whole_;
  let held = 0;
  for (let i = 0; i < count; i += 1) held += before(i);
  const place = spot("chosen");
  place.dataset.count = count;
  fill(place, element("ol", { class: "bars both" }, ...E.ending.ids.slice(0, SHOWN).map((id, i) => {
    const now = i < count ? shares[i] : 0;
    const both = element("span", { class: "pair", "aria-hidden": "true" }, bar(before(i), "before"), bar(now));
    return element("li", { class: i < count ? null : "out", "data-id": id }, element("bdi", { class: "what" }, named(id)), both,
      element("span", { class: "share" }, i < count ? percent(now) : element("span", {}, "–", element("span", { class: "hidden" }, " left out"))));
  })));
  spot("chosen-text").textContent = `${whole(count)} of ${whole(logits.length)} tokens are left. They held ${percent(held)} of the model's probability`
    + (count > SHOWN ? `; the first ${SHOWN} are drawn.` : ".");
}

function startSampling() {
  for (const name of ["temperature", "top-k", "top-p", "min-p"]) spot(name).addEventListener("input", drawSampling);
  spot("sampling-reset").addEventListener("click", () => {
    for (const [name, value] of [["temperature", 1], ["top-k", 0], ["top-p", 1], ["min-p", 0]]) spot(name).value = value;
    drawSampling();
  });
  watch([], drawSampling);
}
