// The page's beginning and its course: the reader's words go to the models that are chosen, and the replies come back.
import { announce } from "./announcer.js";
import { ServerError, servedModels, streamReply, useKey } from "./api.js";
import { saveFile } from "./copying.js";
import { Conversation } from "./conversation.js";
import { button, element } from "./dom.js";
import { errorText } from "./errors.js";
import { LANGUAGES, list, preferred, t, useLanguage } from "./language.js";
import { chats, chosenModels, sampling, renameModels, showModels, systemPrompt } from "./settings.js";
import { ConversationView } from "./view.js";

const field = name => document.getElementById(name);
const [message, send, stop, notice] = ["message", "send", "stop", "notice"].map(field);
let conversation = new Conversation();
let running = null;  // the AbortController of the replies being written
let problem = null;  // what the notice tells: { text: () => string, label, act }

const view = new ConversationView(field("conversation"), { answer, rewrite, changed: draw, shown: keepInSight });

function draw() {
  view.draw(conversation, chosenModels(), Boolean(running));
  field("welcome").hidden = conversation.turns.length > 0;
  field("tools").hidden = !conversation.turns.length;
  field("new").disabled = field("export").disabled = Boolean(running);
  send.hidden = Boolean(running);
  stop.hidden = !running;
  notice.hidden = !problem;
  if (problem) {
    notice.replaceChildren(element("p", {}, problem.text()), button(t(problem.label), problem.act, { class: "plain" }));
  }
}

/** Lets models answer a turn at the same time, and waits for all of them. */
async function letAnswer(turn, models) {
  const settings = sampling();
  if (settings.wrong) {
    field("fold").open = true;
    settings.wrong.reportValidity();
    return;
  }
  running = new AbortController();
  problem = null;
  const replies = models.map(model => conversation.begin(turn, model, systemPrompt(), settings.seed, chats(model)));
  draw();
  followEnd(true);
  announce(t("writing", { model: list(models) }));
  await Promise.all(replies.map(reply => write(reply, settings, running.signal)));
  running = null;
  const atStop = document.activeElement === stop;
  draw();
  followEnd();
  if (atStop) message.focus();
}

async function write(reply, { temperature, longest }, signal) {
  reply.temperature = temperature;
  const request = { model: reply.model, ...reply.before, temperature, max_tokens: longest, seed: reply.seed };
  try {
    for await (const piece of streamReply(request, signal)) {
      reply.add(piece);
      view.grow(reply);
      followEnd();
    }
    reply.state = "done";
    announce(t("replied", { model: reply.model, text: reply.text }));
  } catch (error) {
    if (error.name !== "AbortError" && !(error instanceof ServerError)) throw error;
    reply.state = error.name === "AbortError" ? "stopped" : "failed";
    reply.error = error;
    announce(reply.state === "stopped" ? t("stopped") : errorText(error));
    if (error.kind === "key") field("key-form").hidden = false;
  }
  view.draw(conversation, chosenModels(), true);
}

function answer(turn, model) {
  stop.hidden = false;
  stop.focus({ preventScroll: true });
  letAnswer(turn, [model]);
}

function rewrite(turn, text) {
  message.focus({ preventScroll: true });
  letAnswer(conversation.rewrite(turn, text), chosenModels());
}

function say() {
  const text = message.value;
  if (running || !text.trim() || !chosenModels().length) return;
  const { wrong } = sampling();
  if (!wrong) message.value = "";
  if (wrong) {
    field("fold").open = true;
    wrong.reportValidity();
    return;
  }
  letAnswer(conversation.say(text), chosenModels());
}

// The end of the conversation stays in sight while replies grow, as long as the reader has not scrolled away from it.
let following = true;
addEventListener("scroll", () => {
  following = innerHeight + scrollY >= document.documentElement.scrollHeight - 120;
}, { passive: true });

function followEnd(always = false) {
  if (always || following) requestAnimationFrame(() => scrollTo({ top: document.documentElement.scrollHeight }));
}

function keepInSight(place) {
  place.scrollIntoView({ block: "nearest" });
}

field("composer").addEventListener("submit", event => {
  event.preventDefault();
  say();
});
message.addEventListener("keydown", event => {
  if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;  // composing: Korean, Chinese
  event.preventDefault();
  say();
});
stop.addEventListener("click", () => running?.abort());
addEventListener("keydown", event => {
  if (event.key === "Escape" && running && !event.isComposing) running.abort();
});
field("settings").addEventListener("submit", event => event.preventDefault());
for (const name of ["first", "second"]) field(name).addEventListener("change", draw);

field("export").addEventListener("click", () => {
  const lines = conversation.toJsonl(systemPrompt());
  if (lines) saveFile("chat.jsonl", lines);
  announce(t(lines ? "exported" : "nothing_to_export"));
});
field("new").addEventListener("click", () => {
  const before = conversation;
  conversation = new Conversation();
  problem = {
    text: () => t("cleared"),
    label: "bring_back",
    act: () => {
      conversation = before;
      problem = null;
      draw();
      message.focus();
    },
  };
  draw();
  message.focus();
});

field("key-form").addEventListener("submit", event => {
  event.preventDefault();
  useKey(field("key").value);
  field("key").value = "";
  meet();
});

/** Asks the server for its models; where it wants a key, asks the reader for that. */
async function meet() {
  try {
    showModels(await servedModels());
    field("key-form").hidden = true;
    problem = null;
    message.focus({ preventScroll: true });
  } catch (error) {
    if (!(error instanceof ServerError)) throw error;
    problem = { text: () => errorText(error), label: "try_again", act: meet };
    if (error.kind === "key") {
      if (field("key-form").hidden) problem = null;  // the form says it the first time
      field("key-form").hidden = false;
      field("key").focus();
    }
  }
  draw();
}

field("language").append(
  ...Object.entries(LANGUAGES).map(([code, name]) => element("option", { value: code, lang: code }, name))
);
field("language").addEventListener("change", async event => {
  await useLanguage(event.target.value, true);
  renameModels();
  view.redraw(conversation, chosenModels(), Boolean(running));
  draw();
});

const language = preferred();
field("language").value = language;
await useLanguage(language);
draw();
await meet();
document.documentElement.dataset.ready = "";
