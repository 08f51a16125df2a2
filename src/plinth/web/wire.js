// The server: JSON, streams of events, and the API key where it asks for one.

import { $ } from "./dom.js";

export const server = { model: null, limit: 0, chat: true };
const KEY = "plinth-api-key";
let asking = null;

export class ServerError extends Error {
  constructor(message, code) { super(message); this.code = code; }
}

async function request(address, options = {}) {
  const key = sessionStorage.getItem(KEY);
  const headers = { ...options.headers, ...(key ? { Authorization: `Bearer ${key}` } : {}) };
  const answer = await fetch(address, { ...options, headers });
  if (answer.status === 401) {
    const wasGiven = sessionStorage.getItem(KEY) !== null;
    if (sessionStorage.getItem(KEY) === key) sessionStorage.removeItem(KEY);
    if (await askKey(wasGiven)) return request(address, options);
  }
  if (answer.ok) return answer;
  const error = (await answer.json().catch(() => null))?.error;
  throw new ServerError(error?.message ?? `HTTP ${answer.status}`, error?.code);
}

// One dialog for all requests that wait for the key.
function askKey(wasWrong) {
  if (sessionStorage.getItem(KEY) !== null) return Promise.resolve(true);
  asking ??= new Promise((resolve) => {
    const dialog = $("key-dialog");
    $("key-wrong").hidden = !wasWrong;
    $("key").value = "";
    dialog.returnValue = "";
    dialog.addEventListener("close", () => {
      asking = null;
      const isGiven = dialog.returnValue === "use" && $("key").value.trim() !== "";
      if (isGiven) sessionStorage.setItem(KEY, $("key").value.trim());
      resolve(isGiven);
    }, { once: true });
    $("key-cancel").onclick = () => dialog.close("cancel");
    dialog.showModal();
  });
  return asking;
}

export async function get(address) {
  return (await request(address)).json();
}

export function post(address, body, signal) {
  const text = JSON.stringify({ model: server.model, ...body });
  return request(address, { method: "POST", headers: { "Content-Type": "application/json" }, body: text, signal });
}

// Yields the events of a stream until [DONE]; an error event, or an end without [DONE], is thrown.
export async function* stream(address, body, signal) {
  const reader = (await post(address, body, signal)).body.pipeThrough(new TextDecoderStream()).getReader();
  let buffer = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) throw new ServerError("The server ended the answer early.");
    buffer += value;
    let end;
    while ((end = buffer.indexOf("\n\n")) >= 0) {
      const data = buffer.slice(0, end).replace(/^data: ?/, "");
      buffer = buffer.slice(end + 2);
      if (data === "[DONE]") return;
      if (!data || data.startsWith(":")) continue;
      const event = JSON.parse(data);
      if (event.error) throw new ServerError(event.error.message, event.error.code);
      yield event;
    }
  }
}

// A token of the wire with its bytes as an array; bytes stays null for a special token.
export function tokenOf(item) {
  return { ...item, bytes: item.bytes && new Uint8Array(item.bytes), others: item.top?.map(tokenOf) ?? [] };
}
