// The best engine within a budget: the rule of klas_zoo/budget.py, and how numbers are shown.
// tests/test_report_page.py compares its answers with those of klas_zoo.pick.
"use strict";

const Choice = {
  /** What one comparison holds, as objects: an engine with its latencies under the conditions of the comparison. */
  items(comparison, engines, percentiles) {
    return comparison.rows.map(row => {
      const engine = engines[row[0]], item = {engine, place: row[0], origin: row[4], order: row[5], ms: {}};
      percentiles.forEach((name, column) => { item.ms[name] = row[1 + column]; });
      return item;
    });
  },

  /** Whether an item keeps every limit: {latency_ms, min_accuracy, max_size_bytes}, null where there is none. */
  fits(item, percentile, limits) {
    const ms = item.ms[percentile];
    return ms !== null && (limits.latency_ms === null || ms <= limits.latency_ms)
      && (limits.min_accuracy === null || item.engine.top1 >= limits.min_accuracy)
      && (limits.max_size_bytes === null || item.engine.size_bytes <= limits.max_size_bytes);
  },

  /** Sorts the better item first: the more accurate, then the faster, then the smaller, then by name. */
  preference(percentile) {
    return (a, b) => b.engine.top1 - a.engine.top1 || a.ms[percentile] - b.ms[percentile]
      || a.engine.size_bytes - b.engine.size_bytes || a.order - b.order;
  },

  /** {best, faster, slower, fitting}: as klas_zoo.pick finds them; items or null. */
  answer(items, percentile, limits) {
    const order = Choice.preference(percentile);
    const fitting = items.filter(item => Choice.fits(item, percentile, limits)).sort(order);
    const best = fitting[0] || null;
    if (!best) return {best, faster: null, slower: null, fitting: 0};
    const faster = fitting.find(item => item.ms[percentile] < best.ms[percentile]) || null;
    const slower = items.filter(item => Choice.fits(item, percentile, {...limits, latency_ms: null})
        && item.ms[percentile] > limits.latency_ms && item.engine.top1 > best.engine.top1)
      .sort((a, b) => a.ms[percentile] - b.ms[percentile] || order(a, b))[0] || null;
    return {best, faster, slower, fitting: fitting.length};
  },

  /** Items that none of at most their cost is as accurate as, from small cost to large. */
  frontier(items, cost, percentile) {
    const kept = [];
    const known = items.filter(item => cost(item) !== null).sort(Choice.preference(percentile));
    for (const item of known.sort((a, b) => cost(a) - cost(b) || b.engine.top1 - a.engine.top1)) {
      if (!kept.length || item.engine.top1 > kept[kept.length - 1].engine.top1) kept.push(item);
    }
    return kept;
  },

  /** The command that gives this answer. */
  command(data, comparison, percentile, limits) {
    const words = ["klas-zoo pick", `--latency ${limits.latency_ms}ms`, comparison.arguments];
    if (percentile !== "p50") words.push(`--percentile ${percentile}`);
    if (limits.min_accuracy !== null) words.push(`--min-accuracy ${limits.min_accuracy}`);
    if (limits.max_size_bytes !== null) words.push(`--max-size ${limits.max_size_bytes / 1e6}MB`);
    if (data.registry_argument) words.push(data.registry_argument);
    return words.join(" ");
  },
};

const Show = {
  digits(value, digits = 3) {
    if (!(value > 0)) return String(value);
    const places = Math.min(12, Math.max(0, digits - 1 - Math.floor(Math.log10(value))));
    return value.toFixed(places);
  },
  latency: ms => ms === null ? "unknown" : ms >= 999.5 ? `${Show.digits(ms / 1000)} s` : `${Show.digits(ms)} ms`,
  size(bytes) {
    if (bytes < 1000) return `${bytes} B`;
    if (bytes < 999.5e3) return `${Show.digits(bytes / 1e3)} kB`;
    return bytes < 999.5e6 ? `${Show.digits(bytes / 1e6)} MB` : `${(bytes / 1e9).toFixed(2)} GB`;
  },
  macs(macs) {
    if (macs < 999.5e6) return `${Show.digits(macs / 1e6)} M`;
    return macs < 999.5e9 ? `${Show.digits(macs / 1e9)} G` : `${Show.digits(macs / 1e12)} T`;
  },
  seconds(seconds) {
    if (seconds < 90) return `${seconds.toFixed(1)} s`;
    return seconds < 5400 ? `${(seconds / 60).toFixed(1)} min` : `${(seconds / 3600).toFixed(1)} h`;
  },
  top1(engine) {
    const found = `${engine.top1.toFixed(2)} %`;
    if (engine.claimed_by) return `${found} (claimed by ${engine.claimed_by})`;
    if (!engine.top1_interval) return found;
    return `${found} (95 % interval ${engine.top1_interval.map(one => one.toFixed(2)).join(" to ")})`;
  },
  made: engine => `${engine.runtime}, ${engine.precision}`,
  count: (number, word) => `${number.toLocaleString("en-US")} ${word}${number === 1 ? "" : "s"}`,
};

const Page = {
  /** A new element with text; text is never read as HTML. */
  make(name, text = "", className = "") {
    const element = document.createElement(name);
    element.textContent = text;
    if (className) element.className = className;
    return element;
  },
  get: id => document.getElementById(id),
  /** Fills a select with [value, label] pairs and keeps what was selected where it is still there. A select of one
   *  is hidden unless it is to be shown. */
  options(select, pairs, alone = false) {
    const before = select.value;
    select.replaceChildren(...pairs.map(([value, label]) => {
      const option = Page.make("option", label);
      option.value = value;
      return option;
    }));
    if (pairs.some(([value]) => value === before)) select.value = before;
    select.closest("label").hidden = pairs.length < (alone ? 1 : 2);
  },
  /** A list of terms: [[name, text], …] */
  facts(pairs, className = "facts") {
    const list = Page.make("dl", "", className);
    for (const [name, text] of pairs) list.append(Page.make("dt", name), Page.make("dd", text));
    return list;
  },
  /** Text as Plotly takes it: it reads a few HTML elements in labels. */
  plain: text => String(text).replace(/&/g, "&amp;").replace(/</g, "&lt;").replace(/>/g, "&gt;"),
};

// Okabe and Ito's colours, which people with any colour vision tell apart; the yellow is darkened for white paper
const COLOURS = ["#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00", "#8a6d00", "#4d4d4d"];
const PLOT = {
  font: {family: "system-ui, 'Segoe UI', Roboto, 'DejaVu Sans', sans-serif", size: 13, color: "#1b2733"},
  paper_bgcolor: "#fff", plot_bgcolor: "#fff",
  hoverlabel: {bgcolor: "#fff", bordercolor: "#5b6875", align: "left", font: {size: 12.5, color: "#1b2733"}},
};
const CONFIG = {responsive: true, displaylogo: false, modeBarButtonsToRemove: ["select2d", "lasso2d", "autoScale2d"]};
