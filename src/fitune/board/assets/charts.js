"use strict";
/* Draws the charts of a page with plotly: small multiples of one size, each drawn when it comes into sight and
   once a frame, so that an update never holds the page. A chart is data as report/document.py describes it; its
   names reach plotly escaped, since plotly reads markup in them. */
fitune.charts = (() => {
  const DASHES = ["solid", "dash", "dashdot", "dot"];
  const NUM_COLOURS = 8, MOST_UNIFIED = 10, HEIGHT = 240, UPDATE_MS = 50, LATER_MS = 20000;
  const ESCAPES = { "&": "&amp;", "<": "&lt;", ">": "&gt;" };
  const plain = (text) => String(text).replace(/[&<>]/g, (found) => ESCAPES[found]);

  /* The colour of a variable as plotly understands it, without light-dark(). */
  const css = (name) => {
    probe.style.color = `var(${name})`;
    return getComputedStyle(probe).color;
  };
  const probe = document.createElement("span");
  probe.hidden = true;
  document.documentElement.append(probe);
  const colour = (index) => css(`--c${index % NUM_COLOURS}`);
  const dash = (index) => DASHES[(index + Math.floor(index / NUM_COLOURS)) % DASHES.length];

  const trace = (series, axis) => {
    const ink = colour(series.colour);
    const found = {
      type: "scatter", name: plain(series.name), y: series.y,
      x: (series.x[axis] ?? Object.values(series.x)[0]).map((value) => (typeof value === "string" ? plain(value) : value)),
    };
    if (series.labels) Object.assign(found, { text: series.labels.map(plain), hoverinfo: "text" });
    const line = { width: 1.75, color: ink, dash: dash(series.dash) };
    switch (series.kind) {
      case "bars": return { ...found, type: "bar", marker: { color: ink } };
      case "area": return { ...found, mode: "lines", stackgroup: "stack", line: { width: 0, color: ink }, fillcolor: ink };
      case "marks": return { ...found, mode: "markers", marker: { symbol: "diamond", size: 8, color: ink, line: { width: 1, color: css("--paper") } } };
      case "points": return { ...found, mode: "markers", marker: { size: 12 + 20 * series.size, color: ink, opacity: 0.85 } };
      case "faint": return { ...found, mode: "lines", opacity: 0.22, hoverinfo: "skip", line: { width: 1, color: ink } };
      case "marked line": return { ...found, mode: "lines+markers", line, marker: { size: 5, color: ink } };
      case "interval": return {
        ...found, mode: "markers", marker: { size: 9, color: ink },
        error_y: { type: "data", symmetric: false, array: [series.high - series.y[0]], arrayminus: [series.y[0] - series.low], color: ink, thickness: 2, width: 8 },
      };
      default: return { ...found, mode: "lines", line };
    }
  };

  const layout = (chart, axis, { isLarge, isLog, width }) => {
    const series = Object.values(chart.series);
    const grid = { gridcolor: css("--line"), zerolinecolor: css("--line"), linecolor: css("--line"), automargin: false };
    const isStack = series.some((each) => each.kind === "area");
    const isOverlay = series.some((each) => each.run !== undefined && each.kind !== "interval");
    const top = Math.max(...chart.lines.map(({ y }) => y));
    const isLarger = series.some((each) => each.y.some((value) => Math.abs(value) >= 10000));
    return {
      width, height: isLarge ? 2 * HEIGHT : HEIGHT,
      margin: { l: 50, r: 12, t: 10, b: 38 },
      font: { color: css("--ink"), size: 11, family: getComputedStyle(document.body).fontFamily },
      paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)",
      xaxis: { ...grid, title: { text: plain(chart.axes[axis] ?? Object.values(chart.axes)[0]), standoff: 6 }, nticks: 6 },
      yaxis: {
        ...grid, title: { text: plain(chart.y_title), standoff: 6 }, nticks: 6, exponentformat: "e",
        ...(isLarger ? { tickformat: "~s" } : {}),
        type: isLog && isOverlay ? "log" : "linear", rangemode: chart.from_zero && !isLog ? "tozero" : "normal",
      },
      hovermode: isStack || (isOverlay && series.length <= MOST_UNIFIED) ? "x unified" : "closest",
      hoverlabel: { bgcolor: css("--paper"), bordercolor: css("--line"), font: { color: css("--ink") } },
      showlegend: false,
      shapes: chart.lines.map(({ y }) => ({
        type: "line", xref: "paper", x0: 0, x1: 1, y0: y, y1: y, line: { dash: "dot", width: 1.5, color: css("--ink") },
      })),
      annotations: chart.lines.map(({ name, y }) => ({
        text: plain(name), xref: "paper", x: 1, y, xanchor: "right", yanchor: y === top ? "bottom" : "top", showarrow: false, font: { size: 10 },
      })),
      uirevision: `${axis} ${isLog}`,
    };
  };

  /* Arrow keys move, + and - zoom, 0 shows all. */
  const keys = (event) => {
    const plot = event.currentTarget, range = plot.layout?.xaxis?.range;
    if (!range || typeof range[0] !== "number") return;
    const width = range[1] - range[0], middle = (range[0] + range[1]) / 2;
    const moves = {
      ArrowLeft: [range[0] - width / 5, range[1] - width / 5],
      ArrowRight: [range[0] + width / 5, range[1] + width / 5],
      "+": [middle - width / 3, middle + width / 3],
      "-": [middle - width * 0.75, middle + width * 0.75],
    };
    if (event.key === "0") Plotly.relayout(plot, { "xaxis.autorange": true, "yaxis.autorange": true });
    else if (event.key in moves) Plotly.relayout(plot, { "xaxis.range": moves[event.key] });
    else return;
    event.preventDefault();
  };

  const make = (tag, properties, ...children) => {
    const element = Object.assign(document.createElement(tag), properties);
    element.append(...children);
    return element;
  };

  /* The legend of a part of a stack. */
  const part = (series) => {
    const square = make("i", {});
    square.style.background = `var(--c${series.colour % NUM_COLOURS})`;
    return make("li", {}, square, make("bdi", { textContent: series.name }));
  };

  /* A grid of charts in `place`. update(charts) shows them; axis(name), log(isLog) and hide(runs) change all of them. */
  const grid = (place) => {
    const figures = new Map(), waiting = new Set();
    const shown = { axis: "step", isLog: false, hidden: new Set() };
    let isDrawing = false, isClosed = false, budget = Infinity, later = 0;

    const draw = async (figure) => {
      const Plotly = window.Plotly ?? await fitune.plotly();
      const start = performance.now(), chart = figure.chart;
      const series = Object.values(chart.series).filter((each) => !shown.hidden.has(each.run));
      await Plotly.react(figure.plot, series.map((each) => trace(each, shown.axis)),
        layout({ ...chart, series }, shown.axis, { isLarge: figure.isLarge, isLog: shown.isLog, width: figure.plot.clientWidth }),
        { displayModeBar: false, doubleClick: "reset", responsive: false });
      figure.plot.dataset.drawn = String(Number(figure.plot.dataset.drawn ?? 0) + 1);
      fitune.charts.busy.push(performance.now() - start);
      if (fitune.charts.busy.length > 1000) fitune.charts.busy.splice(0, 500);
    };

    const work = async () => {
      isDrawing = true;
      for (;;) {
        const figure = [...waiting].find((each) => each.isVisible);
        if (isClosed || !figure || budget <= 0) break;
        waiting.delete(figure);
        const start = performance.now();
        try {
          await draw(figure);
        } catch (error) {
          figure.plot.textContent = `${fitune.say("this chart could not be drawn")}: ${error}`;
          document.documentElement.dataset.fault = String(error);
        }
        budget -= performance.now() - start;
        await new Promise((resume) => setTimeout(resume));
      }
      isDrawing = false;
      clearTimeout(later);
      // of a run that has ended no update follows
      if (!isClosed && [...waiting].some((each) => each.isVisible)) later = setTimeout(() => waiting.forEach((figure) => ask(figure)), LATER_MS);
    };
    const ask = (figure, most = Infinity) => {
      waiting.add(figure);
      budget = most;
      if (!isDrawing) work();
    };
    const askAll = () => figures.forEach((figure) => ask(figure));

    const seen = new IntersectionObserver((entries) => {
      for (const entry of entries) {
        const figure = entry.target.figure;
        figure.isVisible = entry.isIntersecting;
        if (waiting.has(figure)) ask(figure);
      }
    }, { rootMargin: "40px" });
    const sized = new ResizeObserver((entries) => {
      for (const { target, contentRect } of entries) {
        const figure = target.figure;
        if (figure.width !== contentRect.width && figure.plot.dataset.drawn) ask(figure);
        figure.width = contentRect.width;
      }
    });

    const build = (key) => {
      const title = make("span", {}), note = make("p", { className: "soft note" });
      const larger = make("button", { type: "button", className: "quiet", textContent: "⤢" });
      larger.title = fitune.say("larger or smaller");
      larger.setAttribute("aria-label", larger.title);
      larger.setAttribute("aria-pressed", "false");
      const parts = make("ul", { className: "parts" });
      const plot = make("div", { className: "plot", tabIndex: 0 });
      plot.setAttribute("role", "img");
      plot.addEventListener("keydown", keys);
      const element = make("figure", { className: "chart" }, make("figcaption", {}, title, larger), plot, parts, note);
      element.dataset.key = key;
      const figure = { element, plot, title, note, parts, isVisible: false, isLarge: false };
      element.figure = figure;
      larger.addEventListener("click", () => {
        figure.isLarge = !figure.isLarge;
        element.classList.toggle("large", figure.isLarge);
        larger.setAttribute("aria-pressed", String(figure.isLarge));
        ask(figure);
      });
      figures.set(key, figure);
      seen.observe(element);
      sized.observe(element);
      return figure;
    };

    const remove = (key) => {
      const { element, plot } = figures.get(key);
      seen.unobserve(element);
      sized.unobserve(element);
      window.Plotly?.purge(plot);
      element.remove();
      figures.delete(key);
    };

    const dark = window.matchMedia("(prefers-color-scheme: dark)");
    const themed = new MutationObserver(askAll);
    themed.observe(document.documentElement, { attributes: true, attributeFilter: ["data-theme", "class"] });
    dark.addEventListener("change", askAll);

    return {
      /* changed: the keys to draw again; the others are as they were */
      update: (charts, changed) => {
        for (const key of [...figures.keys()]) if (!(key in charts)) remove(key);
        for (const [key, chart] of Object.entries(charts)) {
          const isNew = !figures.has(key);
          if (!isNew && changed && !changed.has(key)) continue;
          const figure = figures.get(key) ?? build(key);
          figure.chart = chart;
          figure.title.textContent = chart.title;
          figure.note.textContent = chart.note;
          figure.parts.replaceChildren(...Object.values(chart.series).filter(({ kind }) => kind === "area" || kind === "marks").map(part));
          figure.plot.setAttribute("aria-label", chart.says);
          if (isNew) place.append(figure.element);
          // what an update has no time for is drawn first with the next one
          ask(figure, isNew ? Infinity : UPDATE_MS);
        }
      },
      axis: (name) => { shown.axis = name; askAll(); },
      log: (isLog) => { shown.isLog = isLog; askAll(); },
      hide: (runs) => { shown.hidden = runs; askAll(); },
      /* draws all at once, also what is out of sight, for a printer */
      all: () => figures.forEach((figure) => { waiting.delete(figure); draw(figure); }),
      close: () => {
        isClosed = true;
        for (const key of [...figures.keys()]) remove(key);
        seen.disconnect();
        sized.disconnect();
        themed.disconnect();
        dark.removeEventListener("change", askAll);
      },
    };
  };

  /* A swatch of a run's colour and dash, for legends and lists. */
  const swatch = (index) => {
    const element = make("span", { className: "swatch" });
    element.style.borderTopColor = `var(--c${index % NUM_COLOURS})`;
    element.style.borderTopStyle = { solid: "solid", dash: "dashed", dashdot: "double", dot: "dotted" }[dash(index)];
    return element;
  };

  return { grid, swatch, make, busy: [] };
})();
