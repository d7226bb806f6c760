"use strict";
/* The Runs view, and a report, which is the same page of runs without the list beside it. All text of a page comes
   from report/document.py and is set as text. */
fitune.runs = (() => {
  const { make, swatch } = fitune.charts;
  const LIST_EVERY_SECONDS = 5;

  /* Changes `target` by a JSON merge patch (RFC 7386). */
  const merge = (target, patch) => {
    for (const [key, value] of Object.entries(patch)) {
      if (value === null) delete target[key];
      else if (typeof value === "object" && !Array.isArray(value) && typeof target[key] === "object" && !Array.isArray(target[key])) merge(target[key], value);
      else target[key] = value;
    }
  };

  const cell = (tag, text, isNumber) => {
    const found = make(tag, {}, make("bdi", { textContent: text }));
    if (isNumber) found.className = "number";
    if (tag === "th") found.scope = "col";
    return found;
  };

  const BLOCKS = {
    text: ({ text }) => make("p", { className: "soft", textContent: text }),
    list: ({ items }) => make("ul", {}, ...items.map((text) => make("li", { textContent: text }))),
    code: ({ text }) => make("pre", { textContent: text }),
    details: (block) => make("details", { open: block.open },
      make("summary", {}, make("bdi", { textContent: block.summary })), ...block.blocks.map(show)),
    table: ({ heads, numbers, rows, marked }) => {
      const head = make("tr", {}, ...heads.map((text, index) => cell("th", text, numbers[index])));
      const body = rows.map((row, index) => make("tr", { className: marked.includes(index) ? "marked" : "" },
        ...row.map((text, column) => cell("td", text, numbers[column]))));
      const table = make("table", {}, make("thead", {}, head), make("tbody", {}, ...body));
      const wide = make("div", { className: "wide", tabIndex: 0 }, table);
      wide.setAttribute("role", "region");
      wide.setAttribute("aria-label", heads.join(", "));
      return wide;
    },
  };
  const show = (block) => BLOCKS[block.kind](block);

  /* A page of runs in `place`. patch(changes) shows a whole page at first, and changes of it afterwards. */
  const page = (place) => {
    const shown = {};
    const hidden = new Set();
    const title = make("h1", {}), first = make("p", { className: "outcome" });
    const others = make("ul", {}), more = make("details", { open: true }, make("summary", { textContent: fitune.say("all that the comparison shows") }), others);
    const cards = make("div", { className: "cards" }), legend = make("div", { className: "shown" });
    legend.setAttribute("role", "group");
    legend.setAttribute("aria-label", fitune.say("runs in the charts"));
    const axes = make("fieldset", { className: "axes" });
    const tools = make("div", { className: "tools" }, legend, axes);
    const charts = make("div", { className: "charts" }), below = make("div", {});
    place.replaceChildren(title, first, cards, more, tools, charts, below);
    const grid = fitune.charts.grid(charts);
    const sections = new Map();

    const drawHead = () => {
      title.replaceChildren(make("bdi", { textContent: shown.title }));
      first.textContent = shown.verdict[0] ?? "";
      others.replaceChildren(...shown.verdict.slice(1).map((text) => make("li", { textContent: text })));
      more.hidden = shown.verdict.length < 2;
      cards.replaceChildren(...shown.cards.map(({ name, value, note }) => make("div", { className: "card" },
        make("span", { className: "soft", textContent: name }), make("b", {}, make("bdi", { textContent: value })),
        make("small", { className: "soft", textContent: note }))));
    };

    const drawLegend = () => {
      legend.hidden = shown.runs.length < 2;
      legend.replaceChildren(...shown.runs.map((run, index) => {
        const button = make("button", { type: "button", className: "chip" }, swatch(index),
          make("bdi", { textContent: run.name }));
        button.title = fitune.say("click: show or hide; double click: this one alone");
        const press = () => button.setAttribute("aria-pressed", String(!hidden.has(index)));
        press();
        button.addEventListener("click", () => {
          hidden.has(index) ? hidden.delete(index) : hidden.add(index);
          press();
          grid.hide(new Set(hidden));
        });
        button.addEventListener("dblclick", () => {
          hidden.clear();
          shown.runs.forEach((_, other) => { if (other !== index) hidden.add(other); });
          [...legend.children].forEach((each, other) => each.setAttribute("aria-pressed", String(!hidden.has(other))));
          grid.hide(new Set(hidden));
        });
        return button;
      }));
    };

    const drawAxes = () => {
      const known = Object.values(shown.charts).find((chart) => "step" in chart.axes)?.axes ?? {};
      const names = Object.entries(known);
      const asked = new URLSearchParams(location.hash.slice(1)).get("x");
      // runs of different batches are comparable at equal tokens alone
      const usual = shown.runs.length > 1 && "tokens" in known ? "tokens" : "step";
      const start = asked in known ? asked : usual;
      const log = make("input", { type: "checkbox" });
      log.addEventListener("change", () => grid.log(log.checked));
      axes.replaceChildren(make("legend", { textContent: fitune.say("by") }),
        ...names.map(([name, text]) => {
          const input = make("input", { type: "radio", name: "axis", value: name, checked: name === start });
          input.addEventListener("change", () => grid.axis(name));
          return make("label", {}, input, text);
        }), make("label", {}, log, fitune.say("logarithmic")));
      grid.axis(start);
    };

    const drawSections = (changed) => {
      for (const [key, { element }] of sections) if (!(key in shown.sections)) { element.remove(); sections.delete(key); }
      for (const [key, section] of Object.entries(shown.sections)) {
        if (sections.has(key) && !changed.has(key)) continue;
        const heading = make("h2", { id: `section-${key}`, textContent: section.title });
        const element = make("section", {}, heading, ...section.blocks.map(show));
        element.setAttribute("aria-labelledby", heading.id);
        const old = sections.get(key)?.element;
        if (old) {
          const opened = [...old.querySelectorAll("details")].map((each) => each.open);
          [...element.querySelectorAll("details")].forEach((each, index) => { each.open = opened[index] ?? each.open; });
          old.replaceWith(element);
        } else below.append(element);
        sections.set(key, { element });
      }
    };

    return {
      patch: (changes) => {
        const isFirst = !("title" in shown);
        merge(shown, changes);
        if (["title", "verdict", "cards"].some((part) => part in changes)) drawHead();
        if ("runs" in changes) drawLegend();
        if (isFirst) drawAxes();
        if ("charts" in changes) grid.update(shown.charts, new Set(Object.keys(changes.charts)));
        if ("sections" in changes) drawSections(new Set(Object.keys(changes.sections)));
      },
      print: () => grid.all(),
      close: () => grid.close(),
    };
  };

  /* The list of runs, and the page of those that are chosen, which follows them. */
  const view = () => {
    const chosen = new Set();
    let timer = 0, stream = null, current = null, list, place, notice, tools, lastList = "";

    const query = () => [...chosen].map((id) => `run=${encodeURIComponent(id)}`).join("&");

    const end = () => {
      stream?.close();
      current?.close();
      current = stream = null;
    };

    const follow = () => {
      end();
      place.replaceChildren();
      tools.hidden = !chosen.size;
      if (!chosen.size) return;
      const opened = page(place);
      current = opened;
      notice.textContent = fitune.say("reading the runs …");
      stream = fitune.follow(`/api/runs/follow?${query()}`, (kind, event) => {
        if (opened !== current) return;
        const start = performance.now();
        notice.textContent = kind === "error" ? event : "";
        if (kind === "page") {
          opened.patch(event);
          fitune.runs.updates += 1;
        }
        fitune.charts.busy.push(performance.now() - start);
      });
    };

    const choose = (id, isAdded) => {
      if (!isAdded) chosen.clear();
      if (isAdded && chosen.has(id)) chosen.delete(id);
      else chosen.add(id);
      history.replaceState(null, "", `#/runs/${encodeURIComponent([...chosen].join("\n"))}`);
      lastList = "";
      load();
      follow();
    };

    const row = (run) => {
      const box = make("input", { type: "checkbox", checked: chosen.has(run.id) });
      box.setAttribute("aria-label", `${fitune.say("compare")}: ${run.name}`);
      box.addEventListener("change", () => choose(run.id, true));
      const name = make("button", { type: "button", className: "name" }, make("bdi", { textContent: run.name }));
      name.addEventListener("click", () => choose(run.id, false));
      const place = [...chosen].indexOf(run.id);
      const state = make("span", { className: `state ${run.state}`, textContent: run.state_text });
      const facts = make("small", { className: "soft", textContent: run.facts });
      const line = make("li", {}, box, place < 0 ? make("span", { className: "swatch none" }) : swatch(place), name, state, facts);
      if (run.done !== undefined) {
        const bar = make("progress", { max: 1, value: run.done });
        bar.setAttribute("aria-label", run.state_text);
        line.append(bar);
      }
      return line;
    };

    const load = async () => {
      try {
        const found = await fitune.get("/api/runs");
        if (!list.isConnected) return;
        if (!chosen.size && found.runs.length) {
          chosen.add((found.runs.find((run) => run.state === "running") ?? found.runs[0]).id);
          follow();
        }
        const text = JSON.stringify(found);
        // what has the focus stays in the page while nothing changes
        if (text === lastList) return;
        lastList = text;
        const focus = [...list.children].findIndex((each) => each.contains(document.activeElement));
        const part = document.activeElement?.tagName;
        list.replaceChildren(...found.runs.map(row));
        drawTools(found.runs);
        list.children[focus]?.querySelector(part.toLowerCase())?.focus();
        if (!found.runs.length) notice.textContent = found.none;
      } catch (error) {
        notice.textContent = String(error.message ?? error);
      }
    };

    const act = (text, work) => {
      const button = make("button", { type: "button", textContent: fitune.say(text) });
      button.addEventListener("click", async () => {
        button.disabled = true;
        try {
          await work();
        } catch (error) {
          notice.textContent = error.message;
        }
        button.disabled = false;
      });
      return button;
    };

    const save = async () => {
      const { name, html } = await fitune.get(`/api/runs/report?${query()}`);
      const address = URL.createObjectURL(new Blob([html], { type: "text/html" }));
      make("a", { href: address, download: name }).click();
      URL.revokeObjectURL(address);
    };

    /* What can be done with the chosen runs; a run of a sweep is not started alone. */
    const drawTools = (runs) => {
      const [run] = chosen.size === 1 ? runs.filter((each) => chosen.has(each.id) && !each.id.includes("/")) : [];
      const can = run?.state === "running" ? "stop" : ["stopped", "crashed", "failed"].includes(run?.state) ? "resume" : "";
      if (tools.dataset.can === can && tools.children.length) return;
      tools.dataset.can = can;
      tools.replaceChildren(
        ...(can === "stop" ? [act("Stop after this step", () => fitune.post("/api/stop", { run: run.id }))] : []),
        ...(can === "resume" ? [act("Resume", () => fitune.post("/api/resume", { run: run.id }))] : []),
        act("Save as one file", save));
    };

    return {
      title: "Runs",
      show: (element, rest) => {
        list = make("ul", { className: "runs" });
        place = make("article", { className: "page" });
        notice = make("p", { className: "notice" });
        notice.setAttribute("role", "status");
        tools = make("div", { className: "actions", hidden: true });
        const side = make("aside", { className: "side" }, make("h2", { textContent: fitune.say("Runs") }), list);
        side.setAttribute("aria-label", fitune.say("Runs"));
        element.replaceChildren(make("div", { className: "split" }, side, make("div", { className: "content" }, notice, tools, place)));
        lastList = "";
        // the address has the runs that are shown, a line each
        if (rest) {
          chosen.clear();
          rest.split("\n").forEach((id) => chosen.add(id));
        }
        load();
        if (chosen.size) follow();
        timer = setInterval(load, 1000 * LIST_EVERY_SECONDS);
      },
      hide: () => {
        clearInterval(timer);
        end();
      },
    };
  };

  /* A report: its page alone, which the file contains. */
  const report = (content) => {
    let opened = null;
    return {
      title: "Report",
      show: (element) => {
        const place = make("article", { className: "page" });
        element.replaceChildren(place);
        opened = page(place);
        opened.patch(structuredClone(content));
        document.title = `${content.title} - fitune`;
      },
      hide: () => opened.close(),
      print: () => opened.print(),
    };
  };

  return { view, report, updates: 0 };
})();
(() => {
  const embedded = document.getElementById("fitune-page");
  if (!embedded) {
    fitune.view("runs", fitune.runs.view());
    return;
  }
  const shown = fitune.runs.report(JSON.parse(embedded.textContent));
  fitune.view("report", shown);
  const root = document.documentElement;
  let theme = "auto";
  window.addEventListener("beforeprint", () => {
    for (const details of document.querySelectorAll("details")) details.open = true;
    theme = root.dataset.theme;
    root.dataset.theme = "light";
    shown.print();
  });
  window.addEventListener("afterprint", () => { root.dataset.theme = theme; });
})();
