// The linear model of a page: accuracies at any coefficients, from the logits of each picture.
// Python's counterpart is Logits.at: the same sums, in the same order, in double precision.
function tangentModel(data) {
  const numVectors = data.vectors.length;
  const zeros = new Array(numVectors).fill(0);
  const arrays = { base: Float32Array, steps: Float32Array, labels: Int16Array, bias: Float32Array, gram: Float64Array, inner: Float32Array };
  const STEP = 0.05; // of the search, and of the sliders
  const KEPT = 0.95; // share of the control set's zero-shot accuracy that a careful search keeps
  const ROUNDS = 8;
  const mean = (values) => values.reduce((sum, value) => sum + value, 0) / values.length;
  const grid = (low, high) => Array.from({ length: Math.round((high - low) / STEP) + 1 }, (_, i) => +(low + i * STEP).toFixed(10));

  function decode(text, Kind) {
    const bytes = Uint8Array.from(atob(text), (c) => c.charCodeAt(0));
    return new Kind(bytes.buffer); // little-endian, as every browser's machine is
  }

  // a split is decoded when it is first shown
  function unpack(split) {
    if (!split.ready) {
      for (const [name, Kind] of Object.entries(arrays)) {
        if (typeof split[name] === "string") split[name] = decode(split[name], Kind); // else null, or not in older pages
      }
      split.ready = true;
      split.chance = chance(split);
      split.zeroshot = accuracy(split, zeros);
    }
    return split;
  }

  const splitsOf = (kind) => data.splits.filter((one) => one.split === kind).map(unpack);

  // the measure of guessing: one of the classes; of several labels, the share of positives, mean of classes
  function chance(split) {
    if (!split.multilabel) return 1 / split.classes;
    const shares = new Array(split.classes).fill(0);
    split.labels.forEach((label, at) => { shares[at % split.classes] += label / split.images; });
    const occurring = shares.filter((share) => share > 0);
    return occurring.length ? mean(occurring) : 0;
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

  function addStep(logits, split, t, coef) {
    if (coef === 0) return;
    const start = t * logits.length;
    for (let j = 0; j < logits.length; j++) logits[j] += coef * split.steps[start + j];
  }

  function accuracy(split, a) {
    const logits = Float64Array.from(split.base);
    a.forEach((coef, t) => addStep(logits, split, t, coef));
    return score(split, logits, a);
  }

  // the measure of logits before the bias, which the norms divide; in place
  function score(split, logits, a) {
    const lengths = split.gram === null ? null : norms(split, a);
    if (lengths !== null || split.bias !== null) {
      for (let i = 0; i < split.images; i++) {
        for (let k = 0; k < split.classes; k++) {
          const at = i * split.classes + k;
          if (lengths !== null) logits[at] /= lengths[i];
          if (split.bias !== null) logits[at] += split.bias[k];
        }
      }
    }
    return split.multilabel ? averagePrecision(split, logits) : topOne(split, logits);
  }

  function topOne(split, logits) {
    let hits = 0;
    for (let i = 0; i < split.images; i++) {
      let best = 0;
      let highest = -Infinity;
      for (let k = 0; k < split.classes; k++) {
        const value = logits[i * split.classes + k];
        if (value > highest) { highest = value; best = k; }
      }
      if (best === split.labels[i]) hits += 1;
    }
    return hits / split.images;
  }

  // mean over the classes with positives; pictures of equal score count together
  function averagePrecision(split, logits) {
    const values = [];
    for (let k = 0; k < split.classes; k++) {
      const order = Array.from({ length: split.images }, (_, i) => i)
        .sort((i, j) => logits[j * split.classes + k] - logits[i * split.classes + k]);
      let positives = 0;
      let total = 0;
      let before = 0;
      order.forEach((i, rank) => {
        positives += split.labels[i * split.classes + k];
        const next = order[rank + 1];
        if (next !== undefined && logits[next * split.classes + k] === logits[i * split.classes + k]) return;
        total += ((positives - before) * positives) / (rank + 1);
        before = positives;
      });
      if (positives > 0) values.push(total / positives);
    }
    return values.length ? mean(values) : 0;
  }

  // standard error of an accuracy over its pictures; none for mean average precision
  const error = (split, value) => (split.multilabel ? null : Math.sqrt((value * (1 - value)) / split.images));

  // the splits to search on, and what makes their scores one number: the normalised mean where known
  function goal(careful) {
    const kind = data.splits.some((one) => one.split === "validation") ? "validation" : "test";
    const splits = splitsOf(kind);
    const tasks = splits.filter((one) => one.task !== data.control);
    const control = careful ? splits.filter((one) => one.task === data.control) : [];
    const normalised = tasks.every((one) => data.singles[one.name] > 0);
    const value = (scores) => {
      if (control.some((one, i) => scores[tasks.length + i] < KEPT * one.zeroshot)) return -Infinity;
      return mean(tasks.map((one, i) => scores[i] / (normalised ? data.singles[one.name] : 1)));
    };
    return { kind, normalised, splits: [...tasks, ...control], value };
  }

  const valueAt = (target, a) => target.value(target.splits.map((split) => accuracy(split, a)));

  // the best common coefficient from 0 to 1; of equal ones the smallest
  function bestCommon(careful = false) {
    const target = goal(careful);
    let best = zeros;
    let highest = -Infinity;
    for (const coef of grid(0, 1)) {
      const a = new Array(numVectors).fill(coef);
      const value = valueAt(target, a);
      if (value > highest) { highest = value; best = a; }
    }
    return { coefs: best, value: highest, kind: target.kind, normalised: target.normalised };
  }

  // coordinate ascent from there: each coefficient from -1 to 2 in turn, until none improves
  function best(careful = false) {
    const target = goal(careful);
    const found = bestCommon(careful);
    const a = found.coefs.slice();
    let highest = found.value;
    for (let round = 0, improved = true; improved && round < ROUNDS; round++) {
      improved = false;
      for (let t = 0; t < numVectors; t++) {
        const value = line(target, a, t, highest);
        if (value > highest) { highest = value; improved = true; }
      }
    }
    return { ...found, coefs: a, value: highest };
  }

  // moves coefficient t to the best value on the grid, where that improves
  function line(target, a, t, highest) {
    const rests = target.splits.map((split) => {
      const logits = Float64Array.from(split.base);
      a.forEach((coef, s) => { if (s !== t) addStep(logits, split, s, coef); });
      return logits;
    });
    const trial = a.slice();
    for (const coef of grid(-1, 2)) {
      trial[t] = coef;
      const value = target.value(target.splits.map((split, i) => {
        const logits = Float64Array.from(rests[i]);
        addStep(logits, split, t, coef);
        return score(split, logits, trial);
      }));
      if (value > highest + 1e-12) { highest = value; a[t] = coef; }
    }
    return highest;
  }

  return { STEP, KEPT, mean, accuracy, error, splitsOf, goal, bestCommon, best };
}
