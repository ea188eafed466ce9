// What grows with the length of the text and what does not, for this model.
function drawCost() {
  const rows = E.cost.lengths;
  if (!rows.length) return;
  const x = { name: "tokens", log: true, show: inShort };
  const line = (name, key) => ({ name, points: rows.map(row => [row.context, row[key]]) });
  chart(spot("memory"), { label: "Memory at several lengths", x, y: { name: "bytes", log: true, show: value => `${inShort(value)}B` }, series: [line("weights", "weights"), line("KV cache", "cache")], mark: E.cost.tokens >= rows[0].context ? E.cost.tokens : null });
  chart(spot("work"), { label: "FLOPs of a token at several lengths", x, y: { name: "FLOPs", log: true, show: inShort }, series: [line("one token", "flops"), line("of it attention", "attention")], mark: E.cost.tokens >= rows[0].context ? E.cost.tokens : null });
}
