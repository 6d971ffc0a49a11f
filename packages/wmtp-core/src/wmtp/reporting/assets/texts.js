// Texts, with each token coloured by a number.
"use strict";

const Texts = (() => {
  const { element, number, css } = Dom;
  const words = name => name.replaceAll("_", " ");

  // every recorded document of all runs: key → {key, label, steps, runs: Map(run → Map(step → {record, document}))}
  function index(runs) {
    const found = new Map();
    runs.forEach((run, number) => {
      for (const record of run.samples) {
        for (const document of record.documents) {
          const key = JSON.stringify([document.id, document.start]);
          if (!found.has(key)) found.set(key, { key, document, steps: new Set(), runs: new Map() });
          const entry = found.get(key);
          entry.steps.add(record.step);
          if (!entry.runs.has(number)) entry.runs.set(number, new Map());
          entry.runs.get(number).set(record.step, { record, document });
        }
      }
    });
    const entries = [...found.values()].map(entry => ({ ...entry, steps: [...entry.steps].sort((a, b) => a - b) }));
    return entries.sort((a, b) => a.steps[0] - b.steps[0]);
  }

  // the entry to show first: of most runs, most steps, the latest, with the most to see
  function best(entries) {
    const rank = entry => [entry.runs.size, entry.steps.length, entry.steps[entry.steps.length - 1],
      entry.document.loss[0].filter(value => value !== null).length];
    const above = (one, other) => {
      const place = one.findIndex((value, i) => value !== other[i]);
      return place >= 0 && one[place] > other[place];
    };
    return entries.reduce((found, entry, i) => (above(rank(entry), rank(entries[found])) ? i : found), 0);
  }

  // the record of the step nearest to this one
  function nearest(records, step) {
    const steps = [...records.keys()];
    return records.get(steps.reduce((best, one) => (Math.abs(one - step) < Math.abs(best - step) ? one : best)));
  }

  // what can be shown of a token: name → numbers by token for one head, or for the mean of the heads (head === null)
  function columns(document, head) {
    const byHead = lists => (head === null ? mean(lists) : lists[head]);
    const found = new Map();
    if (document.weight) found.set("weight", byHead(document.weight));
    found.set("loss", byHead(document.loss));
    for (const [name, values] of Object.entries(document.details))
      found.set(name, Array.isArray(values[0]) ? byHead(values) : values);
    return found;
  }

  function mean(lists) {
    return lists[0].map((_, place) => {
      const known = lists.map(list => list[place]).filter(value => value !== null);
      return known.length ? known.reduce((sum, value) => sum + value, 0) / known.length : null;
    });
  }

  // value → [share of cold or hot colour from −1 to 1, whether the token is left out]; weights by their rank on their side of the mean
  function scale(name, values, meanWeight) {
    const known = values.filter(value => value !== null && value !== undefined);
    if (name === "weight") {
      const usual = meanWeight || 1;
      const above = known.filter(value => value > usual), below = known.filter(value => value > 0 && value < usual);
      return value => {
        if (value === 0) return [0, true];
        if (Math.abs(value / usual - 1) < 0.01) return [0, false];
        if (value > usual) return [above.filter(one => one <= value).length / above.length, false];
        return [-below.filter(one => one >= value).length / below.length, false];
      };
    }
    const sizes = known.map(Math.abs).sort((a, b) => a - b);
    const top = sizes.length ? sizes[Math.floor(0.98 * (sizes.length - 1))] || sizes[sizes.length - 1] || 1 : 1;
    return value => [clamp(value / top), false];
  }

  const clamp = value => Math.max(-1, Math.min(1, value));

  function paint(token, [share, skipped]) {
    if (skipped) token.classList.add("skipped");
    if (!share) return;
    const strength = Math.round(75 * Math.abs(share));
    token.style.background = `color-mix(in srgb, var(--${share > 0 ? "hot" : "cold"}) ${strength}%, transparent)`;
  }

  function legend(name, values, meanWeight) {
    const bar = element("span", { class: name === "weight" ? "bar both" : "bar" });
    if (name !== "weight") return element("span", { class: "scale" }, "0", bar, "high", element("span", { class: "soft" }, " (below 0: blue)"));
    const usual = meanWeight || 1, known = values.filter(value => value !== null && value !== undefined && value > 0);
    if (known.length && values.every(value => (value ?? usual) === usual))
      return element("span", { class: "scale" }, element("span", { class: "soft" }, `each token weighs ${number(usual)}`));
    return element("span", { class: "scale" }, number(Math.min(usual, ...known)), bar, number(Math.max(usual, ...known)),
      element("span", { class: "soft" }, ` by rank; no colour: ${number(usual)}, the step's mean · `),
      element("span", { class: "skipped" }, "weight 0"));
  }

  function show(text) {
    if (text === "") return "·";
    return text.replaceAll("\n", "↵\n");
  }

  function panel(run, { record, document }, choice, tip) {
    const shown = columns(document, choice.head);
    const name = shown.has(choice.by) ? choice.by : shown.keys().next().value;
    const values = shown.get(name);
    const color = scale(name, values, record.mean_weight);
    const text = element("div", { class: "text", lang: "", tabindex: "0", role: "group",
      "aria-label": `${run.name}: the text; arrow keys go from token to token`, onkeydown: event => walk(event, text, tip) });
    document.tokens.forEach((token, place) => {
      const span = element("span", { class: "token", tabindex: "-1" });
      span.textContent = show(token);
      if (values[place] === null || values[place] === undefined) span.classList.add("given");
      else paint(span, color(values[place]));
      span.addEventListener("pointerenter", () => explain(tip, span, document, place));
      span.addEventListener("focus", () => explain(tip, span, document, place));
      text.append(span);
    });
    text.addEventListener("pointerleave", () => { tip.hidden = true; });
    const label = document.is_correct === null ? null
      : element("span", { class: document.is_correct ? "badge good" : "badge bad", title: "is_correct of the data" }, document.is_correct ? "correct" : "incorrect");
    const missing = name === choice.by ? null
      : element("span", { class: "soft" }, ` has no ${words(choice.by)} here: coloured by ${words(name)}`);
    return element("article", { class: "panel" },
      element("header", {},
        element("i", { class: "dot", style: `background:${run.color}` }), element("b", {}, run.name),
        element("span", { class: "soft" }, ` step ${record.step.toLocaleString("en")}, ${record.stage}`), label, missing,
        legend(name, values, record.mean_weight)),
      text);
  }

  // arrow keys go from token to token, Escape closes what is told of one
  function walk(event, text, tip) {
    const tokens = [...text.children], at = tokens.indexOf(document.activeElement);
    const places = { ArrowRight: at + 1, ArrowLeft: at < 0 ? -1 : at - 1, Home: 0, End: tokens.length - 1 };
    if (event.key === "Escape") tip.hidden = true;
    const next = tokens[places[event.key]];
    if (!next) return;
    event.preventDefault();
    next.focus();
  }

  function explain(tip, span, document, place) {
    const heads = document.loss.length;
    const details = Object.entries(document.details);
    const perHead = [["weight", document.weight], ["loss", document.loss], ...details.filter(([, v]) => Array.isArray(v[0]))]
      .filter(([, values]) => values);
    const perToken = details.filter(([, values]) => !Array.isArray(values[0]));
    const head = element("tr", {}, element("th", {}, "head"), ...perHead.map(([name]) => element("th", {}, words(name))));
    const rows = [];
    for (let k = 0; k < heads; k++) {
      if (perHead.every(([, values]) => values[k][place] === null)) continue;
      rows.push(element("tr", {}, element("td", {}, String(k + 1)),
        ...perHead.map(([, values]) => element("td", {}, number(values[k][place])))));
    }
    tip.replaceChildren(
      element("div", { class: "name" }, element("code", {}, JSON.stringify(document.tokens[place])), ` token ${place + 1}`),
      rows.length ? element("table", {}, head, ...rows) : element("div", { class: "soft" }, "given, not predicted"),
      ...perToken.filter(([, values]) => values[place] !== null).map(([name, values]) =>
        element("div", {}, `${words(name)}: `, element("b", {}, number(values[place])))));
    tip.hidden = false;
    const box = span.getClientRects()[0], margin = 8;
    const left = Math.min(box.left, window.innerWidth - tip.offsetWidth - margin);
    const below = box.bottom + 6 + tip.offsetHeight < window.innerHeight;
    tip.style.left = `${Math.max(margin, left)}px`;
    tip.style.top = `${below ? box.bottom + 6 : Math.max(margin, box.top - tip.offsetHeight - 6)}px`;
  }

  // what any record offers to colour by, in the order in which it is met
  function names(runs) {
    const found = new Set(["weight", "loss"]);
    for (const run of runs)
      for (const record of run.samples)
        for (const document of record.documents) Object.keys(document.details).forEach(name => found.add(name));
    return [...found];
  }

  return { best, index, names, nearest, panel, words };
})();
