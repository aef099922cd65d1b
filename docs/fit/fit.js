// "Will it fit?": sums of fit/table.json, which `python -m benchmarks.fit_table` makes.
(() => {
  const form = document.getElementById("fit");
  if (!form) return;
  const url = new URL("table.json", document.currentScript.src);
  const GIB = 2 ** 30;
  // Chosen at first, and whenever the address does not say otherwise.
  const FIRST = {
    model: "7b", weights: "float32", optimizer: "ldadamw", lost: "float32",
    kept: "float32", moments: "float32", devices: "16", memory: "16",
  };

  // Bytes on one device, and of everything where `place` is that of one device alone.
  function bytes(table, choice, place) {
    const model = table.models[choice.model];
    const weights = model.weights[choice.weights][place];
    return { weights, gradients: weights, state: state(model, choice, place) };
  }

  function state(model, choice, place) {
    if (choice.optimizer === "adamw") return model.adamw[choice.moments][place];
    const lost = choice.lost === "none" ? 0 : model.lost[choice.lost][place];
    return model.kept[choice.rank][choice.kept][place] + lost;
  }

  function show(table, choice) {
    const device = bytes(table, choice, table.devices.indexOf(+choice.devices));
    const all = bytes(table, choice, table.devices.indexOf(1));
    device.sum = device.weights + device.gradients + device.state;
    all.sum = all.weights + all.gradients + all.state;
    for (const cell of document.querySelectorAll("#fit-bytes td[data-of]")) {
      const size = (cell.dataset.on === "device" ? device : all)[cell.dataset.of];
      cell.textContent = gib(size);
      cell.dataset.bytes = size;
    }
    const left = choice.memory * GIB - device.sum;
    const verdict = document.getElementById("fit-verdict");
    verdict.dataset.fits = left >= 0;
    verdict.textContent = left >= 0
      ? `Fits, and leaves ${gib(left)} of ${choice.memory} GiB on each device for `
        + "activations and the step's temporaries."
      : `Does not fit: ${gib(-left)} too much on each device, before activations.`;
  }

  function gib(size) {
    const digits = size < 0.995 * GIB ? 3 : size < 99.5 * GIB ? 2 : 0;
    return `${(size / GIB).toFixed(digits)} GiB`;
  }

  function options(select, values, label = String) {
    const chosen = select.value;
    select.replaceChildren(...values.map((value) => new Option(label(value), value)));
    if (values.map(String).includes(chosen)) select.value = chosen;
  }

  // The ranks that the table has for this model, and what the optimizer asks for.
  function arrange(table, form) {
    const model = table.models[form.model.value];
    const quarter = model.width / 4;
    const before = form.rank.value;
    options(form.rank, Object.keys(model.kept), (rank) =>
      +rank === quarter ? `${rank} (a quarter of the width)` : rank);
    if (form.rank.value !== before) form.rank.value = quarter;
    for (const part of form.querySelectorAll("[data-for]")) {
      part.hidden = part.dataset.for !== form.optimizer.value;
    }
  }

  function start(table) {
    options(form.model, Object.keys(table.models), (name) =>
      `${name}: ${(table.models[name].parameters / 1e6).toLocaleString("en", {
        maximumSignificantDigits: 4 })} million`);
    options(form.devices, table.devices);
    const asked = new URLSearchParams(location.search);
    const set = (name, value) => {
      form[name].value = value;
      if (!form[name].value) form[name].value = FIRST[name];
    };
    for (const name in FIRST) set(name, asked.get(name) ?? FIRST[name]);
    arrange(table, form);
    if (table.models[form.model.value].kept[asked.get("rank")]) {
      form.rank.value = asked.get("rank");
    }
    form.addEventListener("input", () => {
      arrange(table, form);
      update(table);
    });
    update(table);
    form.hidden = false;
  }

  function update(table) {
    const choice = Object.fromEntries(new FormData(form));
    if (!(choice.memory > 0)) return;
    show(table, choice);
    history.replaceState(null, "", `?${new URLSearchParams(choice)}${location.hash}`);
  }

  fetch(url).then((answer) => answer.json()).then(start, (error) => {
    document.getElementById("fit-verdict").textContent = `No table: ${error}`;
  });
})();
