// The controls of exact coefficients: sliders that snap to the best one, and a weight a task.
const lines = exactLines(model);
const solver = weighedSolver(data, model);
const [LEAST, MOST] = [-1, 2]; // of the sliders
const kindOf = (found) => (found.normalised ? "normalised accuracy" : "accuracy");
let known = { key: null, found: null }; // the best coefficient of the slider that moves

function exactBest(key) { // of one slider, with the others as they are; of all from 0
  const careful = find("#explorer-careful").checked;
  const start = coefs.map((coef, t) => (key === ALL || String(t) === key ? 0 : coef));
  const name = JSON.stringify([key, careful, start]);
  if (known.key !== name) {
    const direction = coefs.map((_, t) => (key === ALL || String(t) === key ? 1 : 0));
    known = { key: name, found: lines.best(start, direction, careful, LEAST, MOST) };
  }
  return known.found;
}

// the value of a slider, or the exact best coefficient where that is the nearest place to go
function snapped(input) {
  const value = Number.parseFloat(input.value);
  const key = input.dataset.vector;
  if (input.type !== "range" || !find("#explorer-snap").checked) return value;
  const found = exactBest(key);
  if (found === null) return value;
  const name = key === ALL ? "all coefficients together" : data.vectors[Number(key)];
  const range = `${found.low.toFixed(4)} to ${found.high.toFixed(4)}`;
  find("#explorer-status").textContent = `Exact best of ${name}${key === ALL ? "" : ", others as they are"}: `
    + `${found.coef} (${range}), mean ${kindOf(found)} ${percent(found.value)} % on the ${found.kind} examples.`;
  return Math.abs(value - found.coef) <= model.STEP / 2 ? found.coef : value;
}

function common(careful) { // exact where there are lines, else the best of the grid
  const found = lines.best(coefs.map(() => 0), coefs.map(() => 1), careful, 0, 1);
  return found === null ? model.bestCommon(careful) : { ...found, coefs: coefs.map(() => found.coef) };
}

function weightOf(split) {
  const line = element("div", "tx-slider");
  const label = element("label", "", split.task === control ? `${split.task} (control)` : split.task);
  const input = element("input");
  const shown = element("output");
  Object.assign(input, { type: "range", id: `explorer-weight-${split.task}`, min: "0", max: "1", step: "0.05" });
  input.dataset.split = split.name;
  label.htmlFor = input.id;
  input.addEventListener("input", () => { shown.textContent = input.value; });
  input.addEventListener("change", weigh);
  line.append(label, input, shown);
  return line;
}

const weightInputs = () => [...root.querySelectorAll("[data-split]")];

function equalWeights() {
  for (const input of weightInputs()) {
    input.value = data.control !== null && input.dataset.split === `${data.control}Val` ? "0" : "0.5";
    input.dispatchEvent(new Event("input"));
  }
}

function weigh() {
  const status = find("#explorer-status");
  status.textContent = "Solving \u2026";
  setTimeout(() => { // after the text is shown
    const found = solver.solve(Object.fromEntries(weightInputs().map((one) => [one.dataset.split, Number(one.value)])));
    if (found === null) { status.textContent = "All weights are 0: give one task a weight."; return; }
    moveTo(found.coefs.map((coef) => Number(coef.toFixed(4))));
    status.textContent = `Solved for these weights: weighted mean cross-entropy ${found.value.toFixed(4)} on the validation examples.`;
  }, 20);
}

function startChooser() {
  find("#explorer-snap-label").hidden = !lines.available();
  find("#explorer-chooser").hidden = !solver.available();
  if (!solver.available()) return;
  find("#explorer-weights").append(...model.splitsOf("validation").map(weightOf));
  equalWeights();
  find("#explorer-solve").addEventListener("click", weigh);
  find("#explorer-equal").addEventListener("click", equalWeights);
}
