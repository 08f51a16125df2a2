// The text field, Send and Stop: one thing runs at a time.

import { $ } from "./dom.js";
import { checkSettings, makeRoom } from "./settings.js";
import { server } from "./wire.js";

let running = null;                // the AbortController of what runs
let current = Promise.resolve();   // its end

export const isRunning = () => running !== null;
export const abort = () => running?.abort();

// Run `task(signal)` once what ran before has been stopped and has ended.
export function run(task) {
  running?.abort();
  const before = current, mine = new AbortController();
  current = (async () => {
    await before;
    setRunning(mine);
    try { await task(mine.signal); } finally { setRunning(null); }
  })();
  return current;
}

function setRunning(controller) {
  const held = document.activeElement;
  running = controller;
  $("send").hidden = controller !== null;
  $("stop").hidden = controller === null;
  $("log").setAttribute("aria-busy", String(controller !== null));
  if (controller === null && held === $("stop")) $("prompt").focus();
}

export function setPlaceholder(text) {
  $("prompt").placeholder = text;
  $("prompt-label").textContent = text;
}

// Give a text back that was not answered, unless another has been begun.
export function giveBack(text) {
  if (!$("prompt").value) $("prompt").value = text;
  grow();
}

function grow() {
  const field = $("prompt");
  field.style.height = "auto";
  field.style.height = `${field.scrollHeight + 2}px`;
}

function submit(onSubmit) {
  const text = $("prompt").value;
  if (running || !text.trim() || server.model === null || !checkSettings()) return;
  if (onSubmit(text) === false) return;
  $("prompt").value = "";
  grow();
  makeRoom();
}

// onSubmit(text) may return false to keep the text; onInput() is told of every change.
export function listenToComposer(onSubmit, onInput) {
  $("composer").addEventListener("submit", (event) => { event.preventDefault(); submit(onSubmit); onInput(); });
  $("prompt").addEventListener("input", () => { grow(); onInput(); });
  $("prompt").addEventListener("keydown", (event) => {
    if (event.key === "Enter" && !event.shiftKey && !event.isComposing) { event.preventDefault(); submit(onSubmit); onInput(); }
  });
  $("stop").addEventListener("click", abort);
}
