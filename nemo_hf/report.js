"use strict";
// Everything that comes from the data is set as text, never as markup.
const data = JSON.parse(document.getElementById("data").textContent);
const owner = data.grouped_by === null ? "labels" : "groups";
const one = owner.slice(0, -1);
const names = data[owner].map(String);
const evaluation = data.evaluation || null;
const byId = (id) => document.getElementById(id);
const percent = (value, digits = 1) =>
  value === null || value === undefined ? "–" : `${(100 * value).toFixed(digits)} %`;
const count = (value) => value.toLocaleString("en-US");
const picked = new Set();
const positions = new Map(names.map((name, i) => [name, i]));

function element(parent, tag, text, attributes = {}) {
  const node = document.createElement(tag);
  if (text !== undefined) node.textContent = text;
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
  parent.append(node);
  return node;
}

function shape(parent, tag, attributes, text) {
  const node = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
  if (text !== undefined) node.textContent = text;
  parent.append(node);
  return node;
}

const shorten = (text, most) =>
  Array.from(text).length > most
    ? `${Array.from(text)
        .slice(0, most - 1)
        .join("")}…`
    : text;

// ---- Modules ----

const modules = data.modules.map((module) => {
  const members = module[owner].map((name) => positions.get(String(name)));
  const all = members.length === names.length && names.length > 2;
  return { ...module, members, kind: all ? "all" : members.length === 1 ? "one" : "two", key: keyOf(members) };
});
const known = new Map(modules.map((module) => [module.key, module]));
const bits = data.bits.map((text) => Uint8Array.from(atob(text), (character) => character.charCodeAt(0)));
const ones = Uint8Array.from({ length: 256 }, (_, byte) => byte.toString(2).replaceAll("0", "").length);

function keyOf(members) {
  return [...members].sort((a, b) => a - b).join();
}

/** Neurons that the union of some masks keeps, layer by layer: exact. */
function keptByUnion(members) {
  const union = new Uint8Array(bits[0].length);
  for (const member of members) bits[member].forEach((byte, i) => (union[i] |= byte));
  let start = 0;
  return data.layers.map((layer) => {
    const end = start + Math.ceil(layer.neurons / 8);
    let kept = 0;
    for (; start < end; start++) kept += ones[union[start]];
    return kept;
  });
}

const sizes = [...data.anchors, ...modules.map((module) => [module.neurons, module.parameters])].sort(
  (a, b) => a[0] - b[0],
);

/** Parameters between those of known modules with fewer and with more neurons; never fewer than a part of it has. */
function estimatedParameters(members, neurons) {
  const parts = modules.filter((module) => module.members.every((member) => members.includes(member)));
  const least = Math.max(...parts.map((module) => module.parameters));
  const above = sizes.findIndex(([size]) => size >= neurons);
  if (above <= 0) return least;
  const [[low, fewer], [high, more]] = [sizes[above - 1], sizes[above]];
  return Math.max(least, Math.round(fewer + ((more - fewer) * (neurons - low)) / (high - low)));
}

/** Between what modules of pairs and the module of all labels say, by the number of labels; exact at both ends. */
function estimatedAccuracy(members) {
  const least = owner === "labels" ? 2 : 1;
  if (!evaluation || members.length < least) return null;
  const share = names.length > least ? (members.length - least) / (names.length - least) : 1;
  let right = 0;
  let total = 0;
  for (const member of members) {
    if (!evaluation.samples[member]) continue;
    const [few, all] = owner === "labels" ? recalls(member, members) : groupAccuracies(member);
    right += evaluation.samples[member] * (few === null ? all : (1 - share) * few + share * all);
    total += evaluation.samples[member];
  }
  return total ? right / total : null;
}

/** Share of a label's samples that stay right: if the confusions in pairs are independent, and in the module of all. */
function recalls(member, members) {
  const others = members.filter((other) => other !== member);
  const all = 1 - others.reduce((sum, other) => sum + evaluation.errors_all[member][other], 0);
  if (!evaluation.errors_pairs) return [null, all];
  return [others.reduce((product, other) => product * (1 - evaluation.errors_pairs[member][other]), 1), all];
}

function groupAccuracies(member) {
  return [evaluation.accuracy_alone[member], evaluation.accuracy_all[member]];
}

// ---- Head of the page ----

function showSummary() {
  const samples = data.num_samples.reduce((sum, value) => sum + value, 0);
  const by = owner === "labels" ? "label" : `group (column “${data.grouped_by}”)`;
  byId("summary").textContent =
    `${data.model} · masks by ${by} · a neuron is kept if at least ${percent(data.threshold, 0)} of the samples open it · ` +
    `counted over ${count(samples)} samples`;
  const facts = [
    [owner, count(names.length)],
    ["parameters, uncut", count(data.parameters)],
    ["maskable neurons", count(data.neurons)],
    [`neurons kept for one ${one}`, percent(data.neuron_retention)],
    ["cohesion", data.cohesion === null ? "–" : data.cohesion.toFixed(2)],
    ["coupling", data.coupling === null ? "–" : data.coupling.toFixed(2)],
  ];
  if (evaluation) facts.push(["accuracy, uncut", percent(evaluation.modular_accuracy)]);
  for (const [name, value] of facts) {
    const fact = element(byId("facts"), "div");
    element(fact, "dt", name);
    element(fact, "dd", value);
  }
}

// ---- Picking ----

function showPicks() {
  byId("pick-title").textContent = `Pick ${owner}`;
  byId("picks").querySelector("legend").textContent = `${owner} of the module`;
  names.forEach((name, i) => {
    const label = element(byId("picks"), "label", undefined, { title: name });
    const box = element(label, "input", undefined, { type: "checkbox", value: i });
    element(label, "span", name, { dir: "auto" });
    box.addEventListener("change", () => pick([i], box.checked));
  });
  const shown = () => [...byId("picks").querySelectorAll("label:not([hidden]) input")].map((box) => Number(box.value));
  byId("pick-all").addEventListener("click", () => pick(shown(), true));
  byId("pick-none").addEventListener("click", () => pick([...picked], false));
  byId("pick-filter").addEventListener("input", (event) => {
    const wanted = event.target.value.toLowerCase();
    for (const label of byId("picks").querySelectorAll("label"))
      label.hidden = !label.title.toLowerCase().includes(wanted);
  });
}

function pick(members, on) {
  for (const member of members) on ? picked.add(member) : picked.delete(member);
  for (const box of byId("picks").querySelectorAll("input")) box.checked = picked.has(Number(box.value));
  showUnion();
}

function result(title, value, note) {
  const box = element(byId("union"), "div", undefined, { class: "result" });
  element(box, "span", title);
  element(box, "b", value);
  element(box, "small", note);
}

function showUnion() {
  const members = [...picked].sort((a, b) => a - b);
  byId("union").replaceChildren();
  byId("command").hidden = !members.length;
  const kept = keptByUnion(members.length ? members : names.map((_, i) => i));
  byId("bars-title").textContent = `Neurons kept per layer by the module of ${
    members.length ? `the ${members.length} picked` : `all ${owner}: none picked`
  } (% of the layer)`;
  drawBars(kept);
  if (!members.length) {
    element(byId("union"), "p", `Nothing picked. Tick ${owner} to see the size of their module.`);
    return;
  }
  const neurons = kept.reduce((sum, value) => sum + value, 0);
  const module = known.get(keyOf(members));
  result(
    "neurons kept",
    percent(neurons / data.neurons),
    `${count(neurons)} of ${count(data.neurons)}: exact, union of the masks`,
  );
  const parameters = module ? module.parameters : estimatedParameters(members, neurons);
  const how = module ? "exact" : "estimate, from modules with fewer and with more neurons";
  result(
    "parameters kept",
    `${module ? "" : "≈ "}${percent(parameters / data.parameters)}`,
    `${count(parameters)}: ${how}`,
  );
  showAccuracy(members, module);
  const quoted = members.map((member) => `'${names[member].replaceAll("'", "'\\''")}'`).join(" ");
  byId("command").textContent =
    `nemo-hf extract '${data.checkpoint.replaceAll("'", "'\\''")}' --${owner} ${quoted} --output module`;
  byId("command").textContent += data.threshold === 0.9 ? "" : ` --threshold ${data.threshold}`;
}

function showAccuracy(members, module) {
  if (!evaluation) return;
  if (module && module.accuracy !== undefined && module.accuracy !== null) {
    result("accuracy", percent(module.accuracy), `measured on ${count(module.num_eval_samples)} samples`);
  } else if (owner === "labels" && members.length === 1) {
    result("accuracy", "–", "a module of one label has nothing to choose between");
  } else {
    const few = owner === "labels" ? "modules of pairs" : "modules of one group";
    const measured = owner === "groups" || evaluation.errors_pairs;
    const basis = owner === "labels" ? "confusions measured in" : "accuracies measured in";
    const estimate = estimatedAccuracy(members);
    result(
      "expected accuracy",
      estimate === null ? "–" : `≈ ${percent(estimate)}`,
      `estimate, not a measurement: from ${basis} ${measured ? `${few} and in ` : ""}the module of all ${owner}`,
    );
  }
}

// ---- Table ----

const columns = [
  { title: owner, value: (module) => module.members.map((member) => names[member]).join(", "), text: true },
  { title: "neurons kept", value: (module) => module.neuron_retention, show: percent },
  { title: "parameters kept", value: (module) => module.parameter_retention, show: percent },
  { title: "parameters", value: (module) => module.parameters, show: count },
];
if (evaluation) columns.push({ title: "accuracy", value: (module) => module.accuracy ?? null, show: percent });
if (evaluation && owner === "labels") {
  columns.push({ title: "recall in all", value: (module) => module.recall ?? null, show: percent });
}
const table = { column: 0, ascending: true, rows: 250, sorted: false };

function showTable() {
  const kinds = { every: "every module", one: `one ${one}`, two: `two ${owner}`, all: `all ${owner}` };
  for (const [kind, text] of Object.entries(kinds)) {
    if (kind === "every" || modules.some((module) => module.kind === kind))
      element(byId("table-kind"), "option", text, { value: kind });
  }
  const head = byId("modules").querySelector("thead tr");
  columns.forEach((column, i) => {
    const cell = element(head, "th", undefined, { scope: "col", "aria-sort": "none" });
    element(cell, "button", column.title, { type: "button" }).addEventListener("click", () => {
      table.ascending = table.sorted && table.column === i ? !table.ascending : Boolean(column.text);
      Object.assign(table, { column: i, sorted: true });
      showRows();
    });
  });
  byId("table-filter").addEventListener("input", showRows);
  byId("table-kind").addEventListener("change", showRows);
  byId("table-more").addEventListener("click", () => {
    table.rows += 500;
    showRows();
  });
  byId("table-note").textContent =
    (modules.some((module) => module.kind === "two")
      ? ""
      : `Modules of two ${owner} are left out because there are many ${owner}. `) +
    (evaluation
      ? owner === "labels"
        ? "Accuracy: of the module's own samples; a module of one label has nothing to choose between. " +
          "Recall in all: share of a label's samples that the module of all labels recognises."
        : "Accuracy: of the samples of the module's groups."
      : "No accuracies: the report was made without a dataset.");
  showRows();
}

function sortedModules() {
  const wanted = byId("table-filter").value.toLowerCase();
  const kind = byId("table-kind").value;
  const rows = modules.filter(
    (module) =>
      (kind === "every" || module.kind === kind) &&
      (!wanted || columns[0].value(module).toLowerCase().includes(wanted)),
  );
  if (!table.sorted) return rows;
  const { value, text } = columns[table.column];
  const sign = table.ascending ? 1 : -1;
  return rows.sort((a, b) => {
    const [left, right] = [value(a), value(b)];
    if (left === null || right === null) return (left === null) - (right === null); // unknown ones last, either way
    return sign * (text ? left.localeCompare(right, undefined, { numeric: true }) : left - right);
  });
}

function showRows() {
  const rows = sortedModules();
  const body = byId("modules").querySelector("tbody");
  body.replaceChildren();
  for (const module of rows.slice(0, table.rows)) {
    const line = element(body, "tr");
    const first = element(line, "td", module.kind === "all" ? `all ${names.length} ${owner}` : undefined);
    if (module.kind !== "all")
      for (const member of module.members) element(first, "bdi", shorten(names[member], 60), { title: names[member] });
    for (const column of columns.slice(1)) {
      const value = column.value(module);
      element(line, "td", value === null ? "–" : column.show(value));
    }
  }
  byId("modules")
    .querySelectorAll("th")
    .forEach((cell, i) => {
      const active = table.sorted && table.column === i;
      cell.setAttribute("aria-sort", active ? (table.ascending ? "ascending" : "descending") : "none");
      cell.firstChild.textContent = columns[i].title + (active ? (table.ascending ? " ▲" : " ▼") : "");
    });
  byId("table-more").hidden = rows.length <= table.rows;
  byId("table-count").textContent = `${count(Math.min(rows.length, table.rows))} of ${count(rows.length)} modules`;
}
