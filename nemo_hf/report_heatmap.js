// ---- Heat maps ----

const cividis = [
  [0, 34, 78],
  [33, 54, 107],
  [75, 84, 108],
  [108, 110, 114],
  [138, 134, 120],
  [170, 160, 115],
  [203, 187, 105],
  [233, 213, 85],
  [254, 232, 56],
];

function heatColour(share) {
  const place = Math.max(0, Math.min(1, share)) * (cividis.length - 1);
  const index = Math.min(cividis.length - 2, Math.floor(place));
  return `rgb(${cividis[index].map((low, i) => Math.round(low + (cividis[index + 1][i] - low) * (place - index))).join()})`;
}

/**
 * A heat map on a canvas. Mouse and arrow keys move over its cells; a line above says what the cell is.
 * `map`: rows, columns (names), values, top (value of the last colour), square, title, describe(y, x), choose(y, x).
 */
function heatMap(parent, map) {
  const readout = element(parent, "p", "Point at a cell.", { class: "readout stuck", "aria-live": "polite" });
  const box = element(parent, "div", undefined, { class: "heat" });
  const canvas = element(box, "canvas", undefined, {
    tabindex: 0,
    role: "application",
    "aria-roledescription": "heat map",
    "aria-label": map.title,
  });
  const scale = element(parent, "div", undefined, { class: "scale" });
  element(scale, "span", map.low);
  const stops = Array.from({ length: 9 }, (_, i) => heatColour(i / 8)).join();
  element(scale, "i").style.background = `linear-gradient(to right, ${stops})`;
  element(scale, "span", map.high);
  const state = { x: -1, y: -1 };
  const layout = heatLayout(map);
  const draw = () => drawHeat(canvas, map, layout, state);
  const move = (y, x) => {
    if (y < 0 || x < 0 || y >= map.rows.length || x >= map.columns.length || (y === state.y && x === state.x)) return;
    Object.assign(state, { x, y });
    readout.textContent = map.describe(y, x);
    draw();
  };
  const cellAt = (event) => [
    Math.floor((event.offsetY - layout.top) / layout.height),
    Math.floor((event.offsetX - layout.left) / layout.width),
  ];
  canvas.addEventListener("mousemove", (event) => move(...cellAt(event)));
  canvas.addEventListener("focus", () => move(Math.max(0, state.y), Math.max(0, state.x)));
  canvas.addEventListener("click", () => map.choose && state.y >= 0 && map.choose(state.y, state.x));
  canvas.addEventListener("keydown", (event) => {
    const steps = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] }[event.key];
    if (steps) {
      event.preventDefault();
      move(state.y + steps[0], state.x + steps[1]);
    } else if (event.key === "Enter" && map.choose && state.y >= 0) {
      map.choose(state.y, state.x);
    }
  });
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", draw);
  draw();
}

function heatLayout(map) {
  const width = Math.max(13, Math.min(map.square ? 46 : 30, (map.square ? 640 : 900) / map.columns.length));
  const height = map.square ? width : Math.max(13, Math.min(26, 520 / map.rows.length));
  const measure = document.createElement("canvas").getContext("2d");
  measure.font = "12px system-ui, sans-serif";
  const longest = (texts) =>
    Math.ceil(Math.max(...texts.map((text) => measure.measureText(shorten(text, 26)).width))) + 10;
  const font = `${Math.min(12, Math.floor(height * 0.85))}px system-ui, sans-serif`;
  return { width, height, left: longest(map.rows), top: longest(map.columns), font };
}

function drawHeat(canvas, map, layout, state) {
  const [width, height] = [
    layout.left + layout.width * map.columns.length + 4,
    layout.top + layout.height * map.rows.length + 4,
  ];
  const ratio = window.devicePixelRatio || 1;
  Object.assign(canvas, { width: width * ratio, height: height * ratio });
  Object.assign(canvas.style, { width: `${width}px`, height: `${height}px` });
  const context = canvas.getContext("2d");
  context.scale(ratio, ratio);
  const style = getComputedStyle(document.documentElement);
  context.font = layout.font;
  context.fillStyle = style.getPropertyValue("--text");
  context.textBaseline = "middle";
  context.textAlign = "right";
  map.rows.forEach((name, y) =>
    context.fillText(shorten(name, 26), layout.left - 6, layout.top + layout.height * (y + 0.5)),
  );
  context.textAlign = "left";
  map.columns.forEach((name, x) => {
    context.save();
    context.translate(layout.left + layout.width * (x + 0.5), layout.top - 6);
    context.rotate(-Math.PI / 2);
    context.fillText(shorten(name, 26), 0, 0);
    context.restore();
  });
  const gap = Math.min(layout.width, layout.height) > 18 ? 1 : 0;
  map.values.forEach((row, y) =>
    row.forEach((value, x) => {
      context.fillStyle = heatColour(value / map.top);
      context.fillRect(
        layout.left + layout.width * x,
        layout.top + layout.height * y,
        layout.width - gap,
        layout.height - gap,
      );
    }),
  );
  if (state.y < 0) return;
  context.lineWidth = 3;
  context.strokeStyle = style.getPropertyValue("--c1");
  context.strokeRect(
    layout.left + layout.width * state.x - gap,
    layout.top + layout.height * state.y - gap,
    layout.width + gap,
    layout.height + gap,
  );
}

/** The order in which the next one is always the most similar that is left. */
function similarOrder() {
  const order = [0];
  const left = new Set(names.keys());
  for (left.delete(0); left.size; left.delete(order.at(-1))) {
    const row = data.overlap[order.at(-1)];
    order.push([...left].reduce((best, i) => (row[i] > row[best] ? i : best)));
  }
  return order;
}

function showOverlap(sorted) {
  const order = sorted ? similarOrder() : [...names.keys()];
  const ordered = order.map((i) => names[i]);
  byId("overlap").replaceChildren();
  heatMap(byId("overlap"), {
    rows: ordered,
    columns: ordered,
    values: order.map((y) => order.map((x) => data.overlap[y][x])),
    top: 1,
    square: true,
    title: `Overlap between ${owner}`,
    low: "0: nothing shared",
    high: "1: the same neurons",
    describe: (y, x) => `${ordered[y]} and ${ordered[x]}: overlap ${data.overlap[order[y]][order[x]].toFixed(2)}`,
    choose: (y, x) => {
      pick([...picked], false);
      pick([order[y], order[x]], true);
    },
  });
}

function showHeatMaps() {
  byId("overlap-title").textContent = `Neurons that ${owner} share`;
  byId("layers-title").textContent = `Neurons that each ${one} keeps, layer by layer`;
  byId("overlap-sorted").addEventListener("change", (event) => showOverlap(event.target.checked));
  showOverlap(false);
  const shares = data.kept_per_layer.map((row) => row.map((kept, i) => kept / data.layers[i].neurons));
  const top = Math.max(...shares.flat());
  heatMap(byId("layers"), {
    rows: names,
    columns: layerNames,
    values: shares,
    top,
    title: `Neurons kept by ${one} and layer`,
    low: "0 %",
    high: percent(top, 0),
    describe: (y, x) =>
      `${names[y]}, ${data.layers[x].name}: ${count(data.kept_per_layer[y][x])} of ${count(data.layers[x].neurons)} neurons (${percent(shares[y][x])})`,
  });
}

showSummary();
showPicks();
showTable();
showScatter();
showHeatMaps();
showTraining();
showUnion();
