// How a build came about: similarities of blocks, times of stages, provenance.
"use strict";

const Builds = {
  start(data) {
    this.data = data;
    const named = build => `${build.id}: ${build.family} on ${build.device}, ${build.finished_at.slice(0, 16).replace("T", " ")}`;
    Page.options(Page.get("build"), [...data.builds].reverse().map(build => [String(build.id), named(build)]));
    Page.get("build").addEventListener("change", () => this.show());
    for (const id of ["pair", "values"]) Page.get(id).addEventListener("change", () => this.map());
    this.show();
  },

  show() {
    this.build = this.data.builds.find(build => String(build.id) === Page.get("build").value);
    const pairs = this.build.selection ? this.build.selection.pairs : [];
    Page.options(Page.get("pair"), pairs.map((pair, number) => [String(number), `${pair.source} → ${pair.target}`]));
    const most = pairs.reduce((best, pair, number) => pair.chosen.length > pairs[best].chosen.length ? number : best, 0);
    if (pairs.length) Page.get("pair").value = String(most);
    this.map();
    this.stages();
    this.provenance();
  },

  map() {
    const {selection} = this.build, box = Page.get("map"), empty = Page.get("map-empty");
    const pair = selection && selection.pairs[Number(Page.get("pair").value) || 0];
    const kinds = pair ? [...(pair.theta ? [["theta", "Θ: distance of class distributions, nats"]] : []), ...(pair.scores.length ? [["scores", `score: ${selection.score || selection.selector}`]] : [])] : [];
    Page.options(Page.get("values"), kinds);
    Page.get("pair").closest("form").hidden = !kinds.length;
    box.hidden = !kinds.length;
    empty.hidden = kinds.length > 0;
    Page.get("map-sentence").textContent = "";
    if (!kinds.length) {
      Plotly.purge(box);
      empty.textContent = this.why();
      return;
    }
    const kind = Page.get("values").value;
    const {z, rows, columns} = kind === "theta" ? this.theta(pair) : this.scores(pair);
    Page.get("map-sentence").textContent = `Each square joins ${pair.source} after one of its blocks to ${pair.target} after one of its own. `
      + `Dark squares are ${kind === "theta" ? "alike: what comes out of both tells the classes apart in the same way" : "good places by the selector's score, lower is better"}. `
      + `Rings are the ${Show.count(pair.chosen.length, "stitch").replace("stitchs", "stitches")} that were chosen by ${selection.selector}.`;
    const label = kind === "theta" ? "Θ" : "score";
    const names = new Map(pair.chosen.map(([i, j, route, reason]) => [`${i},${j}`, `${route} (${reason})`]));
    const text = z.map((row, i) => row.map((value, j) => `${Page.plain(pair.source)} ${Page.plain(rows[i])} → ${Page.plain(pair.target)} ${Page.plain(columns[j])}<br>${label} ${value === null ? "none" : Show.digits(value)}`
      + (names.has(`${i + 1},${j + 1}`) ? `<br><b>${Page.plain(names.get(`${i + 1},${j + 1}`))}</b>` : "")));
    const heat = {
      type: "heatmap", z, x: columns, y: rows, customdata: text, hovertemplate: "%{customdata}<extra></extra>", hoverongaps: false,
      colorscale: "Viridis", xgap: 1, ygap: 1, colorbar: {title: {text: label, side: "top"}, thickness: 14, len: 0.9},
    };
    const rings = {
      type: "scatter", mode: "markers", x: pair.chosen.map(one => columns[one[1] - 1]), y: pair.chosen.map(one => rows[one[0] - 1]), hoverinfo: "skip",
      marker: {symbol: "circle-open", size: 15, color: "#fff", line: {width: 4}},
    };
    const centres = {...rings, marker: {symbol: "circle-open", size: 15, color: "#d55e00", line: {width: 2.4}}};
    Plotly.react(box, [heat, rings, centres], {
      ...PLOT, height: Math.min(640, 150 + 30 * rows.length), margin: {l: 90, r: 20, t: 20, b: 60}, showlegend: false,
      xaxis: {title: {text: `${Page.plain(pair.target)}, after block`}, type: "category", categoryarray: columns, categoryorder: "array", tickangle: 0, automargin: true},
      yaxis: {title: {text: `${Page.plain(pair.source)}, after block`}, type: "category", categoryarray: rows, categoryorder: "array", autorange: "reversed", automargin: true},
    }, CONFIG);
  },

  why() {
    if (this.build.kind !== "build") return "No stitches were chosen: these are plain networks, cascades of them, or a package from elsewhere.";
    if (this.build.shipped) return "The family came with a tuned supernet, which was used as it is: nothing was measured to choose its stitches. klas-zoo build --preset quick selects and tunes stitches anew.";
    if (this.build.selection) return "This selector measures no similarities.";
    return "This build's report.json is not in the registry (it was written with --out, or deleted), so there is no map.";
  },

  theta(pair) {
    const names = count => Array.from({length: count}, (_, k) => k + 1 === count ? "output" : String(k + 1));
    return {z: pair.theta, rows: names(pair.theta.length), columns: names(pair.theta[0].length)};
  },

  scores(pair) {
    const rows = Math.max(...pair.scores.map(one => one[0])), columns = Math.max(...pair.scores.map(one => one[1]));
    const z = Array.from({length: rows}, () => Array(columns).fill(null));
    for (const [i, j, score] of pair.scores) z[i - 1][j - 1] = score;
    const names = count => Array.from({length: count}, (_, k) => String(k + 1));
    return {z, rows: names(rows), columns: names(columns)};
  },

  stages() {
    const stages = this.build.stages.filter(one => Number.isFinite(one.seconds));
    Page.get("stages-box").hidden = !stages.length;
    if (!stages.length) return;
    const total = stages.reduce((sum, one) => sum + one.seconds, 0);
    const longest = stages.reduce((best, one) => one.seconds > best.seconds ? one : best);
    Page.get("stages-sentence").textContent = `${Show.seconds(total)} in all, most of it (${Math.round(100 * longest.seconds / (total || 1))} %) in “${longest.stage}”. Pale bars were taken from earlier runs.`;
    Plotly.react("stages", [{
      type: "bar", orientation: "h", x: stages.map(one => one.seconds), y: stages.map(one => Page.plain(one.stage)),
      text: stages.map(one => Show.seconds(one.seconds)), textposition: "outside", cliponaxis: false,
      marker: {color: stages.map(one => one.status === "cached" ? "#9cc4de" : "#0072b2")},
      hovertext: stages.map(one => `${Page.plain(one.stage)}: ${Show.seconds(one.seconds)}${one.status === "cached" ? ", from an earlier run" : ""}`), hoverinfo: "text",
    }], {
      ...PLOT, height: 70 + 30 * stages.length, margin: {l: 20, r: 80, t: 6, b: 40}, bargap: 0.35,
      xaxis: {title: {text: "seconds"}, gridcolor: "#e8ecf0", rangemode: "tozero"}, yaxis: {autorange: "reversed", automargin: true, ticksuffix: "  "},
    }, CONFIG);
  },

  provenance() {
    const {build} = this, machine = build.machine || {};
    const listed = (table, show) => Object.entries(table || {}).map(([name, value]) => show(name, value)).join("\n");
    const rows = [
      ["build", `${build.id}, ${build.kind}, ${build.started_at} to ${build.finished_at}`],
      ["command", build.command], ["images", `${build.dataset}\nfingerprint ${build.data_fingerprint}`],
      ["weights", build.weights],
      ["anchors", listed(build.anchors, (name, one) => `${name}: ${one.checkpoint || ""} sha256 ${one.sha256}`.replace(":  ", ": "))],
      ["preprocessing", listed(build.preprocessing, (name, value) => `${name} ${JSON.stringify(value)}`)],
      ["seeds", listed(build.seeds, (name, value) => `${name} ${value}`)],
      ["source", build.source ? String(build.source) : ""], ["hardware", build.hardware],
      ["machine", machine.host ? `${machine.host}, ${machine.system}, ${Show.count(machine.processes, "process").replace("processs", "processes")}` : ""],
      ["versions", listed(build.versions, (name, value) => `${name} ${value}`).replaceAll("\n", ", ")],
      ["key", build.key || ""],
    ];
    Page.get("provenance").replaceChildren(...Page.facts(rows.filter(([, text]) => text)).childNodes);
  },
};
