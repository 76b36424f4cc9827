// ---- Bars ----

const layerNames = (() => {
  const split = data.layers.map((layer) => layer.name.split("."));
  let common = 0;
  while (split.length > 1 && split.every((parts) => parts.length > common + 1 && parts[common] === split[0][common]))
    common += 1;
  return split.map((parts) => parts.slice(common).join("."));
})();

function drawBars(kept) {
  byId("bars").replaceChildren();
  const [step, height, left] = [Math.max(16, Math.min(40, 960 / kept.length)), 110, 44];
  const room = 7 * Math.min(26, Math.max(...layerNames.map((name) => name.length))) + 8;
  const svg = shape(byId("bars"), "svg", {
    width: left + step * kept.length + 8,
    height: height + room + 14,
    role: "img",
    "aria-label":
      `Bars of neurons kept in ${kept.length} layers, ${percent(Math.min(...kept.map((value, i) => value / data.layers[i].neurons)))} ` +
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
    shape(
      group,
      "title",
      {},
      `${data.layers[i].name}: ${count(value)} of ${count(data.layers[i].neurons)} neurons (${percent(share)})`,
    );
    shape(group, "rect", { x, y: 8, width: step * 0.7, height, class: "bar-rest" });
    shape(group, "rect", { x, y: 8 + height * (1 - share), width: step * 0.7, height: height * share, class: "bar" });
    const [textX, textY] = [x + step * 0.35 + 4, height + 14];
    shape(
      group,
      "text",
      { x: textX, y: textY, "text-anchor": "end", transform: `rotate(-90 ${textX} ${textY})` },
      shorten(layerNames[i], 26),
    );
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
    return Array.from({ length: 20 }, (_, i) => (Math.ceil(low / step - 1e-9) + i) * step).filter(
      (value) => value <= high + 1e-9,
    );
  };
  const label = (value) => String(Number(value.toPrecision(6)));
  for (const value of ticks(y)) {
    shape(svg, "line", { x1: left, x2: left + width, y1: scaleY(value), y2: scaleY(value), class: "grid" });
    shape(svg, "text", { x: left - 6, y: scaleY(value) + 4, "text-anchor": "end" }, label(value));
  }
  for (const value of ticks(x))
    shape(svg, "text", { x: scaleX(value), y: top + height + 18, "text-anchor": "middle" }, label(value));
  shape(svg, "line", { x1: left, x2: left + width, y1: top + height, y2: top + height, class: "axis" });
  shape(svg, "text", { x: left + width / 2, y: top + height + 38, "text-anchor": "middle" }, texts.x);
  const [titleX, titleY] = [14, top + height / 2];
  shape(
    svg,
    "text",
    { x: titleX, y: titleY, "text-anchor": "middle", transform: `rotate(-90 ${titleX} ${titleY})` },
    texts.y,
  );
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
  if (kind === 1)
    return shape(parent, "rect", {
      x: x - size,
      y: y - size,
      width: 2 * size,
      height: 2 * size,
      style,
      class: "point",
    });
  return shape(parent, "path", {
    d: `M${x} ${y - size * 1.5}l${size * 1.5} ${size * 1.5}l${-size * 1.5} ${size * 1.5}l${-size * 1.5} ${-size * 1.5}z`,
    style,
    class: "point",
  });
}

/** Modules with an accuracy; where no pair has one, single labels with their recall in the module of all labels. */
function showScatter() {
  const hasPairs = modules.some((module) => module.kind === "two");
  const score = (module) => module.accuracy ?? (hasPairs ? null : (module.recall ?? null));
  const shown = evaluation ? modules.filter((module) => score(module) !== null) : [];
  byId("scatter-section").hidden = !shown.length;
  if (!shown.length) return;
  const kinds = {
    one: hasPairs || owner === "groups" ? `one ${one}` : "one label: its recall in the module of all labels",
    two: `two ${owner}`,
    all: `all ${owner}`,
  };
  const frame = { left: 62, top: 12, width: 640, height: 300 };
  frame.x = range(shown.map((module) => 100 * module.parameter_retention));
  frame.y = range([...shown.map((module) => 100 * score(module)), 100 * evaluation.modular_accuracy]);
  const svg = shape(byId("scatter"), "svg", {
    width: 720,
    height: 360,
    role: "group",
    "aria-label": "Accuracy and size of modules",
  });
  const [scaleX, scaleY] = axes(svg, frame, { x: "parameters kept (% of the model)", y: "accuracy (%)" });
  const level = scaleY(100 * evaluation.modular_accuracy);
  shape(svg, "line", {
    x1: frame.left,
    x2: frame.left + frame.width,
    y1: level,
    y2: level,
    class: "axis",
    "stroke-dasharray": "6 4",
  });
  const order = Object.keys(kinds);
  for (const module of shown) {
    const place = [scaleX(100 * module.parameter_retention), scaleY(100 * score(module))];
    const point = mark(svg, order.indexOf(module.kind), ...place, module.kind === "all" ? 6 : 4);
    describePoint(point, module, score(module), shown.length <= 250); // the table has them all
  }
  const entries = order
    .filter((kind) => shown.some((module) => module.kind === kind))
    .map((kind) => ({
      name: kinds[kind],
      draw: (small) => mark(small, order.indexOf(kind), 13, 6, kind === "two" ? 4 : 5),
    }));
  const dashed = (small) =>
    shape(small, "line", { x1: 0, x2: 26, y1: 6, y2: 6, class: "axis", "stroke-dasharray": "6 4" });
  legend(byId("scatter"), [...entries, { name: "model before cutting, all samples", draw: dashed }]);
}

/** What a point is, for the mouse and for the keyboard. */
function describePoint(point, module, score, inTabOrder) {
  const name = module.kind === "all" ? `all ${owner}` : columns[0].value(module);
  const text = `${name}: ${percent(score)}, ${percent(module.parameter_retention)} of the parameters`;
  shape(point, "title", {}, text);
  point.setAttribute("tabindex", inTabOrder ? 0 : -1);
  for (const event of ["mouseenter", "focus"]) {
    point.addEventListener(event, () => (byId("scatter-readout").textContent = text));
  }
}

const dashes = ["", "7 4", "2 3"];

function showTraining() {
  byId("training-section").hidden = !data.panels.length;
  for (const panel of data.panels) {
    const figure = element(byId("training"), "figure");
    const svg = shape(figure, "svg", {
      width: 380,
      height: 268,
      role: "img",
      "aria-label": `${panel.title}: ${panel.series.map((one) => one.name).join(", ")}`,
    });
    shape(svg, "text", { x: 62, y: 16, class: "title" }, panel.title);
    const points = panel.series.flatMap((series) => series.points);
    const frame = {
      left: 62,
      top: 28,
      width: 306,
      height: 190,
      x: range(points.map((point) => point[0])),
      y: range(points.map((point) => point[1])),
    };
    frame.x = [Math.min(...points.map((point) => point[0]), 0), Math.max(...points.map((point) => point[0]))];
    const [scaleX, scaleY] = axes(svg, frame, { x: panel.x_label, y: panel.y_label });
    const style = (i) => ({
      style: `stroke: var(--c${i % 6}); fill: none; stroke-width: 2`,
      "stroke-dasharray": dashes[(i + Math.floor(i / 6)) % 3],
    });
    panel.series.forEach((series, i) => {
      const line = shape(svg, "polyline", {
        points: series.points.map(([x, y]) => `${scaleX(x)},${scaleY(y)}`).join(" "),
        ...style(i),
      });
      shape(line, "title", {}, series.name);
      if (series.points.length === 1)
        shape(svg, "circle", {
          cx: scaleX(series.points[0][0]),
          cy: scaleY(series.points[0][1]),
          r: 3.5,
          style: `fill: var(--c${i % 6})`,
        });
    });
    legend(
      figure,
      panel.series.map((series, i) => ({
        name: series.name,
        draw: (small) => shape(small, "line", { x1: 0, x2: 26, y1: 6, y2: 6, ...style(i) }),
      })),
    );
  }
}
