// The exact line: where each picture is right along a direction of coefficients, and the best of all
// coefficients on it. Python's counterparts are arithmetic/line.py and arithmetic/steps.py.
function exactLines(model) {
  const RESOLUTION = 1e-6; // narrower pieces do not count: features in float32 do not resolve them

  // the predicted class follows from lines unless a head divides by norms and then adds a bias
  const hasLine = (split) => !split.multilabel && (split.gram === null || split.bias === null);

  // [low, high) of each picture that is right somewhere along start + x * direction
  function intervals(split, start, direction) {
    const { base, steps, labels, bias, images, classes } = split;
    const along = direction.map((u, t) => [u, start[t], t * images * classes]).filter(([u, a]) => u !== 0 || a !== 0);
    const height = new Float64Array(classes);
    const slope = new Float64Array(classes);
    const found = [];
    for (let i = 0; i < images; i++) {
      const row = i * classes;
      for (let k = 0; k < classes; k++) {
        height[k] = base[row + k] + (bias === null ? 0 : bias[k]);
        slope[k] = 0;
        for (const [u, a, offset] of along) {
          const step = steps[offset + row + k];
          if (a !== 0) height[k] += a * step;
          if (u !== 0) slope[k] += u * step;
        }
      }
      const range = envelope(height, slope, labels[i]);
      if (range !== null) found.push(range);
    }
    return found;
  }

  // where the line of a class is the highest; null for nowhere
  function envelope(height, slope, own) {
    if (own < 0 || own >= height.length) return null;
    let low = -Infinity;
    let high = Infinity;
    for (let k = 0; k < height.length; k++) {
      const ahead = height[own] - height[k];
      const gain = slope[own] - slope[k];
      if (gain > 0) low = Math.max(low, -ahead / gain);
      else if (gain < 0) high = Math.min(high, -ahead / gain);
      else if (ahead < 0 || (ahead === 0 && k < own)) return null;
    }
    return low < high ? [low, high] : null;
  }

  // accuracy as a step function, continuous from the right: sorted edges, and values around them
  function accuracySteps(split, start, direction) {
    const ranges = intervals(split, start, direction);
    const changes = new Map();
    let count = 0;
    for (const [low, high] of ranges) {
      if (low === -Infinity) count += 1;
      else changes.set(low, (changes.get(low) || 0) + 1);
      if (high !== Infinity) changes.set(high, (changes.get(high) || 0) - 1);
    }
    const edges = Float64Array.from([...changes.keys()].filter((edge) => changes.get(edge) !== 0)).sort();
    const values = [count / split.images];
    for (const edge of edges) {
      count += changes.get(edge);
      values.push(count / split.images);
    }
    return { edges, values };
  }

  // the widest plateau with the largest value in a range, then the lowest; null if none is allowed
  function plateau(functions, value, low, high) {
    const inside = functions.flatMap(({ edges }) => [...edges].filter((edge) => edge > low && edge < high));
    const starts = [low, ...new Set(Float64Array.from(inside).sort())];
    const places = functions.map(() => 0);
    const pieces = starts.map((start, i) => {
      functions.forEach(({ edges }, f) => { while (places[f] < edges.length && edges[places[f]] <= start) places[f] += 1; });
      const end = i + 1 < starts.length ? starts[i + 1] : high;
      return { start, end, value: value(functions.map(({ values }, f) => values[places[f]])) };
    });
    const wide = pieces.filter((one) => one.end - one.start > RESOLUTION);
    const most = wide.reduce((best, one) => Math.max(best, one.value), -Infinity);
    return most === -Infinity ? null : widest(pieces, most);
  }

  function widest(pieces, most) {
    let best = null;
    let open = null; // the union of neighbouring pieces with the largest value
    for (const piece of [...pieces, { value: NaN }]) {
      if (piece.value === most) {
        open = open === null ? { ...piece } : { ...open, end: piece.end };
      } else if (open !== null) {
        if (best === null || open.end - open.start > best.end - best.start) best = open;
        open = null;
      }
    }
    return best;
  }

  // the decimal of fewest digits inside a plateau, nearest its middle
  function shortest({ start, end }) {
    const middle = (start + end) / 2;
    for (let digits = 1; digits < 10; digits++) {
      const rounded = Number(middle.toFixed(digits));
      if (rounded > start && rounded < end) return rounded;
    }
    return middle;
  }

  // the exact best coefficient along start + x * direction, low <= x <= high; null where there are no lines
  function best(start, direction, careful, low, high) {
    const target = model.goal(careful);
    if (!target.splits.every(hasLine)) return null;
    const functions = target.splits.map((split) => accuracySteps(split, start, direction));
    const found = plateau(functions, target.value, low, high);
    if (found === null) return null;
    const { kind, normalised } = target;
    return { coef: shortest(found), low: found.start, high: found.end, value: found.value, kind, normalised };
  }

  const available = () => model.goal(true).splits.every(hasLine);

  return { available, best };
}
