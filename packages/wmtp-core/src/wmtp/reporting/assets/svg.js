// Figures drawn as SVG: curves with bands, and forest plots. Each can be saved as SVG or PNG.
"use strict";

const Svg = (() => {
  const { css, element, number, save } = Dom;
  const SPACE = "http://www.w3.org/2000/svg";

  function node(tag, attributes = {}, ...children) {
    const made = document.createElementNS(SPACE, tag);
    for (const [name, value] of Object.entries(attributes)) if (value !== null && value !== undefined) made.setAttribute(name, value);
    made.append(...children);
    return made;
  }

  const text = (x, y, words, more = {}) => {
    const made = node("text", { x, y, fill: css("--soft"), "font-size": 12, ...more });
    made.textContent = words;
    return made;
  };

  // about `count` round numbers from low to high
  function ticks(low, high, count) {
    const rough = (high - low) / Math.max(count, 1) || 1;
    const unit = 10 ** Math.floor(Math.log10(rough));
    const step = [1, 2, 5, 10].map(one => one * unit).find(one => one >= rough * 0.999);
    const found = [];
    for (let i = Math.ceil(low / step - 1e-9); i * step <= high + step * 1e-9; i++) found.push(Number((i * step).toPrecision(12)) || 0);
    return found;
  }

  function canvas(width, height, label) {
    return node("svg", {
      xmlns: SPACE, viewBox: `0 0 ${width} ${height}`, width, height, role: "img", "aria-label": label,
      "font-family": "system-ui, sans-serif",
    });
  }

  // the buttons that save a figure; draw() → svg, key() → [{label, color}] for a legend in the file
  const saves = (name, caption, draw, key = () => []) => element("div", { class: "saves" }, ...["SVG", "PNG"].map(kind =>
    element("button", { type: "button", "aria-label": `save ${caption} as ${kind}`, onclick: () => {
      const svg = standalone(draw(), key());
      if (kind === "PNG") savePng(name, svg); else save(`${name}.svg`, new XMLSerializer().serializeToString(svg), "image/svg+xml");
    } }, kind)));

  // a figure with its caption and these buttons; draw(width) → svg
  function figure(name, caption, draw, key) {
    const place = element("div", { class: "drawn" });
    const made = element("figure", {}, element("figcaption", {}, caption), place, saves(name, caption, () => place.firstChild, key));
    let last = 0;
    const redraw = () => {
      last = place.clientWidth || 320;
      place.replaceChildren(draw(last));
    };
    new ResizeObserver(() => { if (Math.abs(place.clientWidth - last) > 1) redraw(); }).observe(place);
    requestAnimationFrame(redraw);
    return { made, redraw };
  }

  // a copy that needs no page: with a ground, and the legend below
  function standalone(svg, key) {
    const copy = svg.cloneNode(true), width = Number(svg.getAttribute("width")), left = 52;
    let x = left, y = Number(svg.getAttribute("height")) + (key.length ? 14 : -8);
    for (const { label, color } of key) {
      const room = 30 + 7 * label.length;
      if (x > left && x + room > width) [x, y] = [left, y + 18];
      copy.append(node("circle", { cx: x, cy: y - 4, r: 4, fill: color }), text(x + 9, y, label));
      x += room;
    }
    copy.setAttribute("height", y + 8);
    copy.setAttribute("viewBox", `0 0 ${width} ${y + 8}`);
    copy.prepend(node("rect", { width: "100%", height: "100%", fill: css("--card") }));
    return copy;
  }

  function savePng(name, svg) {
    const image = new Image(), scale = 2;
    image.onload = () => {
      const board = document.createElement("canvas");
      board.width = Number(svg.getAttribute("width")) * scale;
      board.height = Number(svg.getAttribute("height")) * scale;
      board.getContext("2d").drawImage(image, 0, 0, board.width, board.height);
      board.toBlob(blob => save(`${name}.png`, blob));
    };
    image.src = `data:image/svg+xml;charset=utf-8,${encodeURIComponent(new XMLSerializer().serializeToString(svg))}`;
  }

  // lines: [{label, color, steps, mean, low, high, n}]; low and high may be null
  function curves(lines, label) {
    return width => {
      const height = 240, left = 52, right = 18, top = 8, bottom = 34;
      const svg = canvas(width, height, label);
      const steps = lines.flatMap(line => line.steps);
      if (!steps.length) return svg;
      const values = lines.flatMap(line => [...line.mean, ...(line.low ?? []), ...(line.high ?? [])]).filter(Number.isFinite);
      let [low, high] = [Math.min(...values), Math.max(...values)];
      const room = (high - low) * 0.06 || Math.abs(low) * 0.1 || 1;
      [low, high] = [low - room, high + room];
      const [first, last] = [Math.min(...steps), Math.max(...steps)];
      const x = step => left + (width - left - right) * (last === first ? 0.5 : (step - first) / (last - first));
      const y = value => top + (height - top - bottom) * (high - value) / (high - low);
      for (const at of ticks(low, high, 5)) {
        svg.append(node("line", { x1: left, x2: width - right, y1: y(at), y2: y(at), stroke: css("--line") }),
          text(left - 6, y(at) + 4, number(at), { "text-anchor": "end" }));
      }
      for (const at of ticks(first, last, Math.floor(width / 90)))
        svg.append(text(x(at), height - bottom + 16, number(at), { "text-anchor": "middle" }));
      svg.append(text((left + width - right) / 2, height - 4, "optimizer step", { "text-anchor": "middle" }));
      for (const line of lines) {
        if (!line.low) continue;
        const there = line.steps.map((step, i) => [x(step), y(line.high[i])]);
        const back = line.steps.map((step, i) => [x(step), y(line.low[i])]).reverse();
        svg.append(node("polygon", { points: [...there, ...back].map(one => one.map(v => v.toFixed(1)).join(",")).join(" "),
          fill: line.color, opacity: 0.16 }));
      }
      for (const line of lines) {
        svg.append(node("polyline", { points: line.steps.map((step, i) => `${x(step).toFixed(1)},${y(line.mean[i]).toFixed(1)}`).join(" "),
          fill: "none", stroke: line.color, "stroke-width": 2 }));
        if (line.steps.length < 12) line.steps.forEach((step, i) => {
          const dot = node("circle", { cx: x(step), cy: y(line.mean[i]), r: 3, fill: line.color });
          const title = node("title");
          title.textContent = `${line.label}, step ${step}: ${number(line.mean[i])}`;
          dot.append(title);
          svg.append(dot);
        });
      }
      return svg;
    };
  }

  // how far the axis goes: as the widest row, but for rows three times as wide as all others, beside which no other could be seen
  function reach(rows) {
    const found = rows.map(row => Math.max(...[row.value, row.low ?? 0, row.high ?? 0].map(Math.abs))).sort((a, b) => a - b);
    let most = found[Math.floor(found.length / 2)];
    for (const one of found) if (one > most && (one <= 3 * most || !most)) most = one;
    return most;
  }

  // rows: [{label, note, value, low, high, color, filled}] with low and high null for one seed
  function forest(rows, label) {
    return width => {
      const narrow = width < 560, lineHeight = narrow ? 46 : 30, top = 10, bottom = 40;
      const left = narrow ? 12 : Math.min(320, width * 0.42), right = narrow ? 12 : 190;
      const height = top + rows.length * lineHeight + bottom;
      const svg = canvas(width, height, label);
      const most = reach(rows);
      const ends = rows.flatMap(row => [row.value, row.low ?? row.value, row.high ?? row.value, 0]).filter(end => Math.abs(end) <= most);
      let [low, high] = [Math.min(...ends), Math.max(...ends)];
      const room = (high - low) * 0.06 || 1;
      [low, high] = [low - room, high + room];
      const x = value => left + (width - left - right) * (Math.min(Math.max(value, low), high) - low) / (high - low);
      for (const at of ticks(low, high, Math.floor((width - left - right) / 80)))
        svg.append(node("line", { x1: x(at), x2: x(at), y1: top, y2: height - bottom, stroke: css("--line") }),
          text(x(at), height - bottom + 16, number(at), { "text-anchor": "middle" }));
      svg.append(node("line", { x1: x(0), x2: x(0), y1: top, y2: height - bottom, stroke: css("--soft"), "stroke-width": 1.5 }),
        text((left + width - right) / 2, height - 6, "difference, with its 95 % interval over seeds", { "text-anchor": "middle" }));
      rows.forEach((row, i) => {
        const middle = top + (i + (narrow ? 0.72 : 0.5)) * lineHeight;
        const ink = { fill: css("--ink"), "font-size": 13 };
        if (narrow) svg.append(text(left, middle - 16, row.label, ink));
        else svg.append(text(left - 10, middle + 4, row.label, { ...ink, "text-anchor": "end" }), text(width - right + 10, middle + 4, row.note));
        if (row.value < low || row.value > high) {
          const side = row.value > high ? 1 : -1, edge = x(row.value);
          svg.append(node("path", { d: `M${edge} ${middle} l${-9 * side} -6 v12 z`, fill: row.color, class: "outside" }),
            text(edge - 14 * side, middle + 4, `${number(row.value)}, outside`, { "text-anchor": side > 0 ? "end" : "start" }));
          return;
        }
        if (row.low !== null) {
          svg.append(node("line", { x1: x(row.low), x2: x(row.high), y1: middle, y2: middle, stroke: row.color, "stroke-width": 2 }));
          for (const end of [row.low, row.high])
            svg.append(node("line", { x1: x(end), x2: x(end), y1: middle - 5, y2: middle + 5, stroke: row.color, "stroke-width": 2 }));
        }
        const dot = node("circle", { cx: x(row.value), cy: middle, r: 5, stroke: row.color, "stroke-width": 2,
          fill: row.filled ? row.color : css("--card") });
        const title = node("title");
        title.textContent = `${row.label}: ${row.note}`;
        dot.append(title);
        svg.append(dot);
      });
      return svg;
    };
  }

  return { canvas, curves, figure, forest, node, saves, text, ticks };
})();
