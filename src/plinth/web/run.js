// The run that is served: its curves and its report, each in a frame with a policy of its own.

import { $, element } from "./dom.js";
import { get } from "./wire.js";

let facts = null;

export const run = {
  async show() {
    facts ??= await get("/page/run").catch((error) => ({ problem: error.message }));
    const text = facts.problem ?? facts.note;
    $("run-note").textContent = text;
    $("run-note").hidden = !text;
    frame("run-curves", "Curves of the training run", facts.curves);
    frame("run-report", "Report of the build", facts.report);
  },
};

function frame(id, title, address) {
  const box = $(id);
  box.hidden = !address;
  if (!address || box.querySelector("iframe")) return;
  const view = element("iframe"), link = element("a", "", `${title}, on a page of its own`);
  view.title = title;
  view.src = link.href = address;
  link.target = "_blank";
  link.rel = "noopener";
  box.append(link, view);
}
