// What every page needs: elements, colours, numbers, and files to save.
"use strict";

const Dom = (() => {
  const css = name => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
  const color = number => css(`--c${number % 8}`);
  const element = (tag, attributes = {}, ...children) => {
    const made = document.createElement(tag);
    for (const [name, value] of Object.entries(attributes)) {
      if (name.startsWith("on")) made.addEventListener(name.slice(2), value);
      else if (value !== null && value !== undefined && value !== false) made.setAttribute(name, value === true ? "" : value);
    }
    made.append(...children.filter(child => child !== null));
    return made;
  };

  function number(value) {
    if (value === null || value === undefined) return "–";
    const size = Math.abs(value);
    if (size !== 0 && (size < 1e-3 || size >= 1e6)) return value.toExponential(2);
    return size >= 1000 ? Math.round(value).toLocaleString("en") : String(Number(value.toPrecision(4)));
  }

  const signed = value => (value > 0 ? "+" : value < 0 ? "−" : "") + number(Math.abs(value));

  function save(name, content, type) {
    const url = URL.createObjectURL(content instanceof Blob ? content : new Blob([content], { type }));
    const link = element("a", { href: url, download: name });
    document.body.append(link);
    link.click();
    link.remove();
    setTimeout(() => URL.revokeObjectURL(url), 10000);
  }

  // rows of texts and numbers, the first one the heads
  const csv = rows => rows.map(row => row.map(cell => {
    const text = cell === null || cell === undefined ? "" : String(cell);
    return /[",\n]/.test(text) ? `"${text.replaceAll('"', '""')}"` : text;
  }).join(",")).join("\n") + "\n";

  // the button below a table that saves it; rows() gives the heads first
  const saveTable = (name, label, rows) => element("div", { class: "saves" }, element("button", { type: "button",
    "aria-label": `save ${label} as CSV`, onclick: () => save(`${name}.csv`, csv(rows()), "text/csv") }, "CSV"));

  return { color, css, csv, element, number, save, saveTable, signed };
})();
