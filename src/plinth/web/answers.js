// One answer as it streams into the page, and what there is to say of it at its end.

import { element } from "./dom.js";
import { Writer, perplexity } from "./tokens.js";
import { stream, tokenOf } from "./wire.js";

const REASONS = { stop: "ended by the model", length: "cut by the token limit", aborted: "stopped by you", chosen: "ended by your choice" };

// Stream an answer into `body`: first the `kept` tokens that it goes on from, then what the server sends for `fields`.
// Returns {writer, reason, valid, failure, time_s, count}; `onToken` is called after each event.
export async function generate(body, fields, kept, signal, onToken) {
  const writer = new Writer(body), start = performance.now();
  kept.forEach((token, index) => writer.add(token, index === kept.length - 1 ? "branched" : undefined));
  const result = { writer, reason: null, valid: null, failure: null, count: 0 };
  body.classList.add("busy");
  try {
    for await (const event of stream("/page/generate", { ...fields, tokens: kept.map((token) => token.id) }, signal)) {
      event.tokens.forEach((token) => writer.add(tokenOf(token)));
      result.count += event.tokens.length;
      result.reason = event.finish_reason ?? result.reason;
      result.valid = event.valid ?? result.valid;
      onToken();
    }
  } catch (error) {
    if (error.name === "AbortError") result.reason = "aborted";
    else result.failure = error;
  }
  writer.finish();
  body.classList.remove("busy");
  result.time_s = (performance.now() - start) / 1000;
  return result;
}

// One line about an answer.
export function noteOf({ writer, reason, count, time_s }) {
  const parts = [`${writer.tokens.length} ${writer.tokens.length === 1 ? "token" : "tokens"}`];
  if (count) parts.push(`${time_s.toFixed(1)} s`, `${(count / time_s).toFixed(0)} tokens/s`);
  if (writer.tokens.length) parts.push(`perplexity ${Number(perplexity(writer.tokens).toPrecision(3)).toLocaleString("en")}`);
  if (reason) parts.push(REASONS[reason] ?? reason);
  return element("div", "note", parts.join(" · "));
}

export function errorBox(text) {
  const box = element("div", "error", text);
  box.setAttribute("role", "alert");
  return box;
}
