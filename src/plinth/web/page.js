// The page: its views, its model, and who listens to what.

import { $, delayed } from "./dom.js";
import { beams } from "./beams.js";
import { branch, chat, placeOf } from "./chat.js";
import { abort, isRunning, listenToComposer, setPlaceholder } from "./composer.js";
import { errorBox } from "./answers.js";
import { listenToSettings, lookAt } from "./settings.js";
import { listenToStructured, structured } from "./structured.js";
import { run } from "./run.js";
import { closeDetail, hideDetail, listenToTokens, onTokens } from "./tokens.js";
import { get, server } from "./wire.js";

const VIEWS = { chat, beams, json: structured, run };
let view = "chat";

async function connect() {
  try {
    const entry = (await get("/v1/models")).data[0];
    Object.assign(server, { model: entry.id, limit: entry.max_model_len, chat: entry.chat !== false });
    $("model").textContent = `${entry.id} · context ${entry.max_model_len} tokens`;
    $("max_tokens").max = entry.max_model_len;
    if (!server.chat) $("mode").value = "completion";
    showMode();
  } catch (error) {
    $("model").textContent = "no connection";
    $("log").append(errorBox(`The server does not answer (${error.message}). Start it again with plinth serve and reload this page.`));
  }
}

function showView(name) {
  view = name;
  hideDetail(true);
  for (const other of Object.keys(VIEWS)) {
    $(`tab-${other}`).setAttribute("aria-selected", String(other === name));
    $(`tab-${other}`).tabIndex = other === name ? 0 : -1;
    $(other).hidden = other !== name;
  }
  document.body.dataset.view = name;
  $("clear").hidden = name !== "chat";
  VIEWS[name].show?.();
  showMode();
}

function showMode() {
  if (VIEWS[view].placeholder) setPlaceholder(VIEWS[view].placeholder());
  $("max_tokens").placeholder = $("mode").value === "chat" ? "all that fit" : "128";
}

function onTabKey(event) {
  const names = Object.keys(VIEWS), at = names.indexOf(view);
  const to = { ArrowRight: at + 1, ArrowLeft: at - 1 + names.length, Home: 0, End: names.length - 1 }[event.key];
  if (to === undefined) return;
  event.preventDefault();
  showView(names[to % names.length]);
  $(`tab-${view}`).focus();
}

const preview = delayed(250, () => { if (view !== "run" && !isRunning() && server.model !== null) chat.preview($("prompt").value); });

// What was chosen stands until something is written; a preview that is still to come would replace it.
function pin(span) {
  const place = placeOf(span);
  if (place === null) return;
  preview.cancel();
  lookAt(place);
}

for (const name of Object.keys(VIEWS)) $(`tab-${name}`).addEventListener("click", () => showView(name));
$("tabs").addEventListener("keydown", onTabKey);
document.addEventListener("keydown", (event) => {
  if (event.key !== "Escape" || $("key-dialog").open) return;
  if (!closeDetail()) abort();
});
$("clear").addEventListener("click", () => { hideDetail(true); chat.clear(); });
$("mode").addEventListener("change", () => { showMode(); preview(); });
onTokens({ branch, pin });
listenToTokens();
listenToSettings();
listenToStructured();
listenToComposer((text) => { hideDetail(true); return VIEWS[view].submit(text); }, preview);
showView("chat");
connect();
