// ---- Bars ----

const layerNames = (() => {
  const split = data.layers.map((layer) => layer.name.split("."));
  let common = 0;
  while (split.length > 1 && split.every((parts) => parts.length > common + 1 && parts[common] === split[0][common])) common += 1;
  return split.map((parts) => parts.slice(common).join("."));
})();

function drawBars(kept) {
  byId("bars").replaceChildren();
  const [step, height, left] = [Math.max(16, Math.min(40, 960 / kept.length)), 110, 44];
  const room = 7 * Math.min(26, Math.max(...layerNames.map((name) => name.length))) + 8;
  const svg = shape(byId("bars"), "svg", {
    width: left + step * kept.length + 8, height: height + room + 14, role: "img",
    "aria-label": `Bars of neurons kept in ${kept.length} layers, ${percent(Math.min(...kept.map((value, i) => value / data.layers[i].neurons)))} ` +
      `to ${percent(Math.max(...kept.map((value, i) => value / data.layers[i].neurons)))}`,
  });
  for (const share of [0, 0.5, 1]) {
    const y = 8 + height * (1 - share);
    shape(svg, "text", { x: left - 6, y: y + 4, "text-anchor": "end" }, `${100 * share}`);
    shape(svg, "line", { x1: left, x2: left + step * kept.length, y1: y, y2: y, class: "grid" });
  }
  kept.forEach((value, i) => {
    const share = value / data.layers[i].neurons;
    const x = left + step * i + step * 0.15;
    const group = shape(svg, "g", {});
    shape(group, "title", {}, `${data.layers[i].name}: ${count(value)} of ${count(data.layers[i].neurons)} neurons (${percent(share)})`);
    shape(group, "rect", { x, y: 8, width: step * 0.7, height, class: "bar-rest" });
    shape(group, "rect", { x, y: 8 + height * (1 - share), width: step * 0.7, height: height * share, class: "bar" });
    const [textX, textY] = [x + step * 0.35 + 4, height + 14];
    shape(group, "text", { x: textX, y: textY, "text-anchor": "end", transform: `rotate(-90 ${textX} ${textY})` }, shorten(layerNames[i], 26));
  });
}

// ---- Heat maps ----

const cividis = [[0, 34, 78], [33, 54, 107], [75, 84, 108], [108, 110, 114], [138, 134, 120], [170, 160, 115], [203, 187, 105], [233, 213, 85], [254, 232, 56]];

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
  const canvas = element(box, "canvas", undefined, { tabindex: 0, role: "application", "aria-roledescription": "heat map", "aria-label": map.title });
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
  const cellAt = (event) => [Math.floor((event.offsetY - layout.top) / layout.height), Math.floor((event.offsetX - layout.left) / layout.width)];
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
  const longest = (texts) => Math.ceil(Math.max(...texts.map((text) => measure.measureText(shorten(text, 26)).width))) + 10;
  const font = `${Math.min(12, Math.floor(height * 0.85))}px system-ui, sans-serif`;
  return { width, height, left: longest(map.rows), top: longest(map.columns), font };
}

function drawHeat(canvas, map, layout, state) {
  const [width, height] = [layout.left + layout.width * map.columns.length + 4, layout.top + layout.height * map.rows.length + 4];
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
  map.rows.forEach((name, y) => context.fillText(shorten(name, 26), layout.left - 6, layout.top + layout.height * (y + 0.5)));
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
      context.fillRect(layout.left + layout.width * x, layout.top + layout.height * y, layout.width - gap, layout.height - gap);
    }),
  );
  if (state.y < 0) return;
  context.lineWidth = 3;
  context.strokeStyle = style.getPropertyValue("--c1");
  context.strokeRect(layout.left + layout.width * state.x - gap, layout.top + layout.height * state.y - gap, layout.width + gap, layout.height + gap);
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
    rows: ordered, columns: ordered, values: order.map((y) => order.map((x) => data.overlap[y][x])), top: 1, square: true,
    title: `Overlap between ${owner}`, low: "0: nothing shared", high: "1: the same neurons",
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
    rows: names, columns: layerNames, values: shares, top, title: `Neurons kept by ${one} and layer`, low: "0 %", high: percent(top, 0),
    describe: (y, x) => `${names[y]}, ${data.layers[x].name}: ${count(data.kept_per_layer[y][x])} of ${count(data.layers[x].neurons)} neurons (${percent(shares[y][x])})`,
  });
}

// ---- Axes, points and lines ----

const nice = (span) => {
  const power = 10 ** Math.floor(Math.log10(span / 5 || 1));
  return [1, 2, 5, 10].map((factor) => factor * power).find((step) => span / step <= 6);
};

function axes(svg, frame, texts) {
  const { left, top, width, height, x, y } = frame;
  const scaleX = (value) => left + (width * (value - x[0])) / (x[1] - x[0] || 1);
  const scaleY = (value) => top + height * (1 - (value - y[0]) / (y[1] - y[0] || 1));
  const ticks = ([low, high]) => {
    const step = nice(high - low || 1);
    return Array.from({ length: 20 }, (_, i) => (Math.ceil(low / step - 1e-9) + i) * step).filter((value) => value <= high + 1e-9);
  };
  const label = (value) => String(Number(value.toPrecision(6)));
  for (const value of ticks(y)) {
    shape(svg, "line", { x1: left, x2: left + width, y1: scaleY(value), y2: scaleY(value), class: "grid" });
    shape(svg, "text", { x: left - 6, y: scaleY(value) + 4, "text-anchor": "end" }, label(value));
  }
  for (const value of ticks(x)) shape(svg, "text", { x: scaleX(value), y: top + height + 18, "text-anchor": "middle" }, label(value));
  shape(svg, "line", { x1: left, x2: left + width, y1: top + height, y2: top + height, class: "axis" });
  shape(svg, "text", { x: left + width / 2, y: top + height + 38, "text-anchor": "middle" }, texts.x);
  const [titleX, titleY] = [14, top + height / 2];
  shape(svg, "text", { x: titleX, y: titleY, "text-anchor": "middle", transform: `rotate(-90 ${titleX} ${titleY})` }, texts.y);
  return [scaleX, scaleY];
}

function legend(parent, entries) {
  const list = element(parent, "ul", undefined, { class: "legend" });
  entries.forEach(({ name, draw }) => {
    const item = element(list, "li");
    draw(shape(item, "svg", { width: 26, height: 12, "aria-hidden": "true" }));
    element(item, "span", name);
  });
}

const range = (values) => {
  const [low, high] = [Math.min(...values), Math.max(...values)];
  const margin = (high - low) * 0.06 || 0.05;
  return [low - margin, high + margin];
};

function mark(parent, kind, x, y, size) {
  const style = `fill: var(--c${kind})`;
  if (kind === 0) return shape(parent, "circle", { cx: x, cy: y, r: size, style, class: "point" });
  if (kind === 1) return shape(parent, "rect", { x: x - size, y: y - size, width: 2 * size, height: 2 * size, style, class: "point" });
  return shape(parent, "path", { d: `M${x} ${y - size * 1.5}l${size * 1.5} ${size * 1.5}l${-size * 1.5} ${size * 1.5}l${-size * 1.5} ${-size * 1.5}z`, style, class: "point" });
}

/** Modules with an accuracy; where no pair has one, single labels with their recall in the module of all labels. */
function showScatter() {
  const score = (module) => module.accuracy ?? (hasPairs ? null : module.recall ?? null);
  const hasPairs = modules.some((module) => module.kind === "two");
  const shown = evaluation ? modules.filter((module) => score(module) !== null) : [];
  byId("scatter-section").hidden = !shown.length;
  if (!shown.length) return;
  const kinds = { one: hasPairs || owner === "groups" ? `one ${one}` : "one label: its recall in the module of all labels", two: `two ${owner}`, all: `all ${owner}` };
  const frame = { left: 62, top: 12, width: 640, height: 300 };
  frame.x = range(shown.map((module) => 100 * module.parameter_retention));
  frame.y = range([...shown.map((module) => 100 * score(module)), 100 * evaluation.modular_accuracy]);
  const svg = shape(byId("scatter"), "svg", { width: 720, height: 360, role: "group", "aria-label": "Accuracy and size of modules" });
  const [scaleX, scaleY] = axes(svg, frame, { x: "parameters kept (% of the model)", y: "accuracy (%)" });
  const level = scaleY(100 * evaluation.modular_accuracy);
  shape(svg, "line", { x1: frame.left, x2: frame.left + frame.width, y1: level, y2: level, class: "axis", "stroke-dasharray": "6 4" });
  const order = Object.keys(kinds);
  for (const module of shown) {
    const point = mark(svg, order.indexOf(module.kind), scaleX(100 * module.parameter_retention), scaleY(100 * score(module)), module.kind === "all" ? 6 : 4);
    const text = `${module.kind === "all" ? `all ${owner}` : columns[0].value(module)}: ${percent(score(module))}, ${percent(module.parameter_retention)} of the parameters`;
    shape(point, "title", {}, text);
    point.setAttribute("tabindex", shown.length > 250 ? -1 : 0); // the table has them all
    for (const event of ["mouseenter", "focus"]) point.addEventListener(event, () => (byId("scatter-readout").textContent = text));
  }
  const entries = order.filter((kind) => shown.some((module) => module.kind === kind)).map((kind) => ({
    name: kinds[kind], draw: (small) => mark(small, order.indexOf(kind), 13, 6, kind === "two" ? 4 : 5),
  }));
  const dashes = (small) => shape(small, "line", { x1: 0, x2: 26, y1: 6, y2: 6, class: "axis", "stroke-dasharray": "6 4" });
  legend(byId("scatter"), [...entries, { name: "model before cutting, all samples", draw: dashes }]);
}

const dashes = ["", "7 4", "2 3"];

function showTraining() {
  byId("training-section").hidden = !data.panels.length;
  for (const panel of data.panels) {
    const figure = element(byId("training"), "figure");
    const svg = shape(figure, "svg", { width: 380, height: 268, role: "img", "aria-label": `${panel.title}: ${panel.series.map((one) => one.name).join(", ")}` });
    shape(svg, "text", { x: 62, y: 16, class: "title" }, panel.title);
    const points = panel.series.flatMap((series) => series.points);
    const frame = { left: 62, top: 28, width: 306, height: 190, x: range(points.map((point) => point[0])), y: range(points.map((point) => point[1])) };
    frame.x = [Math.min(...points.map((point) => point[0]), 0), Math.max(...points.map((point) => point[0]))];
    const [scaleX, scaleY] = axes(svg, frame, { x: panel.x_label, y: panel.y_label });
    const style = (i) => ({ style: `stroke: var(--c${i % 6}); fill: none; stroke-width: 2`, "stroke-dasharray": dashes[(i + Math.floor(i / 6)) % 3] });
    panel.series.forEach((series, i) => {
      const line = shape(svg, "polyline", { points: series.points.map(([x, y]) => `${scaleX(x)},${scaleY(y)}`).join(" "), ...style(i) });
      shape(line, "title", {}, series.name);
      if (series.points.length === 1) shape(svg, "circle", { cx: scaleX(series.points[0][0]), cy: scaleY(series.points[0][1]), r: 3.5, style: `fill: var(--c${i % 6})` });
    });
    legend(figure, panel.series.map((series, i) => ({ name: series.name, draw: (small) => shape(small, "line", { x1: 0, x2: 26, y1: 6, y2: 6, ...style(i) }) })));
  }
}

showSummary();
showPicks();
showTable();
showScatter();
showHeatMaps();
showTraining();
showUnion();
