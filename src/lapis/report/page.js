// Draws the figures of a lapis page, again when the width, the color scheme or the medium changes, and sorts tables.
// Reads three data blocks of the page: #plotly (the library, deflated), #look (template, dark colors), and one per figure.
(async () => {
  "use strict";

  for (const button of document.querySelectorAll("button.sort")) {
    button.addEventListener("click", () => sortBy(button.closest("th")));
  }

  function sortBy(head) {
    const table = head.closest("table");
    const down = head.getAttribute("aria-sort") !== "descending";
    for (const other of table.querySelectorAll("th[aria-sort]")) other.removeAttribute("aria-sort");
    head.setAttribute("aria-sort", down ? "descending" : "ascending");
    const key = row => row.cells[Number(head.dataset.column)].dataset.value ?? "";
    const order = (a, b) => {
      const [p, q] = [key(a), key(b)];
      if (p === "" || q === "") return (p === "") - (q === "");   // what was not measured stays last
      const numbers = Number(p) - Number(q);
      return (down ? -1 : 1) * (Number.isNaN(numbers) ? p.localeCompare(q) : numbers);
    };
    const body = table.tBodies[0];
    body.append(...[...body.rows].sort(order));
  }

  const plots = [...document.querySelectorAll(".plot")];
  if (!plots.length) return;
  if (!("DecompressionStream" in window)) {
    for (const note of document.querySelectorAll(".plot > p")) note.textContent = "This browser is too old to draw the picture.";
    return;
  }
  await loadPlotly();
  const look = JSON.parse(document.getElementById("look").textContent);
  const dark = matchMedia("(prefers-color-scheme: dark)");
  const touch = matchMedia("(hover: none)");
  let printing = false;

  async function loadPlotly() {
    const packed = Uint8Array.from(atob(document.getElementById("plotly").textContent.trim()), c => c.charCodeAt(0));
    const stream = new Blob([packed]).stream().pipeThrough(new DecompressionStream("deflate"));
    const script = document.createElement("script");
    script.textContent = await new Response(stream).text();
    document.head.append(script);
  }

  // Every color of ours has a dark twin; data arrays are left as they are.
  const data = new Set(["x", "y", "z", "text", "hovertext", "customdata", "labels", "ids", "parents", "values", "ticktext", "tickvals"]);
  function darken(value, key) {
    if (typeof value === "string") return look.dark[value] ?? value;
    if (value === null || typeof value !== "object" || data.has(key)) return value;
    if (Array.isArray(value)) return value.map(item => darken(item, ""));
    return Object.fromEntries(Object.entries(value).map(([name, item]) => [name, darken(item, name)]));
  }

  function put(target, path, value) {
    const keys = path.split(".");
    const last = keys.pop();
    for (const key of keys) target = target[key] ??= {};
    target[last] = value;
  }

  async function draw(plot) {
    const { data: traces, layout } = JSON.parse(plot.parentElement.querySelector("script").textContent);
    const meta = layout.meta ?? {};
    const inside = plot.parentElement.clientWidth;   // 0 in what is folded, which is drawn again when it is opened
    const room = printing ? 680 : inside || document.querySelector("main").clientWidth - 64;
    const narrow = room < 600;
    if (narrow) for (const [path, value] of Object.entries(meta.narrow ?? {})) put(layout, path, value);
    const width = printing ? room : Math.max(Math.min(room, meta.max_width || room), meta.min_width || 0);
    plot.style.width = `${width}px`;
    const fresh = !plot.dataset.drawn;
    plot.style.height = `${layout.height}px`;
    let spec = { data: traces, layout: { ...layout, template: look.template } };
    if (dark.matches && !printing) spec = darken(spec, "");
    Object.assign(spec.layout, { width, autosize: false });
    if (narrow || touch.matches) spec.layout.dragmode = false;   // a finger scrolls the page
    plot.dataset.room = inside;
    for (const note of plot.querySelectorAll(":scope > p")) note.remove();
    await Plotly.react(plot, spec.data, spec.layout, { displayModeBar: false, responsive: false });
    if (fresh && meta.end) plot.parentElement.scrollLeft = plot.parentElement.scrollWidth;
    plot.dataset.drawn = dark.matches && !printing ? "dark" : "light";
  }

  // A picture to keep: always light, with its title, as wide as it is shown.
  function keep(plot) {
    const { data: traces, layout } = JSON.parse(plot.parentElement.querySelector("script").textContent);
    const title = plot.closest("figure").querySelector("h2, h3")?.textContent ?? "";
    const text = title.replace(/&/g, "&amp;").replace(/</g, "&lt;").replace(/>/g, "&gt;");
    const [width, height] = [Math.max(plot.clientWidth, 720), layout.height + 40];
    const margin = { ...layout.margin, t: (layout.margin?.t ?? 40) + 40 };
    const whole = { ...layout, template: look.template, title: { text }, margin, width, height, paper_bgcolor: "#ffffff" };
    const filename = title.toLowerCase().replace(/[^\p{L}\p{N}]+/gu, "-").replace(/^-|-$/g, "").slice(0, 60) || "figure";
    return Plotly.downloadImage({ data: traces, layout: whole }, { format: "png", width, height, scale: 2, filename });
  }
  for (const button of document.querySelectorAll("button.keep")) {
    button.addEventListener("click", () => keep(button.closest("figure").querySelector(".plot")));
    button.hidden = false;
  }

  const drawAll = () => Promise.all(plots.map(draw));
  await drawAll();
  document.documentElement.dataset.ready = "yes";

  const resize = new ResizeObserver(entries => {
    if (printing) return;
    for (const { target } of entries) {
      const plot = target.querySelector(".plot");
      if (Number(plot.dataset.room) !== target.clientWidth) draw(plot);
    }
  });
  for (const plot of plots) resize.observe(plot.parentElement);
  dark.addEventListener("change", drawAll);
  addEventListener("beforeprint", () => { printing = true; drawAll(); });
  addEventListener("afterprint", () => { printing = false; drawAll(); });
})();
