// Lays out the page from the data in it.
"use strict";

(() => {
  const { element, number, color, saveTable, signed } = Dom;
  const { runs, bins } = JSON.parse(document.getElementById("data").textContent);
  const root = document.getElementById("report");
  const state = { hidden: new Set(), smooth: 0, head: null, by: "weight", document: 0, step: null };
  const visible = () => runs.filter((_, i) => !state.hidden.has(i));
  const paintRuns = () => runs.forEach((run, i) => { run.color = color(i); });
  const redraws = [];
  const redraw = () => { paintRuns(); redraws.forEach(one => one()); };
  const file = name => `${runs.length > 1 ? "runs" : runs[0].name}-${name.replace(/[^\w.-]+/g, "-")}`;
  const title = name => name.replace("peak_memory_gib", "peak memory (GiB)").replaceAll("_", " ");

  function section(id, heading, ...children) {
    const made = element("section", { id }, element("h2", {}, heading), ...children);
    root.append(made);
    return made;
  }

  // --- head of the page

  function header() {
    const chips = element("div", { class: "chips" });
    const draw = () => chips.replaceChildren(...runs.map((run, i) => element("button", {
      class: state.hidden.has(i) ? "chip off" : "chip", "aria-pressed": String(!state.hidden.has(i)), title: "show or hide this run",
      disabled: runs.length === 1,
      onclick: () => {
        if (state.hidden.has(i)) state.hidden.delete(i); else if (visible().length > 1) state.hidden.add(i);
        redraw();
      },
    }, element("i", { class: "dot", style: `background:${run.color}` }), run.name,
    element("span", { class: `badge ${run.status}` }, run.status))));
    redraws.push(draw);
    const smooth = element("input", { type: "range", min: "0", max: "0.98", step: "0.02", value: "0", "aria-label": "smoothing",
      oninput: event => { state.smooth = Number(event.target.value); redraw(); } });
    root.append(element("header", { class: "top" },
      element("h1", {}, runs.length > 1 ? `${runs.length} runs compared` : runs[0].name),
      element("div", { class: "tools" }, chips, element("label", {}, "smooth curves ", smooth))));
  }

  // --- one sentence, one difference

  const WORDS = { finished: "Finished", stopped: "Stopped early", running: "Running", failed: "Failed", interrupted: "Interrupted" };

  // the curve to speak of: of the evaluation data if there is one
  const main = run => ["eval/loss/head_1", "eval/loss", "loss"].find(name => run.curves[name]?.[0].length > 1);

  function lead() {
    const say = (sentence, difference, note) => root.append(element("p", { class: "lead" }, sentence),
      element("p", { class: "delta" }, element("b", {}, signed(difference)), element("span", {}, note)));
    const last = (run, name) => run.curves[name][1][run.curves[name][1].length - 1];
    const [first] = runs, name = main(first);
    if (!name) return;
    if (runs.length === 1) {
      const [steps, values] = first.curves[name];
      say(`${WORDS[first.status] ?? "State unknown"}: ${first.facts.trainer ?? "training"} brought ${name} from ${number(values[0])} at step ${
        steps[0]} to ${number(last(first, name))} at step ${steps[steps.length - 1]}.`, last(first, name) - values[0], `in ${name}`);
      return;
    }
    const others = runs.slice(1).filter(run => run.curves[name]);
    if (!others.length) return;
    const far = run => Math.abs(last(run, name) - last(first, name));
    const other = others.reduce((best, run) => (far(run) > far(best) ? run : best));
    say(`${other.name} − ${first.name} in ${name}: ${number(last(other, name))} against ${number(last(first, name))}, one run each.`,
      last(other, name) - last(first, name), "no interval: runs with several seeds have one");
  }

  // --- facts

  function facts() {
    const names = [...new Set(runs.flatMap(run => Object.keys(run.facts)))];
    const measured = [...new Set(runs.flatMap(run => Object.keys(run.evaluation)))];
    const last = name => run => {
      const curve = run.curves[name];
      return curve ? number(curve[1][curve[1].length - 1]) : "–";
    };
    // a number with its 95 % interval, and over how much it was measured
    const estimated = name => run => {
      const found = run.estimates[name];
      const value = number(run.evaluation[name] ?? null);
      return found ? `${value} [${number(found.low)}, ${number(found.high)}], ${found.n} ${found.unit}` : value;
    };
    const long = ["git", "versions", "command"];
    const fact = name => [name, run => run.facts[name] ?? "–"];
    const rows = [
      ...names.filter(name => !long.includes(name)).map(fact),
      ...["loss", "eval/loss", "eval/loss/head_1", "eval/tokens_per_forward"].filter(name => runs.some(run => run.curves[name]))
        .map(name => [`last ${title(name)}`, last(name)]),
      ...measured.map(name => [title(name), estimated(name)]),
      ...names.filter(name => long.includes(name)).map(fact),
    ];
    const saved = saveTable(file("facts"), "the facts", () => [["", ...runs.map(run => run.name)],
      ...rows.map(([name, value]) => [name, ...runs.map(value)])]);
    if (runs.length === 1) {
      const list = element("dl", { class: "wide" }, ...rows.map(([name, value]) =>
        element("div", { class: long.includes(name) ? "long" : null }, element("dt", {}, name), element("dd", {}, value(runs[0])))));
      section("facts", "Run", list, saved, ...configs());
      return;
    }
    const table = element("table", { class: "facts" },
      element("tr", {}, element("th", { scope: "col" }, "fact"), ...runs.map(run => element("th", { scope: "col" }, run.name))),
      ...rows.map(([name, value]) => element("tr", {}, element("th", { scope: "row" }, name),
        ...runs.map(run => element("td", {}, value(run))))));
    section("facts", "Runs", element("div", { class: "wide" }, table), saved, ...configs());
  }

  function configs() {
    const keys = [...new Set(runs.flatMap(run => Object.keys(run.config)))];
    const differs = key => new Set(runs.map(run => run.config[key])).size > 1;
    const cells = key => runs.map(run => run.config[key] ?? "–");
    const table = (chosen, name) => element("div", {}, element("div", { class: "wide" }, element("table", { class: "facts" },
      ...chosen.map(key => element("tr", {}, element("th", { scope: "row" }, key), ...cells(key).map(cell => element("td", {}, cell)))))),
    saveTable(file(name), `the table: ${name}`, () => [["key", ...runs.map(run => run.name)], ...chosen.map(key => [key, ...cells(key)])]));
    const different = keys.filter(differs);
    return [
      ...(runs.length > 1 ? [element("details", { open: different.length <= 12 },
        element("summary", {}, `What differs in the configs (${different.length})`), table(different, "differences"))] : []),
      element("details", {}, element("summary", {}, runs.length > 1 ? "All of the configs" : "The whole config"), table(keys, "config")),
    ];
  }

  // --- curves

  const GROUPS = [
    ["loss", "Loss of every head", name => /^(loss|eval\/loss)(\/|$)/.test(name)],
    ["drafts", "Drafts that the model would accept",
      name => /^(eval\/)?(acceptance|top1|accepted|objective)\//.test(name) || name === "eval/tokens_per_forward"],
    ["weights", "Weights", name => /^(weight|weighted_loss)\//.test(name)],
    ["more", "What the algorithm measures", name => name.includes("/") && !name.startsWith("eval/")],
    ["machine", "Speed and optimizer", () => true],
  ];
  // what says nothing as a curve
  const LEFT_OUT = new Set(["tokens", "epoch", "eval/predictions", "weight/ess"]);

  function curves() {
    const names = [...new Set(runs.flatMap(run => Object.keys(run.curves)))].filter(name => !LEFT_OUT.has(name));
    const left = new Set(names);
    for (const [id, heading, belongs] of GROUPS) {
      const mine = [...left].filter(belongs);
      mine.forEach(name => left.delete(name));
      if (id === "loss" && !mine.length) section(id, heading, element("p", { class: "soft" }, "No step has been logged yet."));
      if (mine.length) {
        const grid = element("div", { class: "grid" });
        section(id, heading, grid);
        redraws.push(() => { Charts.clear(grid); charts(mine).forEach(one => drawChart(grid, ...one)); });
      }
      if (id === "loss") distributions();
    }
  }

  // one run: the heads share a chart; several: each metric has its own
  function charts(names) {
    if (runs.length > 1) return names.map(name => [title(name), [name]]);
    const found = new Map();
    for (const name of names) {
      const group = name.replace(/(^|\/)loss(\/head_\d+)?$/, "$1loss").replace(/\/head_\d+$/, "");
      if (!found.has(group)) found.set(group, []);
      found.get(group).push(name);
    }
    return [...found].map(([group, members]) => [title(group), members]);
  }

  function drawChart(grid, heading, names) {
    const place = element("div", { class: "plot" });
    const drawn = element("figure", {}, element("figcaption", {}, heading), place);
    grid.append(drawn);
    const several = runs.length > 1;
    const chosen = visible().flatMap(run => names.filter(name => run.curves[name]).map(name => {
      const head = /head_(\d+)$/.exec(name);
      return {
        label: several ? run.name : head ? `head ${head[1]}` : names.length > 1 ? "all heads" : "value",
        color: several ? run.color : head ? color(Number(head[1]) - 1) : names.length > 1 ? Dom.css("--ink") : color(0),
        steps: run.curves[name][0], values: run.curves[name][1],
      };
    }));
    Charts.lines(place, chosen, state.smooth, several ? [] : runs[0].stages);
    if (!chosen.length) return;
    const smooth = values => (state.smooth ? Charts.smoothed(values, state.smooth) : values);
    const lines = chosen.map(line => ({ ...line, mean: smooth(line.values), low: null, high: null }));
    drawn.append(Svg.saves(file(heading), heading, () => Svg.curves(lines, heading)(Math.max(place.clientWidth, 420)), () => lines));
  }

  function distributions() {
    const known = () => visible().filter(run => run.weights.length);
    if (!runs.some(run => run.weights.length)) return;
    const heads = Math.max(...runs.filter(run => run.weights.length).map(run => run.weights[0][1].length));
    const grid = element("div", { class: "grid large" });
    section("distribution", "Distribution of weights over training",
      element("div", { class: "tools" }, headSelect(heads, "all heads")),
      element("p", { class: "soft" }, "The stronger the colour, the more predictions had this weight. The axis is logarithmic; weight 0 stands apart below it."),
      grid);
    redraws.push(() => {
      Charts.clear(grid);
      for (const run of known()) {
        const place = element("div", { class: "plot" });
        const drawn = element("figure", {}, element("figcaption", {}, run.name), place);
        grid.append(drawn);
        const draw = Charts.distribution(place, run.weights, bins, state.head === null ? null : Math.min(state.head, run.weights[0][1].length - 1),
          runs.length > 1 ? run.color : color(0));
        drawn.append(Svg.saves(`${run.name}-weights`, `the distribution of weights of ${run.name}`, draw));
      }
    });
  }

  // --- texts

  function select(label, options, value, onchange) {
    const box = element("select", { onchange: event => onchange(event.target.value) }, ...options.map(([key, text]) =>
      element("option", { value: key, selected: String(key) === String(value) }, text)));
    return element("label", {}, `${label} `, box);
  }

  function headSelect(heads, all) {
    const place = element("span");
    redraws.push(() => place.replaceChildren(select("head", [["", all], ...Array.from({ length: heads }, (_, k) =>
      [k, `head ${k + 1}`])], state.head ?? "", value => { state.head = value === "" ? null : Number(value); redraw(); })));
    return place;
  }

  function texts() {
    const entries = Texts.index(runs);
    if (!entries.length) {
      section("texts", "Texts", element("p", { class: "soft" }, "No texts were recorded: see report.samples in the config."));
      return;
    }
    state.document = Texts.best(entries);
    const heads = Math.max(...entries.map(entry => entry.document.loss.length));
    const tip = element("div", { class: "tip", hidden: true, role: "tooltip" });
    document.body.append(tip);
    const tools = element("div", { class: "tools" }), panels = element("div", { class: runs.length > 1 ? "panels" : "" });
    const headPlace = headSelect(heads, "mean of all heads");
    section("texts", "Texts, each token coloured by the weight it got", tools, panels);
    const label = ({ document, steps }) => `${document.id}${document.start ? ` (from token ${document.start})` : ""} · ${
      steps.length > 1 ? `${steps.length} steps` : `step ${steps[0]}`}`;
    const draw = () => {
      const entry = entries[state.document];
      const places = entry.steps;
      if (!places.includes(state.step)) state.step = places[places.length - 1];
      const slider = element("input", { type: "range", min: "0", max: String(places.length - 1), "aria-label": "step",
        value: String(places.indexOf(state.step)), disabled: places.length === 1,
        oninput: event => { state.step = places[Number(event.target.value)]; stepName.textContent = state.step.toLocaleString("en"); drawPanels(); } });
      const stepName = element("b", {}, state.step.toLocaleString("en"));
      tools.replaceChildren(
        select("document", entries.map((one, i) => [i, label(one)]), state.document,
          value => { state.document = Number(value); state.step = null; redraw(); }),
        element("label", {}, "step ", slider, " ", stepName), headPlace,
        select("colour", Texts.names(runs).map(name => [name, Texts.words(name)]), state.by,
          value => { state.by = value; redraw(); }));
      drawPanels();
    };
    const drawPanels = () => {
      tip.hidden = true;
      const entry = entries[state.document];
      const shown = [...entry.runs].filter(([run]) => !state.hidden.has(run));
      panels.replaceChildren(...shown.map(([run, records]) => Texts.panel(runs[run], Texts.nearest(records, state.step), state, tip)));
      if (!shown.length) panels.append(element("p", { class: "soft" }, "No run that is shown recorded this document."));
    };
    redraws.push(draw);
    addEventListener("scroll", () => { tip.hidden = true; }, { passive: true });
  }

  // --- one prompt, continued

  function sample() {
    const known = runs.filter(run => run.sample.prompt !== undefined);
    if (!known.length) return;
    const said = (words, text) => (text === undefined ? [] : [element("dt", {}, words), element("dd", { class: "text" }, text)]);
    section("sample", "The same prompt, continued before and after training", ...known.map(run => element("article", { class: "panel" },
      runs.length > 1 ? element("h3", {}, run.name) : null, element("dl", { class: "sample" }, ...said("prompt", run.sample.prompt),
        ...said("before", run.sample.before), ...said("after", run.sample.after)))));
  }

  // weights that are all the same show nothing
  const weighs = run => run.samples.some(record => record.documents.some(document =>
    document.weight && new Set(document.weight.flat().filter(weight => weight !== null)).size > 1));
  if (!runs.some(weighs)) state.by = "loss";
  paintRuns();
  header();
  lead();
  texts();
  sample();
  curves();
  facts();
  redraw();
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", redraw);
  document.documentElement.dataset.ready = "true";
})();
