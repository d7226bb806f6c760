"use strict";
/*
The frame of the page: tabs, language, light and dark, and what the views share.

  fitune.view(name, {title, show(element, rest), hide()})   registers the tab `#/name`; rest: what follows in the address
  fitune.say(english, {value})       the sentence in the page's language, its {names} replaced
  fitune.element(tag, {...}, ...)    an element; text is never read as HTML
  fitune.get(path), fitune.post(path, body)                 promises of JSON; an error has the server's sentence
  fitune.follow(path, onEvent, body) server-sent events: onEvent(name, data); returns {close()}
  fitune.plotly()                    a promise of plotly, which is loaded when it is first needed
  fitune.colour(name)                the value of a CSS variable, such as "c0"
*/
const fitune = (function () {
  const views = new Map();
  const words = JSON.parse(document.getElementById("fitune-words").textContent);
  let shown = null;
  let loadedPlotly = null;

  /* An offline page has neither a server nor, in some browsers, a place to keep things. */
  function kept(storage, name, value) {
    try {
      if (value !== undefined) window[storage].setItem(name, value);
      return window[storage].getItem(name);
    } catch (error) {
      return null;
    }
  }

  function say(english, values) {
    const sentence = (self.language === "zh" && words[english]) || english;
    return sentence.replace(/\{(\w+)\}/g, (whole, name) => (values && name in values ? String(values[name]) : whole));
  }

  function element(tag, attributes, ...children) {
    const made = tag === "svg" || tag === "rect" || tag === "line" || tag === "path"
      ? document.createElementNS("http://www.w3.org/2000/svg", tag) : document.createElement(tag);
    for (const [name, value] of Object.entries(attributes || {})) {
      if (value === undefined || value === null || value === false) continue;
      if (name === "text") made.textContent = value;
      else if (name === "style") for (const [key, each] of Object.entries(value)) made.style.setProperty(key, each);
      else if (name.startsWith("on")) made.addEventListener(name.slice(2), value);
      else made.setAttribute(name, value === true ? "" : value);
    }
    made.append(...children.filter((child) => child !== null && child !== undefined));
    return made;
  }

  function headers() {
    return {
      "X-Fitune-Token": kept("sessionStorage", "fitune-token") || "",
      "X-Fitune-Language": self.language,
    };
  }

  async function request(path, options) {
    let response;
    try {
      response = await fetch(path, options);
    } catch (error) {
      if (error.name === "AbortError") throw error;
      throw new Error(say("the board does not answer: is fitune board still running?"));
    }
    if (response.ok) return response;
    let sentence = "";
    try {
      sentence = (await response.json()).error;
    } catch (error) {
      // not of this server
    }
    throw new Error(sentence || `${response.status} ${response.statusText}`);
  }

  function posted(body) {
    return { method: "POST", headers: { ...headers(), "Content-Type": "application/json" }, body: JSON.stringify(body) };
  }

  async function get(path) {
    return (await request(path, { headers: headers() })).json();
  }

  async function post(path, body) {
    return (await request(path, posted(body))).json();
  }

  async function readEvents(path, options, onEvent) {
    const response = await request(path, options);
    const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
    let text = "";
    for (;;) {
      const { done, value } = await reader.read();
      if (done) return;
      text += value;
      const blocks = text.split("\n\n");
      text = blocks.pop();
      for (const block of blocks) {
        const lines = block.split("\n");
        const part = (name) => (lines.find((line) => line.startsWith(name)) || name).slice(name.length);
        if (part("data: ")) onEvent(part("event: ") || "message", JSON.parse(part("data: ")));
      }
    }
  }

  /* Without a body the events are followed again when the connection was lost. A lost connection and an
     error of the server come as the event "error" with a sentence. */
  function follow(path, onEvent, body) {
    const aborting = new AbortController();
    (async function () {
      while (!aborting.signal.aborted) {
        const options = { ...(body === undefined ? { headers: headers() } : posted(body)), signal: aborting.signal };
        try {
          await readEvents(path, options, onEvent);
        } catch (error) {
          if (aborting.signal.aborted) return;
          onEvent("error", error.message);
        }
        if (body !== undefined) return;
        await new Promise((resolve) => setTimeout(resolve, 2000));
      }
    })();
    return { close: () => aborting.abort() };
  }

  function plotly() {
    if (window.Plotly) return Promise.resolve(window.Plotly);
    loadedPlotly = loadedPlotly || new Promise((resolve, reject) => {
      const script = element("script", { src: "/assets/plotly.js" });
      script.addEventListener("load", () => resolve(window.Plotly));
      script.addEventListener("error", () => reject(new Error(say("the charts could not be loaded"))));
      document.head.append(script);
    });
    return loadedPlotly;
  }

  function colour(name) {
    return getComputedStyle(document.documentElement).getPropertyValue(`--${name}`).trim();
  }

  function gib(bytes, digits = 1) {
    return (bytes / 2 ** 30).toFixed(digits);
  }

  function fault(sentence) {
    document.getElementById("fault").textContent = sentence || "";
  }

  function view(name, given) {
    views.set(name, given);
  }

  function place() {
    const [name, ...rest] = decodeURIComponent(location.hash.replace(/^#\/?/, "")).split("/");
    return views.has(name) ? [name, rest.join("/")] : [[...views.keys()][0], ""];
  }

  function show() {
    const [name, rest] = place();
    if (shown && views.get(shown).hide) views.get(shown).hide();
    fault("");
    drawTop(name);
    const main = document.getElementById("main");
    main.replaceChildren();
    shown = name;
    views.get(name).show(main, rest);
  }

  function drawTop(current) {
    document.documentElement.lang = self.language;
    document.title = `${say(views.get(current).title)} - fitune`;
    document.getElementById("skip").textContent = say("to the content");
    const tabs = [...views].map(([name, each]) =>
      element("a", { href: `#/${name}`, "aria-current": name === current ? "page" : null, text: say(each.title) }));
    const theme = document.documentElement.dataset.theme || "auto";
    const themes = { auto: "light", light: "dark", dark: "auto" };
    const named = { auto: say("as the system"), light: say("light"), dark: say("dark") };
    document.getElementById("top").replaceChildren(
      element("span", { class: "brand", text: "fitune" }),
      element("nav", { "aria-label": say("views") }, ...tabs),
      element("button", {
        type: "button", class: "quiet", text: { auto: "◐", light: "☀", dark: "☾" }[theme], title: named[theme],
        "aria-label": say("colours: {name}", { name: named[theme] }), id: "theme",
        onclick: () => { setTheme(themes[theme]); show(); document.getElementById("theme").focus(); },
      }),
      // a report is of one language
      ...(document.documentElement.dataset.language ? [] : [element("button", {
        type: "button", class: "quiet", text: self.language === "zh" ? "English" : "中文", id: "language",
        lang: self.language === "zh" ? "en" : "zh",
        onclick: () => {
          self.language = self.language === "zh" ? "en" : "zh";
          kept("localStorage", "fitune-language", self.language);
          show();
          document.getElementById("language").focus();
        },
      })]),
    );
  }

  function setTheme(theme) {
    document.documentElement.dataset.theme = theme;
    kept("localStorage", "fitune-theme", theme);
  }

  /* The address as it was printed has the token, which is taken out of it and of the history. */
  function takeToken() {
    const found = location.hash.match(/^#token=([\w-]+)$/);
    if (!found) return;
    kept("sessionStorage", "fitune-token", found[1]);
    history.replaceState(null, "", location.pathname + location.search);
  }

  function firstLanguage() {
    const language = document.documentElement.dataset.language || kept("localStorage", "fitune-language") || navigator.language;
    return language.startsWith("zh") ? "zh" : "en";
  }

  const self = { language: firstLanguage(), say, element, get, post, follow, plotly, colour, gib, fault, view, show };
  /* The classes of memory with their colours, which are the same in every picture. */
  self.categories = [
    ["parameter", "c0"], ["gradient", "c1"], ["optimizer_state", "c2"], ["activation", "c3"], ["temporary", "c4"],
    ["input", "c5"], ["workspace", "c6"],
  ];
  takeToken();
  setTheme(kept("localStorage", "fitune-theme") || "auto");
  // not before the other scripts have registered their views
  document.addEventListener("DOMContentLoaded", () => {
    window.addEventListener("hashchange", () => { takeToken(); show(); });
    show();
  });
  return self;
})();
