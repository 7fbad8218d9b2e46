// How the frontier is drawn.
"use strict";

const SYMBOLS = {fp32: "circle", int8: "diamond", fp16: "square", bf16: "triangle-up"};

Object.assign(Frontier, {
  draw() {
    const {comparison} = this, items = this.shown();
    const evaluated = this.evaluated();
    Page.get("empty").hidden = items.length > 0;
    Page.get("plot").hidden = items.length === 0;
    Page.get("left-out").replaceChildren(...comparison.left_out.map(clause => Page.make("li", `Not compared: ${clause}`)));
    Page.get("sentence").textContent = this.describe(items);
    Page.get("marks").textContent = items.length ? this.marks(items) : "";
    if (!items.length) {
      Page.get("empty").textContent = comparison.error || "No engine of this selection compares.";
      Plotly.purge("plot");
      return;
    }
    this.best = Choice.frontier(this.items, item => this.cost(item), this.percentile);
    const traces = [this.line(), ...this.straight(), ...this.groups(items), ...(evaluated.length ? [this.dots(evaluated)] : []), this.winner()];
    Plotly.react("plot", traces, this.layout(), CONFIG);
    if (!this.listening) {
      this.listening = true;
      Page.get("plot").on("plotly_afterplot", () => Budget.place());
      Page.get("plot").on("plotly_relayouting", () => Budget.place());
    }
  },

  /** Routes that a build evaluated and made no engine of: they have multiply-adds only. */
  evaluated() {
    if (this.axis !== "macs") return [];
    const builds = new Set(this.items.map(item => item.engine.build_id));
    return this.data.builds.filter(build => builds.has(build.id)).flatMap(build => build.evaluated.map(one => ({...one, family: build.family})));
  },

  /** What the picture shows, in a sentence or two. */
  describe(items) {
    const families = unique(items.map(item => item.engine.family));
    const engines = Show.count(items.length, "engine");
    const named = families.length > 1 ? ` of ${families.length} families` : families.length ? ` of ${families[0]}` : "";
    const cost = {latency: "faster", macs: "fewer multiply-adds", size: "smaller"}[this.axis];
    const drag = this.axis === "macs" ? "Choose latency or size as horizontal axis to set a budget." : "Drag the orange line, or type, to see what klas-zoo pick answers for a budget.";
    if (!items.length) return "";
    return `Each mark is one of ${engines}${named}: the higher, the more accurate; the further left, the ${cost}. `
      + `The black line is the best accuracy that a budget buys; marks below it are never the answer. ${drag}`;
  },

  /** What shapes mean, of those that are there. */
  marks(items) {
    const shapes = {circle: "circle", diamond: "diamond", square: "square", "triangle-up": "triangle"};
    const precisions = unique(items.map(item => item.engine.precision)).sort();
    const words = precisions.map(name => `${shapes[SYMBOLS[name] || "circle"]} ${name}`);
    if (items.some(item => item.engine.plain)) words.push("large with a dark edge: a network as it is, not stitched");
    words.push("faded: another engine costs as little and is more accurate");
    if (items.some(item => item.other)) words.push("very faint: its latency does not compare");
    return `${words.join("; ")}. Bars are 95 % confidence intervals of the frontier's accuracies.`;
  },

  hover(item) {
    const {engine} = item, plain = Page.plain;
    const ms = item.other ? "" : this.data.percentiles.filter(name => item.ms[name] !== null)
      .map(name => `${name} ${Show.latency(item.ms[name])}`).join(" · ");
    const lines = [
      `<b>${plain(engine.route)}</b>`, `${plain(engine.family)}, ${plain(Show.made(engine))}`, plain(`top-1 ${Show.top1(engine)}`),
      ms ? plain(`${ms} (${item.origin})`) : plain(engine.reason || "latency not compared"),
      `${Show.macs(engine.macs)} MACs · ${Show.size(engine.size_bytes)}`,
    ];
    if (engine.chosen) lines.push(plain(engine.chosen));
    return lines.join("<br>");
  },

  /** Marks by family where there are several, else by precision; anchors are larger and named. */
  groups(items) {
    const families = unique(items.map(item => item.engine.family)).sort();
    const several = families.length > 1;
    const key = item => several ? item.engine.family : `${item.engine.precision}${item.engine.runtime === "onnxruntime" ? "" : `, ${item.engine.runtime}`}`;
    const best = new Set(this.best), everything = Page.get("intervals").checked;
    return unique(items.map(key)).sort().map((name, number) => {
      const own = items.filter(item => key(item) === name && this.cost(item) !== null);
      const bar = (item, side) => item.engine.top1_interval && (everything || best.has(item)) ? Math.abs(item.engine.top1_interval[side] - item.engine.top1) : 0;
      const colour = COLOURS[number % COLOURS.length];
      return {
        name: Page.plain(name), type: "scatter", mode: "markers+text", x: own.map(item => this.cost(item)), y: own.map(item => item.engine.top1),
        text: own.map(item => item.engine.plain && (best.has(item) || (!several && item.engine.precision === "fp32")) ? Page.plain(item.engine.route) : ""),
        textposition: "bottom right", textfont: {size: 12}, cliponaxis: false,
        customdata: own.map(item => this.hover(item)), hovertemplate: "%{customdata}<extra></extra>",
        error_y: {type: "data", symmetric: false, array: own.map(item => bar(item, 1)), arrayminus: own.map(item => bar(item, 0)), thickness: 1.1, width: 3, color: `${colour}88`},
        marker: {
          color: colour, symbol: own.map(item => SYMBOLS[item.engine.precision] || "circle"),
          size: own.map(item => item.engine.plain ? 13 : 10), opacity: own.map(item => item.other ? 0.25 : best.has(item) ? 1 : 0.5),
          line: {width: own.map(item => item.engine.plain ? 2 : 0.8), color: own.map(item => item.engine.plain ? "#1b2733" : "#fff")},
        },
      };
    });
  },

  line() {
    const x = this.best.map(item => this.cost(item)), y = this.best.map(item => item.engine.top1);
    const costs = this.items.map(item => this.cost(item)).filter(one => one !== null);
    if (x.length) { x.push(Math.max(...costs)); y.push(y[y.length - 1]); }
    return {name: "best within a budget", type: "scatter", mode: "lines", x, y, line: {shape: "hv", color: "#1b2733", width: 1.6}, hoverinfo: "skip"};
  },

  /** The straight lines between the anchors of a family alone: what mixing them would give. */
  straight() {
    const families = unique(this.items.map(item => item.engine.family));
    if (families.length !== 1) return [];
    const anchors = this.items.filter(item => item.engine.plain && item.engine.precision === "fp32" && this.cost(item) !== null);
    const ends = Choice.frontier(anchors, item => this.cost(item), this.percentile);
    if (ends.length < 2) return [];
    const x = [], y = [];  // enough points for a logarithmic axis, where straight lines bend
    for (let k = 1; k < ends.length; k++) {
      for (let part = 0; part <= 24; part++) {
        const between = (from, to) => from + part / 24 * (to - from);
        x.push(between(this.cost(ends[k - 1]), this.cost(ends[k])));
        y.push(between(ends[k - 1].engine.top1, ends[k].engine.top1));
      }
    }
    return [{
      name: "between fp32 anchors", type: "scatter", mode: "lines", x, y,
      line: {dash: "dot", color: "#5b6875", width: 1.3}, hoverinfo: "skip",
    }];
  },

  dots(evaluated) {
    return {
      name: "evaluated, no engine", type: "scatter", mode: "markers", x: evaluated.map(one => one.macs), y: evaluated.map(one => one.top1),
      customdata: evaluated.map(one => `<b>${Page.plain(one.route)}</b><br>top-1 ${one.top1.toFixed(2)} %<br>${Show.macs(one.macs)} MACs<br>no engine: a smaller route is as accurate`),
      hovertemplate: "%{customdata}<extra></extra>", marker: {symbol: "circle-open", size: 7, color: "#5b6875", opacity: 0.75},
    };
  },

  winner() {
    return {name: "picked", type: "scatter", mode: "markers", x: [], y: [], hoverinfo: "skip", marker: {symbol: "circle-open", size: 23, color: "#b3470a", line: {width: 2.5}}};
  },

  /** Puts the ring around the picked engine. */
  mark() {
    const plot = Page.get("plot");
    if (plot.hidden || !plot.data) return;
    const best = this.found && this.found.best && this.cost(this.found.best) !== null ? this.found.best : null;
    Plotly.restyle(plot, {x: [best ? [this.cost(best)] : []], y: [best ? [best.engine.top1] : []]}, [plot.data.length - 1]);
  },

  /** Of a logarithmic axis: 1, 2 and 5 of each power of ten, written out. */
  ticks() {
    if (!Page.get("logarithmic").checked) return {};
    const costs = this.shown().map(item => this.cost(item)).filter(one => one > 0);
    const powers = [], tickvals = [];
    for (let power = Math.floor(Math.log10(Math.min(...costs))) - 1; power <= Math.ceil(Math.log10(Math.max(...costs))); power++) powers.push(power);
    const few = powers.length > 5;  // then 1 alone has room
    for (const power of powers) for (const digit of few ? [1] : [1, 2, 5]) tickvals.push(Number(`${digit}e${power}`));
    const named = value => this.axis === "macs" ? Show.macs(value).replace(/\.0+(?= )/, "") : String(value);
    return {tickmode: "array", tickvals, ticktext: tickvals.map(named)};
  },

  layout() {
    const titles = {latency: `latency, ms (${this.percentile}, batch ${this.comparison.batch})`, macs: "multiply-adds for one image", size: "size of graph and weights, MB"};
    return {
      ...PLOT, margin: {l: 62, r: 24, t: 40, b: 92}, hovermode: "closest", uirevision: `${this.axis}${this.percentile}${Page.get("device").value}${Page.get("family").value}${Page.get("logarithmic").checked}`,
      xaxis: {title: {text: titles[this.axis], standoff: 8}, type: Page.get("logarithmic").checked ? "log" : "linear", gridcolor: "#e8ecf0", linecolor: "#aab4be", ticks: "outside", zeroline: false, ...this.ticks()},
      yaxis: {title: {text: "top-1, %"}, gridcolor: "#e8ecf0", linecolor: "#aab4be", ticks: "outside", zeroline: false},
      legend: {orientation: "h", y: -0.17, x: 0, yanchor: "top", font: {size: 12}}, showlegend: true,
    };
  },
});

/** The line that is dragged; its place is a latency or a size. */
const Budget = {
  start(frontier) {
    this.frontier = frontier;
    this.element = Page.get("budget-line");
    this.element.addEventListener("pointerdown", event => {
      event.preventDefault();
      this.element.setPointerCapture(event.pointerId);
      this.element.focus();
      this.dragged = true;
    });
    this.element.addEventListener("pointermove", event => { if (this.dragged) this.moveTo(event.clientX); });
    for (const name of ["pointerup", "pointercancel"]) this.element.addEventListener(name, () => { this.dragged = false; });
    this.element.addEventListener("keydown", event => {
      const step = {ArrowLeft: -4, ArrowDown: -4, ArrowRight: 4, ArrowUp: 4, PageDown: -40, PageUp: 40}[event.key];
      if (!step) return;
      event.preventDefault();
      const box = this.element.getBoundingClientRect();
      this.moveTo(box.left + box.width / 2 + step);
    });
    addEventListener("resize", () => this.place());
  },

  axes() {
    const full = Page.get("plot")._fullLayout;
    return full && full.xaxis && full.xaxis.d2p ? full : null;
  },

  value() {
    const {limits, axis} = this.frontier;
    return axis === "latency" ? limits.latency_ms : axis === "size" && limits.max_size_bytes !== null ? limits.max_size_bytes / 1e6 : null;
  },

  place() {
    const {frontier, element} = this, full = this.axes();
    const off = Page.get("plot").hidden || frontier.axis === "macs" || !full || !frontier.items.length;
    element.hidden = off;
    if (off) return;
    const [low, high] = full.xaxis.range.map(one => full.xaxis.r2d ? full.xaxis.r2d(one) : one);
    const value = this.value();  // without a limit the line waits at the right end
    const shown = Math.min(Math.max(value === null ? high : value, low), high);
    const {l, t, w, h} = full._size;
    element.style.left = `${l + Math.min(Math.max(full.xaxis.d2p(shown), 0), w)}px`;
    element.style.top = `${t}px`;
    element.style.height = `${h}px`;
    const text = value === null ? "any size" : frontier.axis === "latency" ? `≤ ${Show.latency(value)}` : `≤ ${value} MB`;
    Page.get("budget-grip").textContent = text;
    element.setAttribute("aria-valuetext", text);
    element.setAttribute("aria-valuenow", String(value === null ? high : value));
  },

  moveTo(clientX) {
    const {frontier} = this, full = this.axes();
    if (!full) return;
    const left = Page.get("plot").getBoundingClientRect().left + full._size.l;
    const place = Math.min(Math.max(clientX - left, 0), full._size.w);
    const value = Number(full.xaxis.p2d(place).toPrecision(3));
    if (!(value > 0)) return;
    if (frontier.axis === "latency") frontier.limits.latency_ms = value;
    else frontier.limits.max_size_bytes = Math.max(1, Math.round(value * 1e6));
    frontier.writeLimits();
    frontier.update();
  },
};
