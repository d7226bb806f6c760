"use strict";
/*
The Plan view: what is chosen on the left, what it needs on the right.

A moved slider is answered twice: at once for the setting that is shown, with what the last plan chose (`held`), and
after a moment of quiet by the whole plan, with every setting that may be better.
*/
(function () {
  const { element, say } = fitune;
  const QUIET_MILLISECONDS = 500;
  const KEPT = "fitune-plan";
  /* what two digits of GiB show as 0.00 is not drawn */
  const LEAST_BYTES = 0.005 * 2 ** 30;
  const FIRST = { "model.source": "minimind2", "batch.effective": "16", "data.max_length": "2048" };
  const METHODS = { full: "all weights", lora: "LoRA", qlora: "QLoRA" };
  const TITLES = {
    "model.precision": "Precision", "model.recompute": "Checkpointing", loss: "Loss", "optim.name": "Optimizer",
  };

  let choices = null;
  let settings = {};
  let answer = null;
  let commands = null;
  let shownRow = 0;
  let asked = null;
  let timer = null;
  let every = false;
  let parts = {};
  let watched = null;

  /* What is kept in the browser are the settings alone. */
  function load() {
    try {
      settings = JSON.parse(localStorage.getItem(KEPT)) || { ...FIRST };
    } catch (error) {
      settings = { ...FIRST };
    }
  }

  function set(key, value) {
    if (value === "" || value === "auto") delete settings[key];
    else settings[key] = String(value);
    try {
      localStorage.setItem(KEPT, JSON.stringify(settings));
    } catch (error) {
      // they are kept as long as the page is open
    }
    changed();
  }

  function changed() {
    every = false;
    clearTimeout(timer);
    if (held() === null) {
      plan();
      return;
    }
    ask({ settings: allSettings(), held: held() }, { quick: true, since: performance.now() });
  }

  /* Keys that are written one a line take the place of those that have a control. */
  function allSettings() {
    const { more, ...given } = settings;
    for (const line of (more || "").split("\n")) {
      const [key, ...value] = line.split("=");
      if (key.trim()) given[key.trim()] = value.join("=").trim();
    }
    return given;
  }

  /* What the last plan chose, which is predicted alone as far as the settings leave it open. */
  function held() {
    return answer && answer.source === settings["model.source"] ? answer.rows[shownRow].held : null;
  }

  function plan() {
    clearTimeout(timer);
    ask({ settings: allSettings(), every }, { quick: false });
  }

  function ask(body, { quick, since }) {
    if (asked) asked.close();
    const source = settings["model.source"];
    if (!quick) busy(say("planning"));
    asked = fitune.follow("/api/plan", (name, content) => {
      if (name === "commands") {
        commands = content;
        drawCommands();
      } else if (name === "stage" && !quick) {
        busy(content);
      } else if (name === "plan") {
        answer = { ...content, source, quick };
        shownRow = content.shown;
        drawAnswer();
        if (since !== undefined) parts.answer.dataset.milliseconds = (performance.now() - since).toFixed(1);
        if (!quick) busy("");
      } else if (name === "error" && !quick) {
        answer = null;
        commands = commands && { ...commands };
        drawRefusal(content);
        busy("");
      }
      // the whole plan follows, also where another page has asked in between
      if (name !== "stage" && (quick || name === "superseded")) timer = setTimeout(plan, QUIET_MILLISECONDS);
    }, body);
  }

  function busy(stage) {
    parts.stage.textContent = stage;
    parts.answer.setAttribute("aria-busy", stage ? "true" : "false");
  }

  // ---- what is chosen

  function field(title, control, { hint, wide } = {}) {
    const id = `field-${title.replace(/\W/g, "-")}`;
    control.id = control.id || id;
    return element("div", { class: wide ? "field wide-field" : "field" },
      element("label", { for: control.id, text: say(title) }), control,
      hint ? element("small", { class: "soft", text: hint }) : null);
  }

  function text(key, title, { placeholder, hint, lines } = {}) {
    const input = element(lines ? "textarea" : "input", {
      placeholder, rows: lines, spellcheck: "false", autocomplete: "off", onchange: () => set(key, input.value.trim()),
    });
    input.value = settings[key] || "";
    return field(title, input, { hint });
  }

  function select(key) {
    const values = choices.values[key];
    const input = element("select", { onchange: () => set(key, input.value === values[0] ? "" : input.value) },
      ...values.map((value) => element("option", { value, text: value === "auto" ? say("auto") : value })));
    input.value = settings[key] || values[0];
    return field(TITLES[key], input);
  }

  function methods() {
    const radios = choices.values["model.method"].map((method) => {
      const radio = element("input", { type: "radio", name: "method", value: method, onchange: () => set("model.method", method === "full" ? "" : method) });
      radio.checked = method === (settings["model.method"] || "full");
      return element("label", null, radio, element("span", { text: say(METHODS[method] || method) }));
    });
    return element("fieldset", { class: "segments" }, element("legend", { text: say("Method") }), ...radios);
  }

  /* A slider whose stops are far apart, and a field for any number beside it. auto: the first stop leaves it open. */
  function slider(key, title, stops, { auto } = {}) {
    const all = auto ? ["", ...stops] : stops;
    const nearest = (value) => {
      if (value === "" || value === undefined) return 0;
      const distance = (stop) => (stop === "" ? Infinity : Math.abs(Math.log(stop / Number(value))));
      return all.reduce((best, stop, index) => (distance(stop) < distance(all[best]) ? index : best), auto ? 1 : 0);
    };
    const number = element("input", {
      class: "exact", inputmode: "numeric", placeholder: auto ? say("auto") : "", "aria-label": say("{name}, exactly", { name: say(title) }),
      onchange: () => { range.value = nearest(number.value.trim()); set(key, number.value.trim()); spoken(); },
    });
    const range = element("input", {
      type: "range", min: 0, max: all.length - 1, step: 1,
      oninput: () => { number.value = all[range.value]; spoken(); set(key, number.value); },
    });
    const spoken = () => range.setAttribute("aria-valuetext", number.value || say("auto"));
    number.value = settings[key] || "";
    range.value = nearest(settings[key]);
    spoken();
    const made = field(title, range);
    made.append(number);
    made.classList.add("sliding");
    return made;
  }

  /* An input with a list below it: everything when it gets the focus, what matches as one types. */
  function combobox(key, title, options, { free, hint }) {
    const list = element("ul", { role: "listbox", id: `list-${key}`, hidden: true, "aria-label": say(title) });
    const input = element("input", {
      role: "combobox", "aria-expanded": "false", "aria-controls": list.id, "aria-autocomplete": "list", spellcheck: "false",
      autocomplete: "off", placeholder: hint,
      onfocus: () => { input.select(); open(""); }, oninput: () => open(input.value), onclick: () => open(""),
      onblur: () => take(free ? input.value.trim() : undefined),
      onkeydown: (event) => {
        const rows = [...list.children];
        const at = rows.findIndex((row) => row.getAttribute("aria-selected") === "true");
        if (event.key === "ArrowDown" || event.key === "ArrowUp") {
          event.preventDefault();
          if (list.hidden) open("");
          mark((at + (event.key === "ArrowDown" ? 1 : -1) + rows.length) % (rows.length || 1));
        } else if (event.key === "Enter") {
          if (at >= 0 && !list.hidden) take(rows[at].dataset.value);
          else if (free) take(input.value.trim());
          else if (rows.length) take(rows[0].dataset.value);
        } else if (event.key === "Escape") {
          input.value = settings[key] || "";
          close();
        }
      },
    });
    input.value = settings[key] || "";
    function mark(index) {
      [...list.children].forEach((row, each) => row.setAttribute("aria-selected", String(each === index)));
      const row = list.children[index];
      if (row) row.scrollIntoView({ block: "nearest" });
      input.setAttribute("aria-activedescendant", row ? row.id : "");
    }
    function open(typed) {
      const parts = typed.toLowerCase().split(/\s+/);
      const found = options.filter((option) => parts.every((part) => `${option.value} ${option.detail}`.toLowerCase().includes(part)));
      list.replaceChildren(...found.map((option, index) => element("li", {
        role: "option", id: `${list.id}-${index}`, "data-value": option.value, "aria-selected": "false",
        onpointerdown: (event) => { event.preventDefault(); take(option.value); },
      }, element("span", { text: option.value }), element("span", { class: "soft", text: option.detail }))));
      list.hidden = !found.length;
      input.setAttribute("aria-expanded", String(!list.hidden));
    }
    function close() {
      list.hidden = true;
      input.setAttribute("aria-expanded", "false");
    }
    function take(value) {
      close();
      const taken = value === undefined ? settings[key] || "" : value;
      input.value = taken;
      if (taken !== (settings[key] || "")) set(key, taken);
    }
    const made = field(title, input);
    made.append(list);
    made.classList.add("combo");
    return made;
  }

  function drawControls() {
    const cards = choices.cards.map((card) => ({
      value: card.name,
      detail: [`${fitune.gib(card.total_bytes, 0)} GiB`, card.here ? say("this machine") : ""].filter(Boolean).join(" · "),
    }));
    const models = choices.models.map((name) => ({ value: name, detail: say("preset") }));
    parts.controls.replaceChildren(
      combobox("model.source", "Model", models, { free: true, hint: say("preset, directory, config.json or hub id") }),
      combobox("memory.gpu", "Card", cards, { hint: say("search, such as 4090 or 24") }),
      methods(),
      slider("data.max_length", "Longest sample, in tokens", choices.lengths),
      slider("batch.effective", "Effective batch: samples in a step", choices.samples),
      slider("batch.micro", "Micro-batch: samples at once", choices.samples, { auto: true }),
      element("div", { class: "pairs" }, ...Object.keys(TITLES).map(select)),
      element("details", { open: settings["data.train"] ? true : null },
        element("summary", { text: say("Data and run") }),
        text("data.train", "Data", { placeholder: "sft.jsonl", hint: say("without data, every sample is taken to be the longest") }),
        text("model.tokenizer", "Tokenizer", { placeholder: say("that of the model") }),
        element("div", { class: "pairs" },
          text("optim.lr", "Learning rate", { placeholder: say("auto") }), text("train.epochs", "Epochs", { placeholder: "1" }),
          text("train.steps", "Steps"), text("run.name", "Name of the run", { placeholder: say("auto") }))),
      element("details", { open: settings.more || settings["memory.budget"] ? true : null },
        element("summary", { text: say("Memory limit and other keys") }),
        text("memory.budget", "Memory limit", { placeholder: say("auto"), hint: say("a size like 20GiB, or a share like 0.9") }),
        text("more", "Other keys, one a line", { placeholder: "model.attention=flash", lines: 3 })),
      element("button", {
        type: "button", class: "quiet", text: say("Reset"),
        onclick: () => { settings = { ...FIRST, "memory.gpu": firstCard() }; set("more", ""); drawControls(); },
      }),
    );
  }

  // ---- what it needs

  function drawRefusal(sentence) {
    parts.others.replaceChildren();
    parts.answer.replaceChildren(element("div", { class: "verdict no", role: "status" },
      element("span", { class: "sign", "aria-hidden": "true", text: "!" }), element("p", { class: "refusal", text: sentence })));
  }

  function drawAnswer() {
    const candidate = answer.plan.candidates[shownRow];
    const table = answer.quick && parts.table ? parts.table : drawTable();
    parts.table = table;
    parts.answer.replaceChildren(drawVerdict(candidate), drawBar(candidate), drawFigures(candidate));
    parts.others.replaceChildren(table,
      element("ul", { class: "soft notes" }, ...answer.notes.map((note) => element("li", { text: note }))));
    table.classList.toggle("stale", answer.quick);
    parts.start.hidden = false;
  }

  function drawVerdict(candidate) {
    const row = answer.rows[shownRow];
    const sizes = {
      needed: fitune.gib(candidate.predicted_device_bytes), limit: fitune.gib(answer.limit_bytes), card: answer.plan.device.name,
    };
    const [kind, sign, sentence] = candidate.fits
      ? ["yes", "✓", say("Fits {card}: {needed} of {limit} GiB", sizes)]
      : candidate.fits === null
        ? ["no", "?", say("May not fit {card}: at most {needed} of {limit} GiB", sizes)]
        : ["no", "✗", say("Does not fit {card}: {needed} of {limit} GiB", sizes)];
    const how = [row.sentence, say("gradient checkpointing {name}", { name: row.changes.join(", ") })];
    return element("div", { class: `verdict ${kind}`, role: "status" },
      element("span", { class: "sign", "aria-hidden": "true", text: sign }),
      element("div", null,
        element("h1", { text: sentence }),
        element("p", { class: "soft", text: how.join(" · ") }),
        candidate.fits || answer.quick ? null : element("p", { text: answer.reason })));
  }

  /* The classes of memory at the peak, from left to right, and what is on top of the tensors. */
  function memoryParts(candidate) {
    const onCard = answer.plan.device.kind === "cuda";
    const found = fitune.categories.map(([name, colour]) => [say(name).replace("_", " "), candidate.categories[name] || 0, colour]);
    found.push([say(onCard ? "held by PyTorch, unused" : "kept by the C library"), candidate.predicted_reserved_bytes - candidate.predicted_allocated_bytes, "held"]);
    found.push([say(onCard ? "CUDA context" : "the program itself"), candidate.predicted_device_bytes - candidate.predicted_reserved_bytes, "context"]);
    return found.filter(([, bytes]) => bytes >= LEAST_BYTES);
  }

  function drawBar(candidate) {
    const { device } = answer.plan;
    const scale = Math.max(device.total_bytes, candidate.predicted_device_bytes);
    const width = (bytes) => `${(100 * bytes) / scale}%`;
    const found = memoryParts(candidate);
    const segments = found.map(([name, bytes, colour]) => element("span", {
      class: `part ${colour}`, style: { width: width(bytes) }, title: `${name}: ${fitune.gib(bytes, 2)} GiB`,
    }));
    const spoken = found.map(([name, bytes]) => `${name} ${fitune.gib(bytes, 2)} GiB`).join(", ");
    const mark = (kind, bytes, text) => element("span", {
      class: `${kind}${bytes > 0.6 * scale ? " late" : ""}`, style: { left: width(bytes) },
    }, element("span", { text }));
    return element("figure", { class: "memory" },
      element("div", { class: "frame" },
        element("div", { class: "bar", role: "img", "aria-label": spoken },
          ...segments),
        mark("limit", answer.limit_bytes, say("limit {size}", { size: fitune.gib(answer.limit_bytes) })),
        mark("card-end", device.total_bytes, say("{card} {size}", { size: fitune.gib(device.total_bytes), card: device.name }))),
      element("ul", { class: "legend" }, ...found.map(([name, bytes, colour]) => element("li", null,
        element("span", { class: `swatch ${colour}`, "aria-hidden": "true" }), element("span", { text: name }),
        element("b", { text: fitune.gib(bytes, 2) })))),
      element("figcaption", { class: "soft", text: say("GiB at the peak ({phase}), predicted", { phase: answer.rows[shownRow].phase }) }));
  }

  function drawFigures(candidate) {
    const row = answer.rows[shownRow];
    const { model } = answer.plan;
    const left = answer.limit_bytes - candidate.predicted_device_bytes;
    const figures = [
      [left >= 0 ? say("left, GiB") : say("missing, GiB"), fitune.gib(Math.abs(left))],
      [say("tokens/s"), row.rate],
      [say("a step"), row.step],
      answer.length ? [say("{steps} steps", { steps: Math.ceil(answer.length.steps).toLocaleString("en") }), answer.length.time] : null,
      [say("parameters"), answer.parameters],
      model.num_trainable_parameters < model.num_parameters ? [say("trained"), answer.trained] : null,
    ];
    return element("div", { class: "cards" }, ...figures.filter(Boolean).map(([name, value]) =>
      element("div", { class: "card" }, element("span", { class: "soft", text: name }), element("b", { text: value }))));
  }

  function drawTable() {
    const rows = answer.rows.filter((row) => every || row.label);
    const sizes = rows.map((row) => answer.plan.candidates[row.number].predicted_device_bytes);
    const scale = Math.max(answer.plan.device.total_bytes, ...sizes);
    const limit = `${(100 * answer.limit_bytes) / scale}%`;
    const differ = new Set(rows.map((row) => row.result)).size > 1;
    const heads = [
      "", say("micro-batch x accumulation"), say("gradient checkpointing"), say("memory"), "GiB", say("fits"), say("tokens/s"),
      ...(differ ? [say("result")] : []), "",
    ];
    const lines = rows.map((row) => {
      const candidate = answer.plan.candidates[row.number];
      const radio = element("input", {
        type: "radio", name: "candidate", "aria-label": `${row.split}, ${row.changes.join(", ")}`,
        onchange: () => { shownRow = row.number; drawAnswer(); parts.others.querySelector(`input[data-number="${row.number}"]`).focus(); },
        "data-number": row.number,
      });
      radio.checked = row.number === shownRow;
      return element("tr", { class: row.number === shownRow ? "shown" : "" },
        element("td", null, radio),
        element("td", null, element("b", { text: row.split }),
          row.label ? element("span", { class: "label", text: row.label }) : null),
        element("td", { text: row.changes.join(", ") }),
        element("td", { class: "mini-cell" }, element("span", { class: "mini", "aria-hidden": "true" },
          element("span", { class: candidate.fits ? "fits" : "over", style: { width: `${(100 * candidate.predicted_device_bytes) / scale}%` } }),
          element("i", { style: { left: limit } }))),
        element("td", { class: "number", text: fitune.gib(candidate.predicted_device_bytes) }),
        element("td", null, element("span", { class: candidate.fits ? "good" : "bad", text: row.fits }),
          row.reason ? element("small", { class: "soft reason", text: row.reason }) : null),
        element("td", { class: "number", text: row.rate }),
        differ ? element("td", { class: "short", text: row.result }) : null,
        element("td", null, element("button", {
          type: "button", text: say("Use"), "aria-label": say("Use {setting}", { setting: `${row.split}, ${row.changes.join(", ")}` }),
          onclick: () => use(row),
        })));
    });
    const head = element("tr", null, ...heads.map((name, index) =>
      element("th", { scope: "col", class: [4, 6].includes(index) ? "number" : "", text: name })));
    return element("section", null,
      element("h2", { text: say("What else fits, and why not") }),
      element("div", { class: "wide" }, element("table", { class: "settings" }, element("thead", null, head), element("tbody", null, ...lines))),
      element("p", null, every
        ? element("span", { class: "soft", text: say("all {number} settings", { number: answer.rows.length }) })
        : element("button", { type: "button", text: say("Predict every setting"), onclick: () => { every = true; plan(); } })));
  }

  /* Holds a candidate: its settings are chosen now, where they were open. */
  function use(row) {
    Object.assign(settings, row.settings);
    set("run.name", settings["run.name"] || "");
    drawControls();
  }

  // ---- what to do with it

  function drawCommands() {
    const copy = (title, content) => {
      const button = element("button", {
        type: "button", text: say("Copy"), "aria-label": say("Copy: {name}", { name: say(title) }),
        onclick: async () => {
          await copied(content);
          button.textContent = say("Copied");
          setTimeout(() => { button.textContent = say("Copy"); }, 1500);
        },
      });
      return element("div", { class: "copy" }, element("div", null, element("span", { class: "soft", text: say(title) }), button),
        element("pre", { text: content }));
    };
    parts.commands.replaceChildren(
      element("h2", { text: say("The same on the command line") }),
      copy("Command of this plan", commands.plan), copy("Command of the run", commands.train), copy("Configuration (YAML)", commands.yaml));
  }

  async function copied(content) {
    try {
      await navigator.clipboard.writeText(content);
    } catch (error) {
      // over a forwarded port without https some browsers have no clipboard: mark it for Ctrl-C
      const marked = [...parts.commands.querySelectorAll("pre")].find((each) => each.textContent === content);
      getSelection().selectAllChildren(marked);
      document.execCommand("copy");
    }
  }

  async function start(button) {
    button.disabled = true;
    parts.told.className = "soft";
    parts.told.textContent = say("starting");
    try {
      const { number } = await fitune.post("/api/start", { settings: allSettings() });
      await follow(number);
    } catch (error) {
      parts.told.className = "bad";
      parts.told.textContent = error.message;
    }
    button.disabled = false;
  }

  /* Until the run has its directory, or has ended. */
  async function follow(number) {
    watched = number;
    while (watched === number) {
      const { processes } = await fitune.get("/api/processes");
      const found = processes.find((each) => each.number === number);
      if (found.error) throw new Error(found.error);
      if (found.run !== null || found.exit_code !== null) {
        parts.told.replaceChildren(found.run === null ? say("the run has ended") : element("a", {
          href: `#/runs/${encodeURIComponent(found.run)}`, text: say("{run} is running: watch it", { run: found.run }),
        }));
        return;
      }
      await new Promise((resolve) => setTimeout(resolve, 1000));
    }
  }

  function firstCard() {
    const here = choices.cards.find((card) => card.here && card.name !== "cpu");
    return here ? here.name : "RTX 4090";
  }

  fitune.view("plan", {
    title: "Plan",
    async show(main) {
      parts = {
        controls: element("form", { class: "controls", "aria-label": say("what is planned"), onsubmit: (event) => event.preventDefault() }),
        stage: element("p", { class: "stage soft", role: "status" }),
        answer: element("div", { class: "answer" }),
        others: element("div"),
        told: element("p", { class: "soft", role: "status" }),
        commands: element("section", { class: "commands" }),
      };
      parts.start = element("section", { class: "start", hidden: true },
        element("h2", { text: say("Train it on this machine") }),
        element("p", { class: "soft", text: say("The run is a process of its own: it goes on when this board ends.") }),
        element("button", { type: "button", class: "main", text: say("Start the run"), onclick: (event) => start(event.target) }), parts.told);
      main.append(element("div", { class: "plan" },
        element("div", { class: "first" }, parts.stage, parts.answer), parts.controls,
        element("div", { class: "rest" }, parts.others, parts.commands, parts.start)));
      try {
        choices = await fitune.get("/api/choices");
      } catch (error) {
        fitune.fault(error.message);
        return;
      }
      load();
      if (!settings["memory.gpu"]) settings["memory.gpu"] = firstCard();
      drawControls();
      plan();
    },
    hide() {
      clearTimeout(timer);
      if (asked) asked.close();
      watched = null;
      answer = null;
    },
  });
})();
