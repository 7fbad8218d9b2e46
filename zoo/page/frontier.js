// The frontier: accuracy over latency, multiply-adds or size, the budget line and what pick answers.
"use strict";

const Frontier = {
  limits: {latency_ms: null, min_accuracy: null, max_size_bytes: null},

  start(data) {
    this.data = data;
    Page.options(Page.get("percentile"), data.percentiles.map(name => [name, name]));
    for (const id of ["device", "family", "batch", "axis", "percentile", "intervals", "logarithmic"]) {
      Page.get(id).addEventListener("change", () => this.choose(id));
    }
    for (const id of ["limit-latency", "limit-accuracy", "limit-size"]) {
      Page.get(id).addEventListener("input", () => this.readLimits());
    }
    Page.get("copy").addEventListener("click", () => this.copy());
    Page.get("all-rows").addEventListener("change", () => this.table());
    Budget.start(this);
    this.choose("device");
  },

  /** Fills the selects from left to right: each offers what the ones before it leave. */
  choose(changed) {
    const all = this.data.comparisons;
    const device = Page.get("device"), family = Page.get("family"), batch = Page.get("batch");
    const where = one => JSON.stringify([one.device, one.hardware]);
    Page.options(device, unique(all.map(where)).map(key => [key, JSON.parse(key).filter(Boolean).join(": ")]), true);
    const here = all.filter(one => where(one) === device.value);
    const families = unique(here.map(one => one.family));
    const several = families.filter(one => one !== null).length > 1;
    // with one family, a pick over all of them is the same but for accuracies that are only claimed
    const offered = several || families.length < 2 ? families : families.filter(one => one !== null);
    Page.options(family, offered.map(one => [one === null ? "" : `=${one}`, one === null ? "all" : one]));
    const own = here.filter(one => (one.family === null ? "" : `=${one.family}`) === family.value);
    Page.options(batch, unique(own.map(one => one.batch)).map(one => [String(one), String(one)]));
    this.comparison = own.find(one => String(one.batch) === batch.value) || own[0];
    this.percentile = Page.get("percentile").value;
    this.items = Choice.items(this.comparison, this.data.engines, this.data.percentiles);
    const timed = this.items.some(item => item.ms[this.percentile] !== null);
    if (changed !== "axis" && !timed && Page.get("axis").value === "latency" && !this.items.length) {
      Page.get("axis").value = "macs";
    }
    this.axis = Page.get("axis").value;
    if (!["intervals", "logarithmic"].includes(changed)) Page.get("logarithmic").checked = this.isWide();
    if (this.limits.latency_ms === null || ["device", "family", "batch"].includes(changed)) this.firstBudget();
    this.draw();
    this.update();
  },

  /** The cost of an item on the horizontal axis; null where it is unknown. */
  cost(item) {
    if (this.axis === "latency") return item.ms[this.percentile];
    return this.axis === "macs" ? item.engine.macs : item.engine.size_bytes / 1e6;
  },

  isWide() {
    const costs = this.shown().map(item => this.cost(item)).filter(one => one !== null);
    return costs.length > 1 && Math.max(...costs) > 8 * Math.min(...costs);
  },

  /** Items of the comparison; over multiply-adds and size also those that no latency compares. */
  shown() {
    if (this.axis === "latency") return this.items;
    const places = new Set(this.items.map(item => item.place));
    const {family, device} = this.comparison;
    const others = this.data.engines.map((engine, place) => ({engine, place, ms: {}, order: 0, other: true}))
      .filter(item => item.engine.device === device && !places.has(item.place)
        && (family === null || family.includes("@") || item.engine.family === family));
    return [...this.items, ...others];
  },

  /** In the middle of the frontier. */
  firstBudget() {
    const cost = item => item.ms[this.percentile];
    const best = Choice.frontier(this.items, cost, this.percentile);
    this.limits = {latency_ms: null, min_accuracy: null, max_size_bytes: null};
    if (best.length) this.limits.latency_ms = roundUp(cost(best[Math.floor((best.length - 1) / 2)]) * 1.04);
    this.writeLimits();
  },

  writeLimits() {
    const {latency_ms, min_accuracy, max_size_bytes} = this.limits;
    Page.get("limit-latency").value = latency_ms === null ? "" : String(latency_ms);
    Page.get("limit-accuracy").value = min_accuracy === null ? "" : String(min_accuracy);
    Page.get("limit-size").value = max_size_bytes === null ? "" : String(max_size_bytes / 1e6);
  },

  readLimits() {
    const read = (id, scale) => {
      const value = Number(Page.get(id).value);
      return Page.get(id).value !== "" && value > 0 ? value * scale : null;
    };
    this.limits = {
      latency_ms: read("limit-latency", 1), min_accuracy: read("limit-accuracy", 1),
      max_size_bytes: read("limit-size", 1e6),
    };
    if (this.limits.max_size_bytes !== null) this.limits.max_size_bytes = Math.max(1, Math.round(this.limits.max_size_bytes));
    this.update();
  },

  /** What depends on limits: the line, the answer and the marks. */
  update() {
    this.found = this.limits.latency_ms === null ? null : Choice.answer(this.items, this.percentile, this.limits);
    Budget.place();
    this.answer();
    this.mark();
    this.table();
  },

  answer() {
    const box = Page.get("answer"), {comparison, found} = this;
    const command = Page.get("command-box");
    command.hidden = !this.items.length || !found;
    if (!command.hidden) {
      Page.get("command").textContent = Choice.command(this.data, comparison, this.percentile, this.limits);
    }
    if (!this.items.length) return box.replaceChildren(Page.make("p", comparison.error || "No engine compares."));
    if (!found) return box.replaceChildren(Page.make("p", "Enter a latency above zero."));
    if (!found.best) {
      const some = this.items.some(item => item.ms[this.percentile] !== null);
      const why = some ? "No engine is within these limits." : `The ${this.percentile} of these engines is not known: a roofline predicts the median only.`;
      return box.replaceChildren(Page.make("p", why, "winner"));
    }
    const {engine} = found.best, several = unique(this.items.map(item => item.engine.family)).length > 1;
    const rows = [
      ["latency", `${Show.latency(found.best.ms[this.percentile])} (${this.percentile}, ${found.best.origin})`],
      ["top-1", Show.top1(engine)], ["size", Show.size(engine.size_bytes)], ["MACs", Show.macs(engine.macs)],
      ["fitting", `${found.fitting} of ${Show.count(this.items.length, "engine")}`],
    ];
    if (found.faster) rows.push(["faster", this.beside(found.faster)]);
    if (found.slower) rows.push(["slower", this.beside(found.slower)]);
    const name = several ? `${engine.family}: ${engine.route}` : engine.route;
    return box.replaceChildren(Page.make("p", name, "winner"), Page.make("p", Show.made(engine), "muted"), Page.facts(rows));
  },

  beside(item) {
    const points = item.engine.top1 - this.found.best.engine.top1;
    const sign = points > 0 ? "+" : "−";
    return `${item.engine.route} (${item.engine.precision}): ${Show.latency(item.ms[this.percentile])}, ${sign}${Math.abs(points).toFixed(2)} points`;
  },

  async copy() {
    const text = Page.get("command").textContent, button = Page.get("copy");
    try {
      await navigator.clipboard.writeText(text);
      button.textContent = "Copied";
    } catch {  // not allowed for pages from a disk: select it for Ctrl-C
      getSelection().selectAllChildren(Page.get("command"));
      button.textContent = "Selected";
    }
    setTimeout(() => { button.textContent = "Copy"; }, 1500);
  },

  table() {
    const cost = item => this.cost(item);
    const best = new Set(Choice.frontier(this.items, cost, this.percentile));
    const rows = [...this.shown()].filter(item => Page.get("all-rows").checked || best.has(item))
      .sort((a, b) => cost(a) - cost(b));
    const headings = ["family", "route", "runtime, precision", "top-1", "95 % interval", ...this.data.percentiles, "MACs", "size", "how it was chosen"];
    const head = Page.make("tr");
    head.append(...headings.map((name, column) => Page.make("th", name, column > 2 && column < 10 ? "number" : "")));
    const body = rows.map(item => {
      const {engine} = item, row = Page.make("tr", "", best.has(item) && Page.get("all-rows").checked ? "best" : "");
      if (this.found && item === this.found.best) row.classList.add("answer-row");
      const interval = engine.top1_interval ? engine.top1_interval.map(one => one.toFixed(2)).join(" – ") : "claimed";
      const ms = this.data.percentiles.map(name => item.other || item.ms[name] === null ? "" : Show.latency(item.ms[name]));
      const cells = [engine.family, engine.route, Show.made(engine), `${engine.top1.toFixed(2)} %`, interval, ...ms, Show.macs(engine.macs), Show.size(engine.size_bytes), engine.chosen];
      row.append(...cells.map((text, column) => Page.make("td", text, column > 2 && column < 10 ? "number" : "")));
      return row;
    });
    const thead = Page.make("thead"), tbody = Page.make("tbody");
    thead.append(head);
    tbody.append(...body);
    Page.get("table").replaceChildren(thead, tbody);
  },
};

function unique(values) { return [...new Set(values)]; }

/** Three significant digits, not below the value. */
function roundUp(value) {
  const step = 10 ** (Math.floor(Math.log10(value)) - 2);
  return Number((Math.ceil(value / step) * step).toPrecision(3));
}
