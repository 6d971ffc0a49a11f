// Line charts and the picture of how weights are distributed, drawn by uPlot.
"use strict";

const Charts = (() => {
  const live = [];
  const resizer = new ResizeObserver(entries => {
    for (const { target, contentRect } of entries) {
      const chart = live.find(one => one.place === target);
      if (chart && contentRect.width > 50 && Math.abs(chart.plot.width - contentRect.width) > 1)
        chart.plot.setSize({ width: contentRect.width, height: chart.plot.height });
    }
  });

  const { color, css, element, number } = Dom;

  const axis = (more = {}) => ({
    stroke: css("--soft"), grid: { stroke: css("--line"), width: 1 }, ticks: { show: false },
    font: "12px system-ui, sans-serif", ...more,
  });

  function add(place, options, data) {
    const plot = new uPlot({ width: Math.max(place.clientWidth, 100), ...options }, data, place);
    live.push({ place, plot });
    resizer.observe(place);
    return plot;
  }

  // exponential moving average that starts unbiased; null stays null
  function smoothed(values, factor) {
    let sum = 0, weight = 0;
    return values.map(value => {
      if (value === null || value === undefined) return value;
      sum = factor * sum + value;
      weight = factor * weight + 1;
      return sum / weight;
    });
  }

  // lines: [{label, color, steps, values}]
  function lines(place, choices, smooth, marks) {
    if (!choices.length) return;
    const joined = uPlot.join(choices.map(line => [line.steps, smooth ? smoothed(line.values, smooth) : line.values]));
    const faint = smooth ? uPlot.join(choices.map(line => [line.steps, line.values])).slice(1) : [];
    const series = choices.map(line => ({
      label: line.label, stroke: line.color, width: 1.75, spanGaps: true,
      points: { show: line.steps.length < 3, size: 6, fill: line.color }, value: (_, value) => number(value),
    }));
    const raw = faint.map((_, i) => ({ stroke: choices[i].color, width: 1, alpha: 0.25, spanGaps: true, points: { show: false } }));
    const plot = add(place, {
      height: 220,
      scales: { x: { time: false }, y: { range: (_, low, high) => spread(low, high) } },
      axes: [
        axis({ values: (_, splits) => splits.map(number) }),
        axis({ size: 62, values: (_, splits) => splits.map(number) }),
      ],
      series: [{ label: "step", value: (_, value) => (value === null ? "–" : value.toLocaleString("en")) }, ...series, ...raw],
      cursor: { sync: { key: "steps" }, points: { size: 7 } },
      legend: { live: true },
      hooks: { drawClear: [u => drawMarks(u, marks)], init: [u => hideRaw(u, series.length)] },
    }, [joined[0], ...joined.slice(1), ...faint]);
    plot.root.querySelectorAll(".u-legend .u-series").forEach((row, i) => i && row.setAttribute("title", "click: show or hide"));
  }

  // a line that does not change is drawn in the middle
  const spread = (low, high) => (low === high ? [low - (Math.abs(low) / 2 || 1), high + (Math.abs(high) / 2 || 1)]
    : uPlot.rangeNum(low, high, 0.08, false));

  const hideRaw = (u, count) =>
    u.root.querySelectorAll(".u-legend .u-series").forEach((row, i) => { if (i > count) row.style.display = "none"; });

  // where stages begin
  function drawMarks(u, marks) {
    for (const [name, step] of marks.slice(1)) {
      const x = Math.round(u.valToPos(step, "x", true));
      if (x < u.bbox.left || x > u.bbox.left + u.bbox.width) continue;
      u.ctx.save();
      u.ctx.strokeStyle = u.ctx.fillStyle = css("--soft");
      u.ctx.setLineDash([4, 4]);
      u.ctx.beginPath();
      u.ctx.moveTo(x, u.bbox.top);
      u.ctx.lineTo(x, u.bbox.top + u.bbox.height);
      u.ctx.stroke();
      u.ctx.font = `${11 * devicePixelRatio}px system-ui, sans-serif`;
      u.ctx.fillText(name, x + 4, u.bbox.top + 11 * devicePixelRatio);
      u.ctx.restore();
    }
  }

  // records: [[step, counts by head and bin]]; head: null for all
  function distribution(place, records, bins, head, paint) {
    const shares = records.map(([, heads]) => {
      const chosen = head === null ? heads : heads.slice(head, head + 1);
      const counts = bins.map((_, bin) => chosen.reduce((sum, one) => sum + one[bin], 0));
      const total = counts.reduce((sum, count) => sum + count, 0) || 1;
      return counts.map(count => count / total);
    });
    const most = Math.max(...shares.flat()) || 1;
    const seen = bins.map((_, bin) => bin).filter(bin => shares.some(share => share[bin] > 0));
    const positive = seen.filter(bin => bin > 0);
    const low = Math.min(...positive, bins.length), high = Math.max(...positive, 0);
    const zero = low - 3; // the row of weight 0 stands apart: a logarithm never gets there
    const row = bin => (bin === 0 ? zero : bin);
    const bottom = seen.includes(0) ? zero : low;
    const steps = records.map(([step]) => step);
    const last = steps[steps.length - 1];
    const width = steps.length > 1 ? (last - steps[0]) / (steps.length - 1) : 1;
    const tip = element("div", { class: "tip small", hidden: true });
    const name = bin => (bin === 0 ? "0" : bin === 1 ? `< ${number(bins[2])}` : number(bins[bin]));
    const every = high - low > 40 ? 8 : 4;
    add(place, {
      height: 260,
      scales: {
        x: { time: false, range: [steps[0], last + width] },
        y: { range: [Math.min(bottom, low) - 0.8, Math.max(high, low) + 0.8] },
      },
      axes: [
        axis({ values: (_, splits) => splits.map(number) }),
        axis({
          size: 62,
          splits: () => [
            ...(seen.includes(0) ? [zero] : []),
            ...bins.map((_, bin) => bin).filter(bin => bin >= low && bin <= high && (bin - 2) % every === 0),
          ],
          values: (_, splits) => splits.map(split => (split === zero && seen.includes(0) ? "0" : name(split))),
          grid: { show: false },
        }),
      ],
      series: [{}, { show: false }],
      legend: { show: false },
      cursor: { y: false, sync: { key: "steps" }, drag: { x: false, y: false }, points: { show: false } },
      hooks: {
        draw: [u => {
          u.ctx.save();
          u.ctx.fillStyle = paint;
          shares.forEach((share, i) => {
            const left = u.valToPos(steps[i], "x", true);
            const right = u.valToPos(i + 1 < steps.length ? steps[i + 1] : last + width, "x", true);
            share.forEach((part, bin) => {
              if (!part) return;
              const top = u.valToPos(row(bin) + 0.5, "y", true), end = u.valToPos(row(bin) - 0.5, "y", true);
              u.ctx.globalAlpha = 0.08 + 0.92 * Math.sqrt(part / most);
              u.ctx.fillRect(left, top, Math.max(right - left + 0.5, 1), end - top);
            });
          });
          u.ctx.restore();
        }],
        init: [u => u.over.append(tip)],
        setCursor: [u => {
          const { left, top } = u.cursor;
          const share = left >= 0 && top >= 0 ? shares[at(steps, u.posToVal(left, "x"))] : null;
          const y = Math.round(u.posToVal(top, "y"));
          const bin = y === zero && seen.includes(0) ? 0 : y;
          tip.hidden = !share || !(bin >= 0 && bin < bins.length);
          if (tip.hidden) return;
          const step = steps[at(steps, u.posToVal(left, "x"))];
          tip.textContent = `step ${step.toLocaleString("en")}: ${(100 * share[bin]).toFixed(1)} % of predictions at weight ${name(bin)}`;
          tip.style.left = `${Math.min(left + 12, u.over.clientWidth - 230)}px`;
          tip.style.top = `${Math.max(top - 34, 0)}px`;
        }],
      },
    }, [steps, steps.map(() => null)]);
    return () => {
      const u = live.find(one => one.place === place).plot, { canvas, node, text, ticks } = Svg;
      const svg = canvas(u.width, u.height, "distribution of weights over training");
      const x = step => u.over.offsetLeft + u.valToPos(step, "x"), y = bin => u.over.offsetTop + u.valToPos(bin, "y");
      shares.forEach((share, i) => share.forEach((part, bin) => part && svg.append(node("rect", {
        x: x(steps[i]), width: Math.max(x(steps[i + 1] ?? last + width) - x(steps[i]), 1),
        y: y(row(bin) + 0.5), height: y(row(bin) - 0.5) - y(row(bin) + 0.5), fill: paint, opacity: 0.08 + 0.92 * Math.sqrt(part / most),
      }))));
      for (const bin of u.axes[1].splits(u)) svg.append(text(u.over.offsetLeft - 6, y(bin) + 4, bin === zero ? "0" : name(bin), { "text-anchor": "end" }));
      for (const step of ticks(steps[0], last, 6)) svg.append(text(x(step), u.height - 12, number(step), { "text-anchor": "middle" }));
      return svg;
    };
  }

  // the last of the ascending steps that is not beyond value
  function at(steps, value) {
    let found = 0;
    steps.forEach((step, i) => { if (step <= value) found = i; });
    return found;
  }

  function clear(root) {
    for (let i = live.length - 1; i >= 0; i--) {
      if (!root.contains(live[i].place)) continue;
      resizer.unobserve(live[i].place);
      live[i].plot.destroy();
      live.splice(i, 1);
    }
    root.replaceChildren();
  }

  return { lines, distribution, smoothed, clear };
})();
