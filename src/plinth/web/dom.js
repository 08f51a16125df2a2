// Elements, and numbers and tokens in words. Everything that comes from the model or the user enters the page through textContent.

export const $ = (id) => document.getElementById(id);

export function element(tag, className, text) {
  const node = document.createElement(tag);
  if (className) node.className = className;
  if (text !== undefined) node.textContent = text;
  return node;
}

export function button(className, text, onClick) {
  const node = element("button", className, text);
  node.type = "button";
  node.addEventListener("click", onClick);
  return node;
}

export function svg(tag, attributes = {}, text) {
  const node = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
  if (text !== undefined) node.textContent = text;
  return node;
}

export const sum = (values) => values.reduce((total, value) => total + value, 0);
export const probability = (logprob) => Math.exp(Math.min(logprob, 0));

export function percent(share) {
  const value = 100 * share;
  if (value >= 99.995) return "100 %";
  if (value >= 0.01) return `${value.toFixed(value < 1 ? 2 : 1)} %`;
  return value > 0 ? "< 0.01 %" : "0 %";
}

const decoder = new TextDecoder("utf-8", { fatal: true, ignoreBOM: true });

// A token {id, bytes, name}, bytes null where it is special, as text that shows what cannot be seen.
export function visible(token) {
  if (token.bytes === null) return token.name;
  let text;
  try { text = decoder.decode(token.bytes); } catch { /* part of a character */ }
  if (text === undefined) return [...token.bytes].map((b) => b.toString(16).padStart(2, "0").toUpperCase()).join(" ") + " (bytes)";
  return text.replace(/ /g, "␣").replace(/\n/g, "⏎").replace(/\t/g, "⇥").replace(/\r/g, "␍")
    .replace(/[\u0000-\u001f\u007f-\u009f\u200b-\u200f\u2028-\u202e\u2066-\u2069\ufeff]/g, (c) => `\\u${c.charCodeAt(0).toString(16).padStart(4, "0")}`) || "(empty)";
}

export function delayed(wait_ms, action) {
  let timer;
  const call = (...values) => { clearTimeout(timer); timer = setTimeout(() => action(...values), wait_ms); };
  call.cancel = () => clearTimeout(timer);
  return call;
}

export const say = (text) => { $("status").textContent = text; };
