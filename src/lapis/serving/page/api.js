// The server's routes as functions: models, a streamed reply, the lens. Whatever goes wrong is a ServerError of a kind.
import { eventsOf } from "./events.js";

let key = "";  // in memory only: it is gone when the page is closed

/** Which key goes along with every request; "" for none. */
export function useKey(text) {
  key = text.trim();
}

/**
 * What the server could not or would not do.
 * kind: unreachable, key, busy, missing, large, refused, broken or failed; each has its words in the languages.
 * detail: what the server says itself, in English, or "".
 */
export class ServerError extends Error {
  constructor(kind, detail = "", seconds = 0) {
    super(detail || kind);
    this.kind = kind;
    this.detail = detail;
    this.seconds = seconds;
  }
}

const KINDS = { 401: "key", 403: "key", 404: "missing", 413: "large", 429: "busy", 503: "busy" };

async function ask(path, body, signal) {
  const headers = key ? { Authorization: `Bearer ${key}` } : {};
  if (body) headers["Content-Type"] = "application/json";
  let response;
  try {
    response = await fetch(new URL(path, document.baseURI), {
      method: body ? "POST" : "GET",
      headers,
      body: body ? JSON.stringify(body) : undefined,
      signal,
      cache: "no-store",
      credentials: "omit",
    });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ServerError("unreachable");
  }
  if (!response.ok) throw await errorOf(response);
  return response;
}

async function errorOf(response) {
  let detail = "";
  try {
    const said = await response.json();
    detail = said.error?.message ?? said.detail ?? "";
  } catch {
    // a proxy in between may say something that is no JSON; the status is enough then
  }
  const kind = KINDS[response.status] ?? (response.status < 500 ? "refused" : "failed");
  return new ServerError(kind, typeof detail === "string" ? detail : "", Number(response.headers.get("Retry-After")) || 0);
}

/**
 * The models that are served: { name, chats, completes }. chats is false where a model has no chat template, completes
 * where it writes no text at all.
 */
export async function servedModels() {
  const list = await (await ask("v1/models")).json();
  return list.data.map(model => ({
    name: model.id, chats: model.chat !== false, completes: model.completions !== false,
  }));
}

/**
 * A reply, or how a text goes on, in pieces as they come.
 * @param {Object} request as OpenAI's chat completions have it, or with a prompt as its completions do, without what
 *   makes it a stream
 * @param {AbortSignal} signal
 * @yields {{text: string, tokens: Object[], reason: string|null}}
 */
export async function* streamReply(request, signal) {
  const chat = request.prompt === undefined;
  const shown = chat ? { logprobs: true, top_logprobs: 5 } : { logprobs: 5 };
  const response = await ask(chat ? "v1/chat/completions" : "v1/completions", { ...request, ...shown, stream: true }, signal);
  const events = eventsOf(response.body);
  try {
    for (;;) {
      const { value, done } = await events.next();
      if (done && !value) throw new ServerError("broken");
      if (done) return;
      if (value.error) throw new ServerError("failed", value.error.message ?? "");
      const choice = value.choices?.[0];
      if (choice) {
        yield {
          text: choice.delta?.content ?? choice.text ?? "",
          tokens: choice.logprobs?.content ?? [],
          reason: choice.finish_reason ?? null,
        };
      }
    }
  } catch (error) {
    if (error instanceof ServerError || error.name === "AbortError") throw error;
    throw new ServerError("broken");
  } finally {
    events.return(false);
  }
}

/** What every layer would have said at a place of a reply: see `POST /lapis/lens`. before: { messages } or { prompt }. */
export async function readLens(model, before, reply, place, signal) {
  return (await ask("lapis/lens", { model, ...before, reply, place }, signal)).json();
}
