// The settings, and what they do to the distribution of the next token.

import { $, delayed, element, percent, say, visible } from "./dom.js";
import { decodeLogprobs, truncated } from "./distribution.js";
import { post, tokenOf } from "./wire.js";

const SHOWN = 12;   // tokens with bars
const TOP_K = [1, 2, 3, 4, 5, 6, 8, 10, 12, 15, 20, 30, 40, 50, 75, 100, 200, null];
const NOTHING = { temperature: 1, top_k: null, top_p: null, min_p: null };
const START = { temperature: "0.7", top_k: String(TOP_K.length - 1), top_p: "0.95", min_p: "0" };
const RESET = { temperature: "1", top_k: String(TOP_K.length - 1), top_p: "1", min_p: "0" };

let shown = null;    // {logprobs, tokens, label}: the place whose distribution is drawn
let newest = 0;      // number of the latest place that was asked for

export function sampling() {
  const top_p = Number($("top_p").value), min_p = Number($("min_p").value);
  return {
    temperature: Number($("temperature").value),
    top_k: TOP_K[Number($("top_k").value)],
    top_p: top_p < 1 ? top_p : null,
    min_p: min_p > 0 ? min_p : null,
  };
}

// The fields of a request; a setting that keeps everything is left out.
export function samplingFields() {
  const set = Object.entries({ ...sampling(), max_tokens: number("max_tokens"), seed: number("seed") });
  return Object.fromEntries(set.filter(([, value]) => value !== null));
}

function number(id) {
  const field = $(id);
  return field.value.trim() === "" ? null : Number(field.value);
}

// Returns whether all is well; else the field that is not is shown with its reason.
export function checkSettings() {
  const wrong = [...$("panel").querySelectorAll("input")].find((input) => !input.checkValidity());
  if (!wrong) return true;
  openPanel(true);
  wrong.reportValidity();
  return false;
}

export function openPanel(open) {
  document.body.classList.toggle("panel-open", open);
  $("panel-toggle").setAttribute("aria-expanded", String(open));
}

// On a narrow screen the settings lie over what is asked for.
export function makeRoom() {
  if (matchMedia("(max-width: 60rem)").matches) openPanel(false);
}

export const isChat = () => $("mode").value === "chat";

/* ---- the place ---- */

// place: {source: {messages} or {prompt}, tokens: ids of the answer so far, label}; null for none.
export const lookAt = delayed(120, async (place) => {
  const mine = ++newest;
  if (place === null) { shown = null; return draw(); }
  try {
    const answer = await (await post("/page/next", { ...place.source, tokens: place.tokens, count: 40 })).json();
    if (mine !== newest) return;
    shown = { logprobs: decodeLogprobs(answer.logprobs), tokens: answer.tokens.map(tokenOf), label: place.label };
    draw();
  } catch (error) {
    if (mine !== newest) return;
    shown = null;
    draw(error.message);
  }
});

/* ---- the bars ---- */

function draw(problem) {
  $("bars").hidden = $("legend").hidden = shown === null;
  $("place").textContent = shown ? shown.label : problem ?? "Write something, or choose a token of an answer.";
  if (shown === null) { $("effect").textContent = ""; return; }
  const before = truncated(shown.logprobs, NOTHING), after = truncated(shown.logprobs, sampling());
  const full = Math.max(before.at(0), after.at(0));  // the longest bar
  const rows = shown.tokens.slice(0, SHOWN).map((token, rank) => row(visible(token), before.at(rank), after.at(rank), rank < after.kept, full));
  const rest = (made) => 1 - shown.tokens.slice(0, SHOWN).reduce((total, _, rank) => total + made.at(rank), 0);
  if (shown.logprobs.length > SHOWN) rows.push(row(`${(shown.logprobs.length - SHOWN).toLocaleString("en")} more`, Math.max(0, rest(before)), Math.max(0, rest(after)), after.kept > SHOWN, null));
  $("bars").tBodies[0].replaceChildren(...rows);
  $("effect").textContent = effect(before, after);
}

// `full` is the probability of a bar as long as can be; null for a row without bars.
function row(name, before, after, isKept, full) {
  const line = element("tr", `${full === null ? "rest" : ""} ${isKept ? "" : "cut"}`.trim());
  const track = element("td", "track"), old = element("i", "before"), now = element("i", "after");
  old.style.width = `${100 * before / full}%`;
  now.style.width = `${100 * after / full}%`;
  if (full !== null) track.append(old, now);
  const head = element("th", "", name);
  head.scope = "row";
  head.title = name;
  line.append(head, track, element("td", "number", percent(before)), element("td", "number now", isKept ? percent(after) : "cut"));
  return line;
}

function effect(before, after) {
  const total = before.kept.toLocaleString("en"), choices = (made) => Math.exp(made.entropy).toPrecision(3);
  return `${after.kept.toLocaleString("en")} of ${total} tokens can be drawn. The choice is as open as among ${choices(after)} equal tokens; the model's own, as among ${choices(before)}.`;
}

/* ---- the fields ---- */

function label() {
  const { temperature, top_k, top_p, min_p } = sampling();
  const words = {
    temperature: temperature === 0 ? "0, greedy" : temperature.toFixed(2),
    top_k: top_k === null ? "off" : String(top_k),
    top_p: top_p === null ? "off" : top_p.toFixed(2),
    min_p: min_p === null ? "off" : min_p.toFixed(2),
  };
  for (const [id, text] of Object.entries(words)) {
    $(`${id}-value`).textContent = text;
    $(id).setAttribute("aria-valuetext", text);
  }
}

const sayEffect = delayed(600, () => { if (shown !== null) say($("effect").textContent); });

function change() {
  label();
  if (shown !== null) draw();
  sayEffect();
}

function set(values) {
  for (const [id, value] of Object.entries(values)) $(id).value = value;
  label();
  if (shown !== null) draw();
}

export function listenToSettings() {
  $("top_k").max = String(TOP_K.length - 1);
  set(START);
  for (const id of Object.keys(START)) $(id).addEventListener("input", change);
  $("reset").addEventListener("click", () => { set(RESET); sayEffect(); });
  $("panel-toggle").addEventListener("click", () => openPanel(!document.body.classList.contains("panel-open")));
  $("shade").addEventListener("change", () => document.body.classList.toggle("shaded", $("shade").checked));
  draw();
}
