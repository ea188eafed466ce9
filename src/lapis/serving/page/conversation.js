// What was said: turns, the replies of each model to them, what a model is sent of it, and the conversation as jsonl.
//
// A turn is { text, replies }, with replies a Map from a model's name to a Reply. A model that joins later, or that did
// not answer a turn, goes on from what another one answered, so that every model reads a whole conversation.

/** One model's answer to one turn: its text, its tokens, and how it went. */
export class Reply {
  constructor(model, before, seed) {
    this.model = model;
    this.before = before;      // what the model read before it: { messages }, or { prompt } where it only goes on with text
    this.seed = seed;
    this.text = "";
    this.tokens = [];          // { token, id, logprob, bytes, top_logprobs } each, as the server sends them
    this.state = "writing";    // then: done, stopped (by the reader) or failed
    this.reason = null;        // of the server: stop or length
    this.error = null;
    this.edited = false;
    this.seconds = 0;
    this.started = performance.now();
  }

  /** Takes in a piece of the stream. */
  add({ text, tokens, reason }) {
    this.text += text;
    this.tokens.push(...tokens);
    this.reason = reason ?? this.reason;
    this.seconds = (performance.now() - this.started) / 1000;
  }

  /** Puts the reader's words in the place of the model's; what is known of its tokens no longer holds. */
  edit(text) {
    this.text = text;
    this.tokens = [];
    this.edited = true;
    this.state = "done";
    this.error = null;
  }

  get usable() {
    return this.state !== "writing" && this.text.trim() !== "";
  }
}

export class Conversation {
  constructor() {
    this.turns = [];
  }

  /** Begins a turn with the reader's words. */
  say(text) {
    this.turns.push({ text, replies: new Map(), tries: new Map() });
    return this.turns.at(-1);
  }

  /** Replaces the words of a turn; its replies, and all turns after it, no longer hold and are dropped. */
  rewrite(turn, text) {
    this.turns.length = this.turns.indexOf(turn);
    return this.say(text);
  }

  /** Messages for a model, up to and with the words of `turn`. */
  messagesFor(model, turn, system) {
    const messages = system.trim() ? [{ role: "system", content: system.trim() }] : [];
    for (const earlier of this.turns) {
      if (earlier === turn) break;
      const reply = answerOf(earlier, model);
      if (reply) messages.push({ role: "user", content: earlier.text }, { role: "assistant", content: reply.text });
    }
    return [...messages, { role: "user", content: turn.text }];
  }

  /** Puts a new reply of `model` into a turn. With a seed, another try draws from the next one. A model that does not
   * chat goes on with the words of the turn alone. */
  begin(turn, model, system, seed, chats = true) {
    const tries = turn.tries.get(model) ?? 0;
    turn.tries.set(model, tries + 1);
    const before = chats ? { messages: this.messagesFor(model, turn, system) } : { prompt: turn.text };
    const reply = new Reply(model, before, seed + tries);
    turn.replies.set(model, reply);
    return reply;
  }

  /**
   * One line for each model that answered, as `lapis train` reads chats: {"messages": [...]}. Equal lines stand once. Where
   * no model chats, a line for each text that went on, as it reads texts: {"text": ...}.
   */
  toJsonl(system) {
    const usable = this.turns.flatMap(turn => [...turn.replies.values()].filter(reply => reply.usable));
    const models = new Set(usable.filter(reply => reply.before.messages).map(reply => reply.model));
    if (!models.size) return usable.map(reply => `${JSON.stringify({ text: reply.before.prompt + reply.text })}\n`).join("");
    const lines = [...models].map(model => {
      const messages = system.trim() ? [{ role: "system", content: system.trim() }] : [];
      for (const turn of this.turns) {
        const reply = answerOf(turn, model);
        if (reply) messages.push({ role: "user", content: turn.text }, { role: "assistant", content: reply.text });
      }
      return JSON.stringify({ messages });
    });
    return [...new Set(lines)].map(line => `${line}\n`).join("");
  }
}

/** The reply of a model to a turn, else the first one that another gave, else null. A text that went on is no reply. */
function answerOf(turn, model) {
  const replies = [...turn.replies.values()].filter(reply => reply.usable && reply.before.messages);
  return replies.find(reply => reply.model === model) ?? replies[0] ?? null;
}
