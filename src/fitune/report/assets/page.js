"use strict";
/* Draws the figures of a report, themes them, and switches their axis. Nothing is fetched; nothing in the data is run:
   names and labels reach plotly escaped, and everything else stands in the page as text. */
(() => {
  const figures = JSON.parse(document.getElementById("fitune-figures").textContent);
  const words = figures.words;
  const dark = window.matchMedia("(prefers-color-scheme: dark)");
  const plots = [];

  const theme = (isDark) => {
    const ink = isDark ? "#e8e8e8" : "#1a1a1a", rule = isDark ? "#3a4046" : "#dddddd";
    const axis = { gridcolor: rule, zerolinecolor: rule, linecolor: rule };
    const flat = {};
    for (const name of ["xaxis", "yaxis"])
      for (const [key, value] of Object.entries(axis)) flat[`${name}.${key}`] = value;
    return { "font.color": ink, paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)", ...flat };
  };

  const relayout = (changes) => Promise.all(plots.map((plot) => Plotly.relayout(plot, changes)));

  const chooseAxis = (axis) => {
    for (const plot of plots) {
      const axes = plot.fitune.axes;
      if (!(axis in axes)) continue;
      Plotly.update(plot, { x: plot.fitune.xs.map((each) => each[axis]) },
        { "xaxis.title.text": axes[axis], "xaxis.autorange": true });
      plot.dataset.axis = axis;
    }
  };

  const keys = (event) => {
    const plot = event.currentTarget, range = plot.layout.xaxis.range;
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

  const draw = async () => {
    for (const figure of figures.pictures) {
      const plot = document.getElementById(figure.id);
      plot.fitune = figure;
      await Plotly.newPlot(plot, figure.data, figure.layout, {
        responsive: true, displaylogo: false, modeBarButtonsToRemove: ["select2d", "lasso2d"],
      });
      await Plotly.relayout(plot, theme(dark.matches));
      plot.addEventListener("keydown", keys);
      new ResizeObserver(() => Plotly.Plots.resize(plot)).observe(plot);
      plots.push(plot);
    }
    const asked = new URLSearchParams(location.hash.slice(1)).get("x");
    for (const input of document.querySelectorAll("input[name=axis]")) {
      input.addEventListener("change", () => {
        chooseAxis(input.value);
        history.replaceState(null, "", `#x=${input.value}`);
      });
      if (input.value === asked) { input.checked = true; chooseAxis(asked); }
    }
    document.documentElement.dataset.drawn = String(plots.length);
  };

  dark.addEventListener("change", () => relayout(theme(dark.matches)));
  window.addEventListener("beforeprint", () => {
    for (const details of document.querySelectorAll("details")) details.open = true;
    relayout({ ...theme(false), width: 660, autosize: false });
  });
  window.addEventListener("afterprint", () => relayout({ ...theme(dark.matches), width: null, autosize: true }));
  window.addEventListener("error", (event) => { document.documentElement.dataset.fault = event.message; });
  draw().catch((error) => {
    document.documentElement.dataset.fault = String(error);
    document.getElementById("fault").textContent = `${words.fault}: ${error}`;
  });
})();
