// Lays out the page of a study from the data in it.
"use strict";

(() => {
  const { color, element, number, saveTable, signed } = Dom;
  const data = JSON.parse(document.getElementById("data").textContent);
  const root = document.getElementById("report");
  const state = { metric: data.metrics[0], head: null, by: "weight", document: 0, arms: [null, null], hidden: new Set() };
  const redraws = [];
  const redraw = () => redraws.forEach(one => one());
  const paint = arm => color(data.arms.indexOf(arm));
  const words = name => name.replaceAll("_", " ");
  const interval = row => (row.low === null ? "" : `${signed(row.low)} to ${signed(row.high)}`);

  function section(id, heading, ...children) {
    const made = element("section", { id, "aria-labelledby": `${id}-title` }, element("h2", { id: `${id}-title` }, heading), ...children);
    root.append(made);
    return made;
  }

  function select(label, options, value, onchange) {
    const box = element("select", { onchange: event => onchange(event.target.value) }, ...options.map(([key, shown]) =>
      element("option", { value: key, selected: String(key) === String(value) }, shown)));
    return element("label", {}, `${label} `, box);
  }

  // --- one sentence, one difference

  function lead() {
    const row = data.headline, known = row !== null && row.difference !== null;
    const big = !known ? null : element("p", { class: "delta" },
      element("b", {}, signed(row.difference)),
      element("span", {}, row.low === null ? "one seed: no interval" : `95 % interval ${interval(row)}, ${row.pairs} seeds`));
    const what = known ? `${row.arm} − ${row.to} in ${row.metric}` : null;
    const about = note => known && note.startsWith(`${what}:`);
    const notes = [...data.notes.filter(about), ...data.notes.filter(note => !about(note))];
    root.append(element("header", { class: "top" }, element("h1", {}, data.name),
      element("p", { class: "lead" }, known ? `${what}: ${row.verdict}.` : data.sentence), big,
      element("p", { class: "soft" }, Object.entries(data.facts).filter(([, value]) => value).slice(0, 4)
        .map(([name, value]) => `${name}: ${value}`).join(" · "), ` · seeds: ${data.seeds.join(", ")}`),
      notes.length ? element("div", { class: "notes" }, "Notes", element("ul", {}, ...notes.map(note => element("li", {}, note)))) : null));
  }

  // --- texts of two arms

  function texts() {
    const seed = data.seeds.find(one => data.runs.some(run => run.seed === one && run.samples.length));
    const shown = data.runs.filter(run => run.seed === seed && run.samples.length).map(run => ({ ...run, name: run.arm }));
    if (!shown.length) return;
    const weighs = run => run.samples.some(record => record.documents.some(document =>
      document.weight && new Set(document.weight.flat().filter(weight => weight !== null)).size > 1));
    if (!shown.some(weighs)) state.by = "loss";
    const entries = Texts.index(shown);
    state.document = Texts.best(entries);
    const first = data.headline?.arm ?? shown.find(weighs)?.arm ?? shown[0].arm;
    state.arms = [first, data.headline?.to ?? data.baseline];
    const heads = Math.max(...entries.map(entry => entry.document.loss.length));
    const tip = element("div", { class: "tip", hidden: true, role: "tooltip" });
    document.body.append(tip);
    const tools = element("div", { class: "tools" }), panels = element("div", { class: "panels" });
    section("texts", "The same text, coloured by the weight of each token", tools, panels);
    const arms = shown.map(run => [run.arm, run.arm]);
    redraws.push(() => {
      shown.forEach(run => { run.color = paint(run.arm); });
      tip.hidden = true;
      const pick = side => value => { state.arms[side] = value; redraw(); };
      tools.replaceChildren(select("left", arms, state.arms[0], pick(0)), select("right", arms, state.arms[1], pick(1)),
        select("document", entries.map((one, i) => [i, one.document.id]), state.document,
          value => { state.document = Number(value); redraw(); }),
        select("head", [["", "mean of all heads"], ...Array.from({ length: heads }, (_, k) => [k, `head ${k + 1}`])], state.head ?? "",
          value => { state.head = value === "" ? null : Number(value); redraw(); }),
        select("colour", Texts.names(shown).map(name => [name, words(name)]), state.by, value => { state.by = value; redraw(); }));
      const entry = entries[state.document];
      panels.replaceChildren(...state.arms.map(arm => {
        const number = shown.findIndex(run => run.arm === arm);
        const records = entry.runs.get(number);
        if (!records) return element("article", { class: "panel" }, element("p", { class: "soft text" }, `${arm}: did not record this text`));
        const record = Texts.nearest(records, Infinity);
        const known = Math.min(state.head ?? Infinity, record.document.loss.length - 1);
        return Texts.panel(shown[number], record, { ...state, head: state.head === null ? null : known }, tip);
      }));
    });
    addEventListener("scroll", () => { tip.hidden = true; }, { passive: true });
  }

  // --- curves

  // mean over seeds of every arm, and the standard deviation around it
  function lines(metric) {
    return data.arms.filter(arm => !state.hidden.has(arm)).map(arm => {
      const found = data.runs.filter(run => run.arm === arm && run.curves[metric]).map(run => run.curves[metric]);
      if (!found.length) return null;
      const steps = found[0][0].filter(step => found.every(([other]) => other.includes(step)));
      const columns = steps.map(step => found.map(([at, values]) => values[at.indexOf(step)]));
      const mean = columns.map(values => values.reduce((sum, one) => sum + one, 0) / values.length);
      const spread = columns.map((values, i) => Math.sqrt(values.reduce((sum, one) => sum + (one - mean[i]) ** 2, 0) / (values.length - 1)));
      const band = found.length > 1;
      return { label: arm, color: paint(arm), n: found.length, steps, mean,
        low: band ? mean.map((one, i) => one - spread[i]) : null, high: band ? mean.map((one, i) => one + spread[i]) : null };
    }).filter(line => line !== null && line.steps.length);
  }

  function curves() {
    const names = [...new Set(data.runs.flatMap(run => Object.keys(run.curves)))];
    const evaluated = names.filter(name => name.startsWith("eval/"));
    const order = [...data.metrics.filter(name => evaluated.includes(name)), ...evaluated, ...names];
    const chosen = [...new Set(order)].filter(name => name !== "eval/predictions");
    if (!chosen.length) return;
    const key = element("div", { class: "key" });
    const grid = element("div", { class: "grid" }), more = element("div", { class: "grid" });
    section("curves", "Curves: mean over seeds, and one standard deviation around it", key, grid,
      chosen.length > 4 ? element("details", {}, element("summary", {}, `${chosen.length - 4} more`), more) : null);
    chosen.forEach((metric, i) => {
      const figure = Svg.figure(metric.replaceAll("/", "-"), metric, width => Svg.curves(lines(metric), `${metric} over training, by arm`)(width), () => lines(metric));
      (i < 4 ? grid : more).append(figure.made);
      redraws.push(figure.redraw);
    });
    const toggle = i => {
      const arm = data.arms[i];
      if (!state.hidden.delete(arm) && state.hidden.size < data.arms.length - 1) state.hidden.add(arm);
      redraw();
      key.children[i].focus();
    };
    redraws.push(() => key.replaceChildren(...data.arms.map((arm, i) => element("button", { type: "button",
      "aria-pressed": String(!state.hidden.has(arm)), title: "show or hide its curves", onclick: () => toggle(i) },
    element("i", { class: "dot", style: `background:${paint(arm)}` }), arm))));
  }

  // --- differences

  function forest() {
    const metrics = data.metrics.filter(metric => data.rows.some(row => row.metric === metric && row.difference !== null));
    if (!metrics.length) return;
    if (!metrics.includes(state.metric)) state.metric = metrics[0];
    const tools = element("div", { class: "tools" });
    const rows = () => data.rows.filter(row => row.metric === state.metric && row.difference !== null).map(row => ({
      label: `${row.arm} − ${row.to}`, value: row.difference, low: row.low, high: row.high, color: paint(row.arm),
      note: row.verdict, filled: row.kind === "named",
    }));
    const figure = Svg.figure("differences", "Differences by arm", width => Svg.forest(rows(), `differences in ${state.metric}`)(width));
    section("differences", "Differences, seed by seed", tools, figure.made,
      element("p", { class: "soft" }, "Filled: named before the results were known, corrected by Holm. Hollow: exploratory. A line that crosses 0: no difference seen."));
    redraws.push(() => {
      tools.replaceChildren(select("metric", metrics.map(metric => [metric, metric]), state.metric, value => { state.metric = value; redraw(); }));
      figure.redraw();
    });
  }

  const HEADS = ["metric", "arm", "n", "mean", "sd", "compared to", "pairs", "difference", "95 % interval", "p", "kind", "verdict"];

  function table() {
    const cells = row => [row.metric, row.arm, row.n, number(row.mean), row.sd === null ? "–" : number(row.sd), row.to ?? "", row.pairs || "",
      row.difference === null ? "" : signed(row.difference), interval(row), row.p === null ? "" : number(row.p), row.kind, row.verdict.replace(" (exploratory)", "")];
    const body = data.rows.map(row => element("tr", { class: row.kind }, ...cells(row).map((cell, i) =>
      element(i === 1 ? "th" : "td", i === 1 ? { scope: "row" } : {}, String(cell)))));
    const keys = Object.keys(data.rows[0] ?? {});
    section("table", "Table", element("div", { class: "wide", tabindex: "0", role: "region", "aria-label": "table of all differences" },
      element("table", { class: "facts numbers" }, element("thead", {}, element("tr", {}, ...HEADS.map(head => element("th", { scope: "col" }, head)))),
        element("tbody", {}, ...body))),
    saveTable(data.name, "the table", () => [keys, ...data.rows.map(row => keys.map(key => row[key]))]));
  }

  // --- what was run

  function settings() {
    const keys = Object.keys(data.different);
    const arms = data.arms.filter(arm => keys.some(key => arm in data.different[key]));
    const differences = element("div", { class: "wide", tabindex: "0", role: "region", "aria-label": "settings that differ" },
      element("table", { class: "facts" }, element("thead", {}, element("tr", {}, element("th", { scope: "col" }, "key"), ...arms.map(arm => element("th", { scope: "col" }, arm)))),
        element("tbody", {}, ...keys.map(key => element("tr", {}, element("th", { scope: "row" }, key), ...arms.map(arm => element("td", {}, data.different[key][arm] ?? "–")))))));
    const saved = saveTable(`${data.name}-settings`, "the settings that differ", () => [["key", ...arms],
      ...keys.map(key => [key, ...arms.map(arm => data.different[key][arm] ?? "–")])]);
    section("settings", "What differs between the arms", keys.length ? element("div", {}, differences, saved) : element("p", { class: "soft" }, "Nothing."),
      element("details", {}, element("summary", {}, `The same in all arms (${Object.keys(data.same).length} settings)`),
        element("p", { class: "same" }, Object.entries(data.same).map(([key, value]) => `${key} = ${value}`).join(" · "))),
      element("p", { class: "soft" }, data.facts.versions));
  }

  lead();
  texts();
  curves();
  forest();
  if (data.rows.length) table();
  settings();
  redraw();
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", redraw);
  document.documentElement.dataset.ready = "true";
})();
