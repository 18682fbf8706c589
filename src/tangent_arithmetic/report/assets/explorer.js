// The sliders, the table and the address of the page; tangentModel computes, the chooser snaps.
const here = document.currentScript; // null where a notebook runs the script
const root = (here && here.closest(".tx")) || document.getElementById("explorer");
const data = JSON.parse(root.querySelector("#explorer-data").textContent);
const model = tangentModel(data);
const { mean } = model;
const ALL = "all"; // the slider that moves all coefficients
const coefs = new Array(data.vectors.length).fill(0);
const find = (selector) => root.querySelector(selector);
const chosenSplit = () => find("input[name=explorer-split]:checked").value;
const control = data.splits.some((one) => one.task === data.control) ? data.control : null;

// one decimal, a tie to the even digit as in Python: a tie ends in .25 or .75
function percent(value) {
  const scaled = 100 * value;
  return ((4 * scaled) % 4 === 1 ? scaled - 0.05 : scaled).toFixed(1);
}
const signed = (value) => (value >= 0 ? "+" : "\u2212") + percent(Math.abs(value));

// {name: {accuracy, error, zeroshot, chance, normalised}} of the chosen split at the sliders' coefficients
function state() {
  const results = {};
  for (const split of model.splitsOf(chosenSplit())) {
    const value = model.accuracy(split, coefs);
    const single = data.singles[split.name];
    results[split.name] = {
      task: split.task, accuracy: value, error: model.error(split, value), zeroshot: split.zeroshot,
      chance: split.chance, normalised: single ? value / single : null,
      images: split.images, of: split.of, multilabel: Boolean(split.multilabel),
    };
  }
  return results;
}

function element(tag, className, text = "") {
  const made = document.createElement(tag);
  if (className) made.className = className;
  made.textContent = text;
  return made;
}

function barOf(one) {
  const bar = element("div", "tx-bar");
  const filled = element("i");
  filled.style.width = `${100 * one.accuracy}%`;
  bar.append(filled);
  for (const [kind, name] of [["chance", "chance"], ["zeroshot", "zero-shot"]]) {
    const mark = element("b", `tx-${kind}`);
    mark.style.left = `${100 * one[kind]}%`;
    mark.title = `${name} ${percent(one[kind])} %`;
    bar.append(mark);
  }
  return bar;
}

function rowOf(one) {
  const row = element("tr", one.task === control ? "tx-control" : "");
  const name = element("th", "", one.task === control ? `${one.task} (control)` : one.task);
  name.scope = "row";
  if (one.multilabel) name.title = "several labels an example: mean average precision";
  const bar = element("td", "tx-cell-bar");
  bar.append(barOf(one));
  const error = one.error === null ? " mAP" : ` \u00b1 ${percent(one.error)}`;
  const accuracy = element("td", "", percent(one.accuracy));
  accuracy.append(element("span", "tx-error", error));
  const pictures = one.images === one.of ? String(one.images) : `${one.images} of ${one.of}`;
  const normalised = one.normalised === null ? "\u2013" : percent(one.normalised);
  const cells = [signed(one.accuracy - one.zeroshot), normalised, pictures];
  row.append(name, bar, accuracy, ...cells.map((text) => element("td", "", text)));
  return row;
}

function show() {
  const rows = Object.values(state());
  find("#explorer-rows").replaceChildren(...rows.map(rowOf));
  summarise(rows.filter((one) => one.task !== control));
  warn(rows.find((one) => one.task === control));
  describe(rows);
}

function summarise(tasks) {
  if (tasks.length === 0) return;
  const change = mean(tasks.map((one) => one.accuracy - one.zeroshot));
  const many = tasks.length > 1 ? `Mean of ${tasks.length} tasks` : tasks[0].task;
  const parts = [`${many}: `, element("b", "", `${percent(mean(tasks.map((one) => one.accuracy)))} %`)];
  let rest = ` (${signed(change)} from zero-shot)`;
  if (tasks.every((one) => one.normalised !== null)) {
    rest += `, normalised ${percent(mean(tasks.map((one) => one.normalised)))} %`;
  }
  find("#explorer-summary").replaceChildren(...parts, `${rest}.`);
}

// where the control set loses a point or more
function warn(one) {
  const lost = one ? one.zeroshot - one.accuracy : 0;
  const warning = find("#explorer-warning");
  warning.hidden = lost < 0.01;
  if (!warning.hidden) {
    const kept = percent(one.accuracy / one.zeroshot);
    warning.textContent = `The control set ${one.task} loses ${percent(lost)} points from zero-shot (keeps ${kept} %).`;
  }
}

function describe(rows) {
  const images = rows.reduce((sum, one) => sum + one.images, 0);
  const all = rows.reduce((sum, one) => sum + one.of, 0);
  const most = Math.max(...rows.map((one) => one.images));
  find("#explorer-note").textContent = (images < all
    ? `${images} of ${all} examples: of each split at most ${most}, each class by its share; --sample=${most} evaluates on the same. `
    : `All ${images} examples. `) + "After \u00b1 the binomial standard error. Change is from zero-shot; normalised is by the fine-tuned model of the task alone.";
}

function fill(key, value, except) {
  for (const input of root.querySelectorAll("[data-vector]")) {
    if (input.dataset.vector !== String(key)) continue;
    if (input !== except) input.value = value === null ? "" : String(value);
    if (input.type === "range") input.setAttribute("aria-valuetext", value === null ? "mixed" : String(value));
  }
}

function set(index, value, except) {
  coefs[index] = value;
  fill(index, value, except);
  fillAll(except);
}

function setAll(values, except) {
  values.forEach((value, index) => { coefs[index] = value; fill(index, value, except); });
  fillAll(except);
}

function fillAll(except) { // the slider of all: their coefficient, or the mean of mixed ones
  const same = coefs.every((coef) => coef === coefs[0]);
  fill(ALL, same ? coefs[0] : null, except);
  const slider = find(`#explorer-slider-${ALL}`);
  if (!same && slider !== except) slider.value = String(mean(coefs));
}

// --- the address: #explorer=NAME:COEF,...&pictures=test

function address() {
  const parts = data.vectors.map((name, i) => [encodeURIComponent(name), coefs[i]]);
  const moved = parts.filter(([, coef]) => coef !== 0).map(([name, coef]) => `${name}:${coef}`);
  return `#explorer=${moved.join(",")}${chosenSplit() === "test" ? "&pictures=test" : ""}`;
}

function remember() { // a step that "back" undoes
  if (address() === window.location.hash) return;
  try {
    window.history.pushState(null, "", address());
  } catch {
    window.location.hash = address(); // where a frame has no history of its own
  }
}

function restore() {
  const match = /^#explorer=([^&]*)(&pictures=(\w+))?$/.exec(window.location.hash);
  if (match === null) return false;
  const values = new Array(coefs.length).fill(0);
  for (const part of match[1].split(",").filter(Boolean)) {
    const [, name, coef] = /^(.*):(.*)$/.exec(part) || [];
    let index = -1;
    try { index = data.vectors.indexOf(decodeURIComponent(name)); } catch { /* not one of ours */ }
    if (index >= 0 && Number.isFinite(Number(coef))) values[index] = Number(coef);
  }
  const radio = find(`input[name=explorer-split][value=${match[3] === "test" ? "test" : "validation"}]`);
  if (!radio.disabled) radio.checked = true;
  find("#explorer-status").textContent = ""; // it is about another position
  setAll(values, null);
  const names = Object.keys(data.presets);
  find("#explorer-preset").value = names.find((name) => data.presets[name].every((v, i) => v === values[i])) || "";
  show();
  return true;
}

// --- controls

let asked = false;
function later() { // one computation a frame, however fast a slider moves
  if (asked) return;
  asked = true;
  requestAnimationFrame(() => { asked = false; show(); });
}

function moved(event) {
  find("#explorer-status").textContent = "";
  const value = snapped(event.target);
  if (!Number.isFinite(value)) return; // half typed
  const key = event.target.dataset.vector;
  if (key === ALL) setAll(coefs.map(() => value), event.target);
  else set(Number(key), value, event.target);
  find("#explorer-preset").value = "";
  later();
}

function settled(event) { // what was half typed is the coefficient again
  const key = event.target.dataset.vector;
  if (event.target.value !== "") remember();
  else if (key === ALL) fillAll(null);
  else fill(key, coefs[Number(key)], null);
}

function sliderOf(name, key) {
  const line = element("div", key === ALL ? "tx-slider tx-all" : "tx-slider");
  const label = element("label", "", name);
  label.htmlFor = `explorer-slider-${key}`;
  const track = element("span", "tx-track");
  const range = element("input");
  Object.assign(range, { type: "range", id: label.htmlFor, min: "-1", max: "2", step: String(model.STEP) });
  const number = element("input");
  Object.assign(number, { type: "number", step: String(model.STEP) });
  number.setAttribute("aria-label", `coefficient of ${key === ALL ? "all task vectors" : name}`);
  for (const input of [range, number]) {
    input.dataset.vector = String(key);
    input.value = "0";
    input.addEventListener("input", moved);
    input.addEventListener("change", settled);
  }
  track.append(range);
  line.append(label, track, number);
  return line;
}

function moveTo(values, preset = "") {
  find("#explorer-status").textContent = "";
  setAll(values, null);
  find("#explorer-preset").value = preset;
  show();
  remember();
}
const choose = (name) => moveTo(data.presets[name], name);

function search(solve, what) {
  find("#explorer-status").textContent = "Searching \u2026";
  setTimeout(() => { // after the text is shown
    const found = solve(find("#explorer-careful").checked);
    moveTo(found.coefs);
    const kind = found.normalised ? "normalised accuracy" : "accuracy";
    find("#explorer-status").textContent = `${what}: mean ${kind} ${percent(found.value)} % on the ${found.kind} examples.`;
  }, 20);
}
