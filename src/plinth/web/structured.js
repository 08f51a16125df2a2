// An answer that must follow a JSON schema: the schema, the answer as it comes, and whether it is whole.

import { $, element, say } from "./dom.js";
import { giveBack, run } from "./composer.js";
import { errorBox, generate, noteOf } from "./answers.js";
import { isChat, samplingFields } from "./settings.js";

const EXAMPLES = {
  "A person": { type: "object", properties: { name: { type: "string", maxLength: 40 }, age: { type: "integer", minimum: 0, maximum: 130 } }, required: ["name", "age"], additionalProperties: false },
  "A verdict": { type: "object", properties: { verdict: { enum: ["yes", "no", "unclear"] }, reason: { type: "string", maxLength: 120 } }, required: ["verdict", "reason"], additionalProperties: false },
  "A list of words": { type: "array", items: { type: "string", maxLength: 20 }, minItems: 2, maxItems: 5 },
};

export const structured = {
  placeholder: () => (isChat() ? "Message to answer in JSON" : "Text to continue with JSON"),
  submit(text) {
    const schema = readSchema();
    if (schema === undefined) return false;
    const source = isChat() ? { messages: [{ role: "user", content: text }] } : { prompt: text };
    const format = { type: "json_schema", json_schema: { name: "answer", schema, strict: true } };
    run((signal) => answer(text, { ...source, ...samplingFields(), response_format: format }, signal));
  },
};

function readSchema() {
  const field = $("schema");
  try {
    field.setCustomValidity("");
    return JSON.parse(field.value);
  } catch (error) {
    field.setCustomValidity(`This is no JSON: ${error.message}`);
    field.reportValidity();
    return undefined;
  }
}

async function answer(text, fields, signal) {
  $("json-result").hidden = false;
  $("json-asked").textContent = text;
  for (const id of ["json-state", "json-note", "json-error"]) $(id).replaceChildren();
  $("json-pretty").hidden = true;
  const body = $("json-body");
  const result = await generate(body, fields, [], signal, () => {});
  if (result.failure) {
    $("json-error").append(errorBox(result.failure.message));
    if (!result.writer.tokens.length) { giveBack(text); $("json-result").hidden = true; return; }
  }
  conclude(result);
}

function conclude(result) {
  const [mark, words] = verdict(result);
  $("json-state").append(element("span", `badge ${mark}`, words));
  $("json-note").append(noteOf(result));
  if (mark === "good") {
    $("json-pretty").textContent = JSON.stringify(JSON.parse(result.writer.text), null, 2);
    $("json-pretty").hidden = false;
  }
  say(words);
}

function verdict({ reason, valid, failure }) {
  if (valid === true) return ["good", "Valid: it follows the schema"];
  if (reason === "length") return ["warn", "Cut off by the token limit: not valid JSON"];
  if (reason === "aborted" || failure) return ["warn", "Stopped before its end: not valid JSON"];
  return ["alarm", "Not valid: it does not follow the schema"];
}

export function listenToStructured() {
  for (const name of Object.keys(EXAMPLES)) $("example").append(new Option(name, name));
  const show = () => {
    $("schema").value = JSON.stringify(EXAMPLES[$("example").value], null, 2);
    $("schema").setCustomValidity("");
  };
  $("example").addEventListener("change", show);
  $("schema").addEventListener("input", () => $("schema").setCustomValidity(""));
  show();
}
