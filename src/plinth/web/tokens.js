// Text as tokens: each shaded by its probability, its alternatives beside it, and a click on one of them.

import { $, button, element, percent, probability, sum, visible } from "./dom.js";

const LINGER_MS = 250;  // so that the pointer can cross from a token to its alternatives
let picked = null;      // the span whose alternatives are shown
let pinned = false;     // whether they stay when the pointer leaves
let timer;
const UNSEEN = /^(?:(?!\t)[\p{Cc}\u200b\u2028\u2029])+$/u;  // text that takes no room on the page: line breaks, control characters
const hooks = { branch: null, pin: () => {} };

// branch(span, index in the span, alternative) continues from an alternative; pin(span) is told of a token that was chosen.
export function onTokens(given) { Object.assign(hooks, given); }

// Collects tokens until their bytes make whole characters, and appends one span for each such group.
export class Writer {
  constructor(body) {
    this.body = body;
    this.decoder = new TextDecoder("utf-8", { ignoreBOM: true });
    this.group = [];
    this.tokens = [];
    this.text = "";
    body.replaceChildren();
  }
  add(token, mark) {
    this.tokens.push(token);
    if (token.bytes === null) return this.append([token], token.name, "token special");
    this.group.push(token);
    const text = this.decoder.decode(token.bytes, { stream: true });
    if (mark) this.mark = mark;
    if (text) this.flush(text);
  }
  finish() {
    const text = this.decoder.decode();
    if (text && this.group.length) this.flush(text);
  }
  flush(text) {
    this.append(this.group.splice(0), text, this.mark ? `token ${this.mark}` : "token");
    this.mark = undefined;
    this.text += text;
  }
  append(tokens, text, className) {
    const span = element("span", className, text);
    span.tokens = tokens;
    span.first = this.tokens.length - tokens.length;
    if (UNSEEN.test(text)) span.dataset.mark = visible(tokens[0]);
    span.style.setProperty("--doubt", (1 - probability(sum(tokens.map((t) => t.logprob)))).toFixed(3));
    span.tabIndex = this.body.children.length ? -1 : 0;
    this.body.append(span);
  }
}

export function perplexity(tokens) {
  return Math.exp(-sum(tokens.map((token) => token.logprob)) / tokens.length);
}

/* ---- the alternatives ---- */

function alternativesOf(span, index) {
  const token = span.tokens[index], part = element("div", "part");
  const head = element("div", "head");
  head.append(element("strong", "", visible(token)), element("span", "", percent(probability(token.logprob))));
  const list = element("ul");
  const others = token.others.some((other) => other.id === token.id) ? token.others : [...token.others, token];
  const canBranch = hooks.branch !== null && span.closest("[data-branches]") !== null;
  for (const other of others) {
    const isChosen = other.id === token.id, row = element("li", isChosen ? "chosen" : "");
    const meter = element("span", "meter"), fill = element("b");
    fill.style.width = `${100 * probability(other.logprob)}%`;
    meter.append(fill);
    const cells = [element("span", "name", visible(other)), element("span", "share", percent(probability(other.logprob))), meter];
    if (isChosen || !canBranch) row.append(...cells);
    else {
      const choice = button("branch", "", () => { hideDetail(true); hooks.branch(span, index, other); });
      choice.setAttribute("aria-label", `Continue with ${visible(other)} instead, ${percent(probability(other.logprob))}`);
      choice.append(...cells);
      row.append(choice);
    }
    list.append(row);
  }
  part.append(head, list);
  return part;
}

function showDetail(span) {
  clearTimeout(timer);
  if (picked === span) return;
  hideDetail(true);
  picked = span;
  span.classList.add("picked");
  const box = $("detail");
  box.replaceChildren(...span.tokens.map((_, index) => alternativesOf(span, index)));
  if (box.querySelector(".branch")) box.append(element("p", "hint", "Choose one to go on from it."));
  box.hidden = false;
  span.setAttribute("aria-describedby", "detail");
  place();
}

function place() {
  const box = $("detail"), at = picked.getClientRects()[0], size = box.getBoundingClientRect();
  const below = at.bottom + 6 + size.height <= innerHeight;
  box.style.left = `${Math.max(8, Math.min(at.left, innerWidth - size.width - 8))}px`;
  box.style.top = `${below ? at.bottom + 6 : Math.max(8, at.top - size.height - 6)}px`;
}

export function hideDetail(now) {
  clearTimeout(timer);
  if (picked === null || (pinned && !now)) return;
  picked.classList.remove("picked");
  picked.removeAttribute("aria-describedby");
  picked = null;
  pinned = false;
  $("detail").hidden = true;
}

function pin(span) {
  showDetail(span);
  pinned = true;
  hooks.pin(span);
}

const tokenAt = (target) => (target instanceof Element ? target.closest(".token") : null);
const hideSoon = () => { clearTimeout(timer); timer = setTimeout(hideDetail, LINGER_MS); };
const STEPS = { ArrowRight: 1, ArrowLeft: -1, Home: -Infinity, End: Infinity };

function moveFrom(span, step) {
  const all = [...span.parentNode.children];
  const next = all[Math.max(0, Math.min(all.length - 1, all.indexOf(span) + step))];
  span.tabIndex = -1;
  next.tabIndex = 0;
  next.focus();
}

function onTokenKey(event) {
  const span = tokenAt(event.target);
  if (!span) return;
  if (event.key in STEPS) {
    event.preventDefault();
    moveFrom(span, STEPS[event.key]);
  } else if (["Enter", " ", "ArrowDown"].includes(event.key)) {
    event.preventDefault();
    pin(span);
    $("detail").querySelector(".branch")?.focus();
  }
}

function onDetailKey(event) {
  const all = [...$("detail").querySelectorAll(".branch")], at = all.indexOf(document.activeElement);
  const step = { ArrowDown: 1, ArrowUp: -1 }[event.key];
  if (step !== undefined && at >= 0) {
    event.preventDefault();
    all[(at + step + all.length) % all.length].focus();
  }
}

// Returns whether there was something to close.
export function closeDetail() {
  if (picked === null) return false;
  const span = picked, isInside = $("detail").contains(document.activeElement);
  hideDetail(true);
  if (isInside) { span.focus(); hideDetail(true); }
  return true;
}

export function listenToTokens() {
  document.addEventListener("pointerover", (event) => {
    if (event.pointerType !== "mouse") return;
    if (tokenAt(event.target) && !pinned) showDetail(tokenAt(event.target));
    else if ($("detail").contains(event.target)) clearTimeout(timer);
  });
  document.addEventListener("pointerout", (event) => {
    if (event.pointerType === "mouse" && (tokenAt(event.target) || $("detail").contains(event.target)) && document.activeElement !== picked) hideSoon();
  });
  document.addEventListener("focusin", (event) => {
    if (tokenAt(event.target)) showDetail(tokenAt(event.target));
    else if (picked && !$("detail").contains(event.target)) hideDetail(true);
  });
  document.addEventListener("click", (event) => {
    if (tokenAt(event.target)) pin(tokenAt(event.target));
    else if (!$("detail").contains(event.target)) hideDetail(true);
  });
  document.addEventListener("keydown", onTokenKey);
  $("detail").addEventListener("keydown", onDetailKey);
  document.addEventListener("scroll", (event) => {
    if (picked === null || $("detail").contains(event.target)) return;
    if (document.activeElement === picked) place();
    else hideDetail(true);
  }, { passive: true, capture: true });
  addEventListener("resize", () => hideDetail(true));
}
