// The conversation: messages, answers, and the branches of an answer.

import { $, button, element, say, visible } from "./dom.js";
import { abort, giveBack, run } from "./composer.js";
import { errorBox, generate, noteOf } from "./answers.js";
import { Writer } from "./tokens.js";
import { isChat, lookAt, samplingFields } from "./settings.js";
import { server } from "./wire.js";

let turns = [];   // {text, source, article, versions, at}: a message and its answer
let frame = null, isAlways = false;

export const chat = {
  placeholder: () => (isChat() ? "Message" : "Text to continue"),
  submit(text) {
    const turn = { text, source: sourceOf(text), versions: [], at: -1 };
    $("welcome").hidden = true;
    clearErrors();
    turn.mine = message("user", "You", text);
    turn.article = message("assistant", "Model", "");
    turn.article.turn = turn;
    turn.article.setAttribute("aria-describedby", "token-hint");
    turns.push(turn);
    follow(true);
    answer(turn, []);
  },
  clear() {
    abort();
    turns = [];
    $("log").replaceChildren($("welcome"));
    $("welcome").hidden = false;
    lookAt(null);
    $("prompt").focus();
  },
  // The distribution to show while `draft` stands in the text field.
  preview(draft) {
    if (draft.trim()) lookAt({ source: sourceOf(draft), tokens: [], label: isChat() ? "The first token of the answer to your message" : "The token after your text" });
    else if (turns.length) lookAt({ source: turns.at(-1).source, tokens: [], label: "The first token of the last answer" });
    else lookAt(null);
  },
};

// What a new text asks for: the conversation with it, or the text alone.
function sourceOf(text) {
  if (!isChat()) return { prompt: text };
  const earlier = turns.filter((turn) => turn.source.messages && turn.versions.length).flatMap((turn) => [
    { role: "user", content: turn.text },
    { role: "assistant", content: turn.versions[turn.at].writer.text },
  ]);
  return { messages: [...earlier, { role: "user", content: text }] };
}

function message(role, name, text) {
  const article = element("article", role);
  article.append(element("div", "role", name), element("div", "body", text));
  $("log").append(article);
  return article;
}

function showError(text) {
  $("log").append(errorBox(text));
  follow(true);
}

const clearErrors = () => $("log").querySelectorAll(".error").forEach((box) => box.remove());

// Keep the end in view where it was; at most once a frame, because to measure a long page takes its time.
function follow(always) {
  isAlways ||= always;
  frame ??= requestAnimationFrame(() => {
    const scroll = $("scroll");
    if (isAlways || scroll.scrollHeight - scroll.scrollTop - scroll.clientHeight < 160) scroll.scrollTop = scroll.scrollHeight;
    frame = null;
    isAlways = false;
  });
}

/* ---- an answer ---- */

function answer(turn, kept) {
  return run(async (signal) => {
    turn.article.querySelectorAll(".note, .versions").forEach((node) => node.remove());
    const room = isChat() || $("max_tokens").value ? {} : { max_tokens: Math.min(128, Math.floor(server.limit / 2)) };
    const fields = { ...turn.source, ...samplingFields(), ...room };
    const result = await generate(freshBody(turn), fields, kept, signal, () => follow(false));
    if (turns.includes(turn)) conclude(turn, result);
  });
}

// Each version of an answer has an element of its own.
function freshBody(turn) {
  const body = element("div", "body");
  body.dataset.branches = "";
  turn.article.querySelector(".body").replaceWith(body);
  return body;
}

function conclude(turn, result) {
  if (result.failure !== null && result.writer.tokens.length === 0) return refuse(turn, result.failure);
  addVersion(turn, result);
  if (result.failure !== null) showError(result.failure.message);
  say("The answer is complete.");
  follow(false);
  if (!$("prompt").value.trim() && $("detail").hidden) chat.preview("");
}

function refuse(turn, failure) {
  turn.article.remove();
  turn.mine.remove();
  turns.splice(turns.indexOf(turn), 1);
  giveBack(turn.text);
  showError(failure.code === "context_length_exceeded" && turns.length ? `${failure.message} New chat starts over.` : failure.message);
}

function addVersion(turn, result) {
  turn.versions.push(result);
  show(turn, turn.versions.length - 1);
}

function show(turn, at) {
  turn.at = at;
  const result = turn.versions[at];
  turn.article.querySelector(".body").replaceWith(result.writer.body);
  turn.article.querySelectorAll(".note, .versions").forEach((node) => node.remove());
  turn.article.append(noteOf(result));
  if (turn.versions.length > 1) turn.article.append(versionsOf(turn));
}

/* ---- branches ---- */

function versionsOf(turn) {
  const bar = element("div", "versions"), count = turn.versions.length;
  bar.setAttribute("role", "group");
  bar.setAttribute("aria-label", "Versions of this answer");
  const go = (step, text, name) => {
    const node = button("", text, () => {
      cutAfter(turn);
      show(turn, turn.at + step);
      turn.article.querySelector(`[aria-label="${name}"]`)?.focus();
      say(`Version ${turn.at + 1} of ${count}`);
    });
    node.setAttribute("aria-label", name);
    node.disabled = turn.at + step < 0 || turn.at + step >= count;
    return node;
  };
  bar.append(go(-1, "‹", "Earlier version"), element("span", "", `version ${turn.at + 1} of ${count}`), go(1, "›", "Later version"));
  return bar;
}

// Later turns answer to what stood here: they go with it.
function cutAfter(turn) {
  for (const later of turns.splice(turns.indexOf(turn) + 1)) { later.mine.remove(); later.article.remove(); }
  clearErrors();
}

// Go on from another token: what stands before it is kept. A token that ends an answer leaves nothing to go on with.
export function branch(span, index, alternative) {
  const turn = span.closest("article").turn, all = tokensOf(span.parentNode), at = span.first + index;
  const kept = all.slice(0, at);
  abort();
  cutAfter(turn);
  if (alternative.bytes === null) return run(async () => { if (turns.includes(turn)) endHere(turn, kept); });
  say(`Going on with ${visible(alternative)}`);
  answer(turn, [...kept, { ...alternative, others: all[at].others }]);
}

const tokensOf = (body) => [...body.children].flatMap((span) => span.tokens);

function endHere(turn, kept) {
  const writer = new Writer(freshBody(turn));
  kept.forEach((token) => writer.add(token));
  writer.finish();
  addVersion(turn, { writer, reason: "chosen", count: 0, time_s: 0, failure: null });
}

// The place before a token of an answer.
export function placeOf(span) {
  const turn = span.closest("article")?.turn;
  if (!turn) return null;
  const spans = [...span.parentNode.children], before = tokensOf(span.parentNode).slice(0, span.first);
  const told = spans.slice(0, spans.indexOf(span)).map((node) => node.textContent).join("").slice(-30);
  return { source: turn.source, tokens: before.map((token) => token.id), label: told ? `The token after “…${told}”` : "The first token of this answer" };
}
