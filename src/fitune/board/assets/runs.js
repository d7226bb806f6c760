"use strict";
/* The Runs view. */
fitune.view("runs", {
  title: "Runs",
  show(element) {
    element.append(fitune.element("h1", { text: fitune.say("Runs") }));
  },
  hide() {},
});
