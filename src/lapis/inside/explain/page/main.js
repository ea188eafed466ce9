// Starts the views, and draws them again when the width or the colors change.
function start() {
  const width = () => spot("river").clientWidth;
  let drawn = width();
  readShades();
  drawTokens();
  watch(["place"], drawWay);
  watch(["layer"], drawLayer);
  startAttention();
  startInside();
  startSampling();
  watch([], drawCost);
  if (E.against) watch(E.against.same ? ["place"] : [], E.against.same ? drawAgainst : drawEnds);
  redraw(["look"]);
  document.documentElement.dataset.ready = "yes";
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => { readShades(); redraw(["look"]); });
  new ResizeObserver(() => {
    if (width() === drawn) return;
    drawn = width();
    redraw(["look"]);
  }).observe(spot("river"));
}

start();
