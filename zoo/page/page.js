// Starts the page.
"use strict";

const DATA = JSON.parse(Page.get("data").textContent);
Page.get("title").textContent = DATA.title;
Page.get("subtitle").textContent = `${Show.count(DATA.engines.length, "engine")} of ${Show.count(DATA.builds.length, "build")}, registry ${DATA.registry}`;
if (DATA.random_weights.length) {
  Page.get("alarm").textContent = `Random weights: the networks of ${DATA.random_weights.join(", ")} are untrained, their accuracies mean nothing.`;
  Page.get("alarm").hidden = false;
}
Frontier.start(DATA);
Builds.start(DATA);
Page.get("footer").textContent = `Made by ${DATA.made_by} on ${DATA.made_at}. Intervals: 95 % by Clopper and Pearson over the test images. This page contains everything it shows and uses no network.`;
