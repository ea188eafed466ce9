// Draws the figures of a page, and again when its width or its colors change. #look holds the template, and for each
// color its dark twin; a figure holds its own data.
(() => {
  "use strict";
  const plots = [...document.querySelectorAll(".plot")];
  if (!plots.length) return;
  const look = JSON.parse(document.getElementById("look").textContent);
  const specs = plots.map(plot => plot.querySelector("script").textContent);

  async function draw(plot, i) {
    const dark = document.body.dataset.mdColorScheme === "slate";
    const paint = text => dark ? text.replace(/"#[0-9a-f]{6}"/g, hex => JSON.stringify(look.dark[hex.slice(1, -1)] ?? hex.slice(1, -1))) : text;
    const { data, layout } = JSON.parse(paint(specs[i]));
    const meta = layout.meta ?? {};
    const width = Math.max(Math.min(plot.clientWidth, meta.max_width || Infinity), meta.min_width || 0);
    const template = JSON.parse(paint(JSON.stringify(look.template)));
    await Plotly.react(plot, data, { ...layout, template, width, autosize: false, dragmode: false }, { displayModeBar: false });
    if (width < 600) await Plotly.relayout(plot, meta.narrow ?? {});
    plot.dataset.drawn = dark ? "dark" : "light";
    plot.dataset.room = plot.clientWidth;
  }

  const drawAll = () => plots.forEach(draw);
  drawAll();
  new MutationObserver(drawAll).observe(document.body, { attributeFilter: ["data-md-color-scheme"] });
  const resize = new ResizeObserver(entries => {
    for (const { target } of entries) {
      if (Number(target.dataset.room) !== target.clientWidth) draw(target, plots.indexOf(target));
    }
  });
  for (const plot of plots) resize.observe(plot);
})();
