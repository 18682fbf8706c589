// Coefficients with the smallest weighted mean cross-entropy on the validation examples, for a weight a
// split. Python's counterpart is arithmetic/fronts.py.
function weighedSolver(data, model) {
  const count = data.vectors.length;
  const side = 1 + count;
  const START = 0.3; // where each coefficient starts, and the centre of the ridge
  const RIDGE = 1e-6;
  const STEPS = 60;
  const GRADIENT = 1e-7; // its norm at the end

  // probabilities need the norms of the features: all inner products, or their upper triangles
  const solvable = (split) => !split.multilabel && (split.gram !== null || split.inner !== undefined);

  function inner(split, i, s, t) {
    if (split.gram !== null) return split.gram[(i * side + s) * side + t];
    const [low, high] = s < t ? [s, t] : [t, s];
    return split.inner[(i * side * (side + 1)) / 2 + low * side - (low * (low - 1)) / 2 + high - low];
  }

  // the norm of picture i's features, and its derivatives; all 1 and 0 where the head does not normalise
  function normOf(split, i, all, slopes) {
    if (split.gram === null && split.inner === null) { slopes.fill(0); return 1; }
    let square = 0;
    for (let s = 0; s < side; s++) {
      let row = 0;
      for (let t = 0; t < side; t++) row += inner(split, i, s, t) * all[t];
      square += all[s] * row;
      if (s > 0) slopes[s - 1] = row;
    }
    const norm = Math.sqrt(Math.max(square, 1e-24));
    for (let t = 0; t < count; t++) slopes[t] /= norm;
    return norm;
  }

  // logits of picture i, and their derivatives by the coefficients: moves[t * classes + k]
  function expand(split, i, all, logits, moves, slopes) {
    const { base, steps, bias, images, classes } = split;
    const norm = normOf(split, i, all, slopes);
    for (let k = 0; k < classes; k++) {
      let value = base[i * classes + k];
      for (let t = 0; t < count; t++) value += all[1 + t] * steps[(t * images + i) * classes + k];
      value /= norm;
      for (let t = 0; t < count; t++) {
        moves[t * classes + k] = (steps[(t * images + i) * classes + k] - value * slopes[t]) / norm;
      }
      logits[k] = value + (bias === null ? 0 : bias[k]);
    }
  }

  // in place: probabilities; returns the cross-entropy of a label
  function softmax(logits, label) {
    const highest = logits.reduce((most, value) => Math.max(most, value), -Infinity);
    const own = logits[label];
    let total = 0;
    for (let k = 0; k < logits.length; k++) { logits[k] = Math.exp(logits[k] - highest); total += logits[k]; }
    for (let k = 0; k < logits.length; k++) logits[k] /= total;
    return Math.log(total) + highest - own;
  }

  // adds a split's weighted loss, gradient and Gauss-Newton matrix
  function addSplit(into, split, weight, a) {
    const { classes, images, labels } = split;
    const all = [1, ...a];
    const logits = new Float64Array(classes);
    const moves = new Float64Array(count * classes);
    const slopes = new Float64Array(count);
    const means = new Float64Array(count);
    for (let i = 0; i < images; i++) {
      expand(split, i, all, logits, moves, slopes);
      into.value += (weight / images) * softmax(logits, labels[i]);
      for (let t = 0; t < count; t++) {
        means[t] = 0;
        for (let k = 0; k < classes; k++) means[t] += logits[k] * moves[t * classes + k];
        into.gradient[t] += (weight / images) * (means[t] - moves[t * classes + labels[i]]);
        for (let s = 0; s <= t; s++) {
          let both = -means[s] * means[t];
          for (let k = 0; k < classes; k++) both += logits[k] * moves[s * classes + k] * moves[t * classes + k];
          into.curvature[t * count + s] += (weight / images) * both;
        }
      }
    }
  }

  function objective(terms, a) {
    const into = { value: 0, gradient: new Float64Array(count), curvature: new Float64Array(count * count) };
    for (const [split, weight] of terms) addSplit(into, split, weight, a);
    for (let t = 0; t < count; t++) {
      into.value += (RIDGE / count) * (a[t] - START) ** 2;
      into.gradient[t] += ((2 * RIDGE) / count) * (a[t] - START);
      into.curvature[t * count + t] += (2 * RIDGE) / count;
    }
    return into;
  }

  // minus the solution of (curvature + damping) x = gradient, by Cholesky factors
  function newtonStep({ gradient, curvature }, damping) {
    const factor = new Float64Array(count * count);
    const step = new Float64Array(count);
    for (let t = 0; t < count; t++) {
      for (let s = 0; s <= t; s++) {
        let sum = curvature[t * count + s] + (s === t ? damping : 0);
        for (let r = 0; r < s; r++) sum -= factor[t * count + r] * factor[s * count + r];
        factor[t * count + s] = s === t ? Math.sqrt(Math.max(sum, 1e-18)) : sum / factor[s * count + s];
      }
      step[t] = -gradient[t];
      for (let s = 0; s < t; s++) step[t] -= factor[t * count + s] * step[s];
      step[t] /= factor[t * count + t];
    }
    for (let t = count - 1; t >= 0; t--) {
      for (let s = t + 1; s < count; s++) step[t] -= factor[s * count + t] * step[s];
      step[t] /= factor[t * count + t];
    }
    return step;
  }

  // Levenberg and Marquardt's method; weights by the splits' names, of any sum
  function solve(weights) {
    const chosen = model.splitsOf("validation").filter((one) => weights[one.name] > 0);
    const total = chosen.reduce((sum, one) => sum + weights[one.name], 0);
    if (total === 0) return null;
    const terms = chosen.map((one) => [one, weights[one.name] / total]);
    let a = new Array(count).fill(START);
    let now = objective(terms, a);
    let damping = 1e-3;
    for (let step = 0; step < STEPS && Math.hypot(...now.gradient) > GRADIENT && damping < 1e9; step++) {
      const moved = newtonStep(now, damping);
      const trial = a.map((coef, t) => coef + moved[t]);
      const next = objective(terms, trial);
      const falls = next.value < now.value;
      if (falls) [a, now] = [trial, next];
      damping *= falls ? 0.2 : 6;
    }
    return { coefs: a, value: now.value };
  }

  function available() {
    const splits = model.splitsOf("validation");
    return splits.length > 0 && splits.every(solvable);
  }

  return { available, solve };
}
