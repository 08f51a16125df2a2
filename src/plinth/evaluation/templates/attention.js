"use strict";
(() => {
  const byId = (id) => document.getElementById(id);
  const maps = JSON.parse(byId("data").textContent).maps.map((map) => ({
    ...map,
    bytes: Uint8Array.from(atob(map.weights), (letter) => letter.charCodeAt(0)),
  }));
  const state = { map: 0, layer: 0, head: -1, row: 0 };
  const current = () => maps[state.map];
  const percent = (weight) => `${(100 * weight).toFixed(weight < 0.0995 ? 1 : 0)} %`;

  // Weights of a row: one head's, or with head -1 the mean of all heads.
  function weights(map, layer, head, row) {
    const width = map.columns.length, height = map.rows.length, found = new Float64Array(width);
    const heads = head < 0 ? [...Array(map.heads).keys()] : [head];
    for (const one of heads) {
      const start = ((layer * map.heads + one) * height + row) * width;
      for (let column = 0; column < width; column++) found[column] += (map.bytes[start + column] / 255) ** 2 / heads.length;
    }
    return found;
  }

  function largest(map, layer, head) {
    let most = 0;
    for (let row = 0; row < map.rows.length; row++) most = Math.max(most, ...weights(map, layer, head, row));
    return most || 1;
  }

  function shade(weight, most) {
    return `rgba(${getComputedStyle(document.documentElement).getPropertyValue("--heat")}, ${Math.min(1, weight / most).toFixed(3)})`;
  }

  // A map is first shown by its last layer, all heads together, and a token from its middle.
  const start = (i) => ({ map: i, layer: maps[i].layers - 1, head: -1, row: Math.floor(maps[i].rows.length / 2) });

  function options(select, labels, chosen) {
    select.replaceChildren(...labels.map(([value, label]) => new Option(label, value, false, value === chosen)));
  }

  function drawKinds() {
    byId("kinds").hidden = maps.length < 2;
    byId("kinds").replaceChildren(...maps.map((map, i) => {
      const button = document.createElement("button");
      button.type = "button";
      button.textContent = map.name;
      button.setAttribute("aria-pressed", String(i === state.map));
      button.onclick = () => choose(start(i));
      return button;
    }));
  }

  function drawChoice() {
    const map = current(), heads = [...Array(map.heads).keys()].map((i) => [i, String(i + 1)]);
    options(byId("layer"), [...Array(map.layers).keys()].map((i) => [i, String(i + 1)]), state.layer);
    options(byId("head"), map.heads > 1 ? [[-1, "mean of all"], ...heads] : [[-1, "1"]], state.head);
    byId("title").textContent = map.title;
    const written = map.name === "cross" ? "that is being written" : "that looks";
    byId("hint").textContent = `Choose the token ${written} in the upper line; the lower one is shaded by how much it looks at each.`;
  }

  function drawTokens() {
    const map = current(), found = weights(map, state.layer, state.head, state.row), most = Math.max(...found) || 1;
    byId("rows").replaceChildren(...map.rows.map((label, i) => {
      const token = document.createElement("button");
      token.type = "button";
      token.textContent = label;
      token.setAttribute("role", "option");
      token.setAttribute("aria-selected", String(i === state.row));
      token.tabIndex = i === state.row ? 0 : -1;
      token.onclick = () => chooseRow(i);
      return token;
    }));
    byId("columns").replaceChildren(...map.columns.map((label, i) => {
      const token = document.createElement("span");
      token.textContent = label;
      token.title = percent(found[i]);
      token.style.background = shade(0.5 * found[i], most);
      token.className = found[i] === 0 ? "hidden" : "";
      return token;
    }));
    const order = [...found.keys()].sort((a, b) => found[b] - found[a]).slice(0, 5).filter((i) => found[i] > 0);
    const parts = order.map((i) => `“${map.columns[i]}” ${percent(found[i])}`);
    byId("readout").textContent = `“${map.rows[state.row]}” looks at ${parts.join(", ")}.`;
  }

  const LEFT = 96, TOP = 84, RIGHT = 52, FONT = '12px ui-monospace, Menlo, Consolas, "DejaVu Sans Mono", monospace';
  let cell = 16;

  function clipped(context, text, room) {
    if (context.measureText(text).width <= room) return text;
    let length = text.length;
    while (length > 1 && context.measureText(text.slice(0, length) + "…").width > room) length--;
    return text.slice(0, length) + "…";
  }

  function drawMap() {
    const map = current(), canvas = byId("map"), ratio = window.devicePixelRatio || 1;
    const room = byId("frame").clientWidth - LEFT - RIGHT;
    cell = Math.max(14, Math.min(34, Math.floor(room / map.columns.length)));
    const width = LEFT + cell * map.columns.length + RIGHT, height = TOP + cell * map.rows.length + 8;
    canvas.width = width * ratio; canvas.height = height * ratio;
    canvas.style.width = `${width}px`; canvas.style.height = `${height}px`;
    const context = canvas.getContext("2d"), style = getComputedStyle(document.documentElement);
    const most = largest(map, state.layer, state.head);
    context.scale(ratio, ratio);
    context.font = FONT;
    context.textBaseline = "middle";
    for (let row = 0; row < map.rows.length; row++) {
      const found = weights(map, state.layer, state.head, row);
      for (let column = 0; column < map.columns.length; column++) {
        if (found[column] > 0) {
          context.fillStyle = shade(found[column], most);
          context.fillRect(LEFT + column * cell, TOP + row * cell, cell - 1, cell - 1);
        }
      }
      context.fillStyle = style.getPropertyValue(row === state.row ? "--series-1" : "--ink");
      context.textAlign = "right";
      context.fillText(clipped(context, map.rows[row], LEFT - 14), LEFT - 8, TOP + (row + 0.5) * cell);
    }
    context.textAlign = "left";
    context.fillStyle = style.getPropertyValue("--ink");
    map.columns.forEach((label, column) => {
      context.save();
      context.translate(LEFT + (column + 0.5) * cell, TOP - 8);
      context.rotate(-Math.PI / 3);
      context.fillText(clipped(context, label, TOP - 8), 0, 0);
      context.restore();
    });
    context.strokeStyle = style.getPropertyValue("--series-1");
    context.lineWidth = 1.5;
    context.strokeRect(LEFT - 1, TOP + state.row * cell - 1, cell * map.columns.length + 1, cell + 1);
    canvas.setAttribute("role", "img");
    canvas.setAttribute("aria-label", `${map.title}, layer ${state.layer + 1}: ${map.rows.length} rows, ${map.columns.length} columns`);
    byId("most").textContent = percent(most);
  }

  function thumbnail(map, layer, head) {
    const canvas = document.createElement("canvas");
    canvas.width = map.columns.length; canvas.height = map.rows.length;
    const context = canvas.getContext("2d"), image = context.createImageData(canvas.width, canvas.height);
    const heat = getComputedStyle(document.documentElement).getPropertyValue("--heat").split(",").map(Number);
    const start = (layer * map.heads + head) * canvas.width * canvas.height;
    for (let i = 0; i < canvas.width * canvas.height; i++) {
      image.data.set([...heat, map.bytes[start + i]], 4 * i);  // the bytes are square roots already: faint weights show
    }
    context.putImageData(image, 0, 0);
    return canvas;
  }

  function drawGrid() {
    const map = current();
    byId("overview").hidden = map.layers * map.heads < 2;
    byId("grid").style.gridTemplateColumns = `repeat(${map.heads}, auto)`;
    const buttons = [];
    for (let layer = 0; layer < map.layers; layer++) {
      for (let head = 0; head < map.heads; head++) {
        const button = document.createElement("button");
        button.type = "button";
        button.title = `layer ${layer + 1}, head ${head + 1}`;
        button.setAttribute("aria-label", button.title);
        button.setAttribute("aria-pressed", String(layer === state.layer && head === state.head));
        button.append(thumbnail(map, layer, head));
        button.onclick = () => { choose({ layer, head }); byId("frame").scrollIntoView({ block: "nearest" }); };
        buttons.push(button);
      }
    }
    byId("grid").replaceChildren(...buttons);
  }

  function choose(change) {
    const redraw = "map" in change || "layer" in change || "head" in change;
    Object.assign(state, change);
    if (redraw) { drawKinds(); drawChoice(); drawGrid(); }
    drawTokens();
    drawMap();
  }

  function chooseRow(row) {  // the buttons are made anew, so the focus goes along
    choose({ row });
    byId("rows").children[row].focus({ preventScroll: true });
  }

  byId("layer").onchange = (event) => choose({ layer: Number(event.target.value) });
  byId("head").onchange = (event) => choose({ head: Number(event.target.value) });
  byId("rows").onkeydown = (event) => {
    const step = { ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1 }[event.key];
    if (!step) return;
    event.preventDefault();
    chooseRow((state.row + step + current().rows.length) % current().rows.length);
  };
  byId("map").onclick = (event) => {
    const row = Math.floor((event.offsetY - TOP) / cell);
    if (row >= 0 && row < current().rows.length) choose({ row });
  };
  byId("map").onmousemove = (event) => {
    const map = current(), row = Math.floor((event.offsetY - TOP) / cell), column = Math.floor((event.offsetX - LEFT) / cell);
    const inside = row >= 0 && row < map.rows.length && column >= 0 && column < map.columns.length;
    const weight = inside ? weights(map, state.layer, state.head, row)[column] : 0;
    byId("map").title = inside ? `${map.rows[row]} → ${map.columns[column]}: ${percent(weight)}` : "";
  };
  window.addEventListener("resize", drawMap);
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => choose({ map: state.map }));
  byId("look").hidden = false;
  const first = maps.findIndex((map) => map.name === "cross");
  choose(start(Math.max(0, first)));
})();
