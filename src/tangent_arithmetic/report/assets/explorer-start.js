// The copies, the buttons, and the start of the explorer.

const named = () => Object.fromEntries(data.vectors.map((name, i) => [name, coefs[i]]));
const asJson = () => JSON.stringify(named(), null, 2);

function asPython() { // a JSON object of numbers is also a Python dictionary
  const lines = [`coefs = ${asJson().replace(/\n {2}/g, "\n    ").replace(/\n}$/, ",\n}")}`];
  if (data.origin) {
    const { folder, file, kind } = data.origin;
    const atHome = folder.startsWith("~");
    lines.unshift(...(atHome ? ["from pathlib import Path", ""] : []), `from tangent_arithmetic import ${kind}`, "");
    lines.push(
      atHome ? `folder = Path(${JSON.stringify(folder)}).expanduser()` : `folder = ${JSON.stringify(folder)}`,
      'theta0 = f"{folder}/zeroshot.safetensors"',
      `taus = {task: ${kind}(theta0, f"{folder}/{task}Val/${file}") for task in coefs}`,
      "tau = sum(coef * taus[task] for task, coef in coefs.items())",
      "encoder = tau.apply_to_linear(theta0)",
    );
  }
  return `${lines.join("\n")}\n`;
}

async function copy(text, what) {
  const area = find("#explorer-text");
  let copied = false;
  try {
    await navigator.clipboard.writeText(text);
    copied = true;
  } catch { /* not allowed here: the text is shown and selected */ }
  area.hidden = copied;
  area.value = text;
  if (!copied) area.select();
  find("#explorer-status").textContent = copied ? `${what} copied.` : `${what}: press Ctrl+C or Cmd+C to copy.`;
}

function start() {
  const all = data.vectors.length > 1 ? [sliderOf(ALL, ALL)] : [];
  find("#explorer-sliders").append(...all, ...data.vectors.map(sliderOf));
  const own = new Option("own position", "");
  own.disabled = true;
  find("#explorer-preset").append(own, ...Object.keys(data.presets).map((name) => new Option(name, name)));
  find("#explorer-preset").addEventListener("change", (event) => choose(event.target.value));
  for (const radio of root.querySelectorAll("input[name=explorer-split]")) {
    radio.disabled = !data.splits.some((one) => one.split === radio.value);
    radio.addEventListener("change", () => { show(); remember(); });
  }
  find("#explorer-careful-label").hidden = control === null;
  const actions = {
    common: () => search(common, "Best common coefficient"),
    best: () => search(model.best, "Best coefficients"),
    reset: () => moveTo(coefs.map(() => 0), Object.keys(data.presets)[0]),
    link: () => { remember(); copy(window.location.href, "Link"); },
    python: () => copy(asPython(), "Python"),
    json: () => copy(asJson(), "JSON"),
  };
  for (const [name, action] of Object.entries(actions)) find(`#explorer-${name}`).addEventListener("click", action);
  startChooser();
  window.addEventListener("popstate", () => {
    if (restore()) return;
    if (!window.location.hash) begin();
    else if (coefs.some((coef) => coef !== 0)) window.history.replaceState(null, "", address()); // a link to a part of the page
  });
  if (!restore()) begin();
}

function begin() {
  find("input[name=explorer-split]:enabled").checked = true; // validation, if it is there
  find("#explorer-status").textContent = "";
  const first = Object.keys(data.presets)[0];
  setAll(data.presets[first], null);
  find("#explorer-preset").value = first;
  show();
}

start();
window.tangentExplorer = {
  vectors: data.vectors, coefs: () => coefs.slice(), state, choose, asPython, asJson, model, lines, solver,
  set: (name, value) => {
    set(data.vectors.indexOf(name), value, null);
    find("#explorer-preset").value = "";
    show();
  },
};
