// Beam search, step by step: the tree of what was kept, what was given up, and the best texts.

import { $, element, say, svg, visible } from "./dom.js";
import { giveBack, run } from "./composer.js";
import { errorBox } from "./answers.js";
import { isChat } from "./settings.js";
import { stream, tokenOf } from "./wire.js";

const COLUMN = 96, ROW = 40, TOP = 22, BOX = { width: 80, height: 28 };
let steps = [];   // each {beams: [{parent, token, logprob, ended}]}
let best = [];    // each {text, logprob, score, step, beam}: where its path ends
let chosen = 0;

export const beams = {
  placeholder: () => (isChat() ? "Message to answer with beam search" : "Text to continue with beam search"),
  submit(text) {
    const asked = Object.fromEntries(["num_beams", "beam_tokens", "length_penalty"].map((id) => [id, $(id)]));
    const wrong = Object.values(asked).find((field) => !field.checkValidity());
    if (wrong) { wrong.reportValidity(); return false; }
    const source = isChat() ? { messages: [{ role: "user", content: text }] } : { prompt: text };
    const fields = { num_beams: Number(asked.num_beams.value), max_tokens: Number(asked.beam_tokens.value), length_penalty: Number(asked.length_penalty.value) };
    [steps, best, chosen] = [[], [], 0];
    $("beam-asked").textContent = text;
    $("beam-result").hidden = false;
    $("beam-error").replaceChildren();
    draw();
    run((signal) => search(text, { ...source, ...fields }, signal));
  },
};

async function search(text, fields, signal) {
  try {
    for await (const event of stream("/page/beams", fields, signal)) {
      if (event.beams) steps.push({ beams: event.beams.map((beam) => ({ ...beam, token: tokenOf(beam.token) })) });
      if (event.best) takeBest(event);
      draw();
    }
    say(`Beam search is complete. Best text: ${best[0]?.text ?? "none"}`);
  } catch (error) {
    if (error.name === "AbortError") return say("Beam search was stopped.");
    $("beam-error").append(errorBox(error.message));
    if (!steps.length) { giveBack(text); $("beam-result").hidden = true; }
  }
}

// The beams that texts end in come last, each with the step that it belongs to.
function takeBest({ ends, best: texts }) {
  for (const end of ends) (steps[end.step] ??= { beams: [] }).beams.push({ ...end, token: tokenOf(end.token) });
  best = texts;
}

/* ---- the tree ---- */

function draw() {
  drawBest();
  const rows = Math.max(1, ...steps.map((step) => step.beams.length));
  const width = Math.max(1, steps.length) * COLUMN + 8, height = TOP + rows * ROW;
  const root = svg("svg", { viewBox: `0 0 ${width} ${height}`, width, height, role: "img", "aria-label": summary() });
  const path = pathTo(best[chosen]);
  const alive = survivors();
  steps.forEach((step, x) => root.append(svg("text", { class: "step", x: x * COLUMN + BOX.width / 2 + 4, y: 12 }, String(x + 1))));
  for (const lines of [true, false]) {
    steps.forEach((step, x) => step.beams.forEach((beam, y) => {
      const marks = [path.has(`${x} ${y}`) ? "best" : "", alive.has(`${x} ${y}`) ? "" : "lost", beam.ended ? "ended" : ""].join(" ");
      root.append(...(lines ? lineTo(beam, x, y, marks) : nodeOf(beam, x, y, marks)));
    }));
  }
  const box = $("beam-tree"), atEnd = box.scrollWidth - box.scrollLeft - box.clientWidth < COLUMN;
  box.replaceChildren(root);
  if (atEnd && !best.length) box.scrollLeft = box.scrollWidth;
}

function lineTo(beam, x, y, marks) {
  if (x === 0) return [];
  const middle = (row) => TOP + row * ROW + BOX.height / 2;
  const from = (x - 1) * COLUMN + 4 + BOX.width, to = x * COLUMN + 4, bend = (from + to) / 2;
  return [svg("path", { class: `edge ${marks}`, d: `M${from} ${middle(beam.parent)}C${bend} ${middle(beam.parent)} ${bend} ${middle(y)} ${to} ${middle(y)}` })];
}

function nodeOf(beam, x, y, marks) {
  const group = svg("g", { class: `beam ${marks}`, transform: `translate(${x * COLUMN + 4} ${TOP + y * ROW})` });
  const name = visible(beam.token), characters = [...name];
  group.append(svg("title", {}, `${name}, sum of log-probabilities ${beam.logprob.toFixed(2)}${beam.ended ? ", ended" : ""}`));
  group.append(svg("rect", { ...BOX, rx: 5 }));
  group.append(svg("text", { class: "name", x: BOX.width / 2, y: 13 }, characters.length > 10 ? `${characters.slice(0, 9).join("")}…` : name));
  group.append(svg("text", { class: "sum", x: BOX.width / 2, y: 24 }, beam.logprob.toFixed(2)));
  return [group];
}

// The places on the way to where a text ends, as "step beam".
function pathTo(end) {
  const places = new Set();
  if (!end) return places;
  for (let x = end.step, y = end.beam; x >= 0; x--) {
    places.add(`${x} ${y}`);
    y = steps[x].beams[y].parent;
  }
  return places;
}

// The places from which something at the newest step, or a text that has ended, descends.
function survivors() {
  const places = new Set();
  const last = steps.length - 1;
  steps.forEach((step, x) => step.beams.forEach((beam, y) => {
    const isEnd = best.length ? best.some((text) => text.step === x && text.beam === y) : x === last || beam.ended;
    if (isEnd) pathTo({ step: x, beam: y }).forEach((place) => places.add(place));
  }));
  return places;
}

function summary() {
  if (!steps.length) return "Nothing was searched yet.";
  return `Tree of beams over ${steps.length} steps, ${steps[0].beams.length} beams a step. The best texts are listed below.`;
}

/* ---- the best texts ---- */

function drawBest() {
  $("beam-best").replaceChildren(...best.map((text, index) => {
    const item = element("li"), choice = element("button", "", text.text || "(nothing)");
    choice.type = "button";
    choice.setAttribute("aria-pressed", String(index === chosen));
    choice.addEventListener("click", () => { chosen = index; draw(); $("beam-best").querySelectorAll("button")[index].focus(); });
    item.append(choice, element("span", "note", `score ${text.score.toFixed(3)} · sum of log-probabilities ${text.logprob.toFixed(2)} · ${text.count} tokens${text.ended ? " · ended by the model" : ""}`));
    return item;
  }));
  $("beam-note").textContent = best.length ? "Choose a text to see its way through the tree." : "";
}
