// Accuracies of a linear model at the sliders' coefficients, from the logits of each picture.
// Python's counterpart is Logits.at: the same sums, in the same order, in double precision.
(() => {
  "use strict";
  const here = document.currentScript; // null where a notebook runs the script
  const root = (here && here.closest(".tx")) || document.getElementById("explorer");
  const data = JSON.parse(root.querySelector("#explorer-data").textContent);
  const numVectors = data.vectors.length;
  const coefs = new Array(numVectors).fill(0);
  const zeros = new Array(numVectors).fill(0);
  const arrays = { base: Float32Array, steps: Float32Array, labels: Int16Array, bias: Float32Array, gram: Float64Array };
  const find = (selector) => root.querySelector(selector);

  function decode(text, Kind) {
    const bytes = Uint8Array.from(atob(text), (c) => c.charCodeAt(0));
    return new Kind(bytes.buffer); // little-endian, as every browser's machine is
  }

  // a split is decoded when it is first shown
  function unpack(split) {
    if (!split.ready) {
      for (const [name, Kind] of Object.entries(arrays)) {
        split[name] = split[name] === null ? null : decode(split[name], Kind);
      }
      split.ready = true;
      split.zeroshot = accuracy(split, zeros);
    }
    return split;
  }

  // the norms of the features at these coefficients, a^T G a by picture
  function norms(split, a) {
    const side = 1 + numVectors;
    const all = [1, ...a];
    const lengths = new Float64Array(split.images);
    for (let i = 0; i < split.images; i++) {
      let square = 0;
      for (let s = 0; s < side; s++) {
        let row = 0;
        for (let t = 0; t < side; t++) row += split.gram[(i * side + s) * side + t] * all[t];
        square += all[s] * row;
      }
      lengths[i] = Math.sqrt(Math.max(square, 1e-24));
    }
    return lengths;
  }

  function accuracy(split, a) {
    const count = split.images * split.classes;
    const logits = Float64Array.from(split.base);
    a.forEach((coef, t) => {
      if (coef === 0) return;
      const start = t * count;
      for (let j = 0; j < count; j++) logits[j] += coef * split.steps[start + j];
    });
    const lengths = split.gram === null ? null : norms(split, a);
    let hits = 0;
    for (let i = 0; i < split.images; i++) {
      let best = 0;
      let highest = -Infinity;
      for (let k = 0; k < split.classes; k++) {
        let value = logits[i * split.classes + k];
        if (lengths !== null) value /= lengths[i];
        if (split.bias !== null) value += split.bias[k];
        if (value > highest) { highest = value; best = k; }
      }
      if (best === split.labels[i]) hits += 1;
    }
    return hits / split.images;
  }

  // one decimal, a tie to the even digit as in Python: a tie ends in .25 or .75
  function percent(value) {
    const scaled = 100 * value;
    return ((4 * scaled) % 4 === 1 ? scaled - 0.05 : scaled).toFixed(1);
  }
  const signed = (value) => (value >= 0 ? "+" : "\u2212") + percent(Math.abs(value));
  const mean = (values) => values.reduce((sum, value) => sum + value, 0) / values.length;

  function shown() {
    const split = find("input[name=explorer-split]:checked").value;
    return data.splits.filter((one) => one.split === split).map(unpack);
  }

  // {name: {accuracy, zeroshot, normalised}} of the chosen split at the sliders' coefficients
  function state() {
    const results = {};
    for (const split of shown()) {
      const value = accuracy(split, coefs);
      const single = data.singles[split.name];
      results[split.name] = {
        task: split.task, accuracy: value, zeroshot: split.zeroshot,
        normalised: single ? value / single : null, images: split.images, of: split.of,
      };
    }
    return results;
  }

  function cell(row, text, tag = "td") {
    const element = document.createElement(tag);
    element.textContent = text;
    row.append(element);
    return element;
  }

  function show() {
    const rows = Object.values(state());
    const body = find("#explorer-rows");
    body.replaceChildren(...rows.map((one) => {
      const row = document.createElement("tr");
      const isControl = one.task === data.control;
      cell(row, isControl ? `${one.task} (control)` : one.task, "th").scope = "row";
      const bar = document.createElement("div");
      bar.className = "tx-bar";
      const filled = document.createElement("i");
      filled.style.width = `${100 * one.accuracy}%`;
      const mark = document.createElement("b");
      mark.style.left = `${100 * one.zeroshot}%`;
      mark.title = `zero-shot ${percent(one.zeroshot)} %`;
      bar.append(filled, mark);
      cell(row, "").append(bar);
      cell(row, percent(one.accuracy));
      cell(row, signed(one.accuracy - one.zeroshot));
      cell(row, one.normalised === null ? "\u2013" : percent(one.normalised));
      cell(row, one.images === one.of ? String(one.images) : `${one.images} of ${one.of}`);
      return row;
    }));
    summarise(rows);
  }

  function summarise(rows) {
    const tasks = rows.filter((one) => one.task !== data.control);
    if (tasks.length === 0) return;
    const known = tasks.filter((one) => one.normalised !== null);
    const change = mean(tasks.map((one) => one.accuracy - one.zeroshot));
    let text = `Mean of ${tasks.length} tasks: ${percent(mean(tasks.map((one) => one.accuracy)))} % (${signed(change)} from zero-shot)`;
    if (known.length === tasks.length) text += `, normalised ${percent(mean(known.map((one) => one.normalised)))} %`;
    find("#explorer-summary").textContent = `${text}.`;
    const images = rows.reduce((sum, one) => sum + one.images, 0);
    const all = rows.reduce((sum, one) => sum + one.of, 0);
    const most = Math.max(...rows.map((one) => one.images));
    find("#explorer-note").textContent = (images < all
      ? `${images} of ${all} pictures: of each split at most ${most}, each class by its share; --sample=${most} evaluates on the same. `
      : `All ${images} pictures. `) + "The mark on each bar is zero-shot, and change is from there; normalised is by the fine-tuned model of the task alone.";
  }

  function set(index, value, except) {
    coefs[index] = value;
    for (const input of root.querySelectorAll(`[data-vector="${index}"]`)) {
      if (input !== except) input.value = String(value);
      if (input.type === "range") input.setAttribute("aria-valuetext", String(value));
    }
  }

  let asked = false;
  function later() { // one computation a frame, however fast a slider moves
    if (asked) return;
    asked = true;
    requestAnimationFrame(() => { asked = false; show(); });
  }

  function moved(event) {
    const value = Number.parseFloat(event.target.value);
    if (!Number.isFinite(value)) return; // half typed
    set(Number(event.target.dataset.vector), value, event.target);
    find("#explorer-preset").value = "";
    later();
  }

  function makeSlider(name, index) {
    const line = document.createElement("div");
    line.className = "tx-slider";
    const label = document.createElement("label");
    label.htmlFor = `explorer-slider-${index}`;
    label.textContent = name;
    const range = document.createElement("input");
    Object.assign(range, { type: "range", id: label.htmlFor, min: "-1", max: "2", step: "0.05" });
    const number = document.createElement("input");
    Object.assign(number, { type: "number", step: "0.05" });
    number.setAttribute("aria-label", `coefficient of ${name}`);
    for (const input of [range, number]) {
      input.dataset.vector = String(index);
      input.value = "0";
      input.addEventListener("input", moved);
    }
    line.append(label, range, number);
    return line;
  }

  function choose(name) {
    data.presets[name].forEach((value, index) => set(index, value, null));
    find("#explorer-preset").value = name;
    show();
  }

  find("#explorer-sliders").append(...data.vectors.map(makeSlider));
  const own = new Option("own position", "");
  own.disabled = true;
  find("#explorer-preset").append(own, ...Object.keys(data.presets).map((name) => new Option(name, name)));
  find("#explorer-preset").addEventListener("change", (event) => choose(event.target.value));
  for (const radio of root.querySelectorAll("input[name=explorer-split]")) {
    radio.disabled = !data.splits.some((one) => one.split === radio.value);
    radio.addEventListener("change", show);
  }
  if (!find("input[name=explorer-split]:checked:enabled")) {
    find("input[name=explorer-split]:enabled").checked = true;
  }
  window.tangentExplorer = {
    vectors: data.vectors, coefs: () => coefs.slice(), state, choose,
    set: (name, value) => {
      set(data.vectors.indexOf(name), value, null);
      find("#explorer-preset").value = "";
      show();
    },
  };
  choose(Object.keys(data.presets)[0]);
})();
