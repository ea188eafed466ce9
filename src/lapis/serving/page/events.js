// A stream of server-sent events in, the JSON objects of its data lines out, up to [DONE].

/**
 * Reads the body of a response.
 * @param {ReadableStream<Uint8Array>} body
 * @yields {Object} each event's data
 * @returns {boolean} whether the stream came to its end: false where it broke off
 */
export async function* eventsOf(body) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  try {
    for (;;) {
      const { value, done } = await reader.read();
      rest += value ?? "";
      const events = rest.split(/\r?\n\r?\n/);
      rest = done ? "" : events.pop();
      for (const event of events) {
        const data = event.split(/\r?\n/).filter(line => line.startsWith("data:")).map(line => line.slice(5).trimStart());
        if (!data.length) continue;
        if (data.join("\n") === "[DONE]") return true;
        yield JSON.parse(data.join("\n"));
      }
      if (done) return false;
    }
  } finally {
    reader.cancel().catch(() => {});
  }
}
