// The curves: one small chart a metric, all runs in each, one cursor for all.
"use strict";

(() => {
  const { element, byId, colour, percent, number } = Report;
  const data = JSON.parse(byId("curve-data").textContent);
  if (!byId("charts")) return;
  data.runs.forEach((run) => Object.setPrototypeOf(run.series, null)); // a metric may be called "constructor"
  const DASHES = [[], [8, 4], [2, 3], [10, 3, 2, 3], [5, 2], [1, 2]];
  const HEIGHT = 190;
  const DENSE = 100; // points of a curve in which dashes would be taken for data
  const state = {
    shown: new Set(data.first),
    hidden: new Set(),
    smoothing: 0,
    axis: "step",
  };
  const live = new Map(); // metric -> {plot, card}

  const strokeOf = (run) => () => colour(`--run${run % 6}`);
  const faintOf = (run) => () => colour(`--run${run % 6}-faint`);
  const format = (metric, value) => (value == null ? "-" : metric.percent ? percent(value) : number(value));

  // Exponential moving average that starts unbiased.
  function smoothed(values) {
    let sum = 0;
    let weight = 0;
    return values.map((value) => {
      sum = state.smoothing * sum + (1 - state.smoothing) * value;
      weight = state.smoothing * weight + (1 - state.smoothing);
      return sum / weight;
    });
  }

  function placesOf(run, steps) {
    if (state.axis === "step") return steps;
    const [known, seconds] = run.seconds;
    const bySteps = new Map(known.map((step, i) => [step, seconds[i]]));
    return steps.map((step) => bySteps.get(step) ?? null);
  }

  // -> uPlot's series and their tables of x and y; `readout` names the series whose value stands below the chart.
  function seriesOf(metric) {
    const series = [];
    const tables = [];
    data.runs.forEach((run, index) => {
      const own = run.series[metric.name];
      if (!own || state.hidden.has(index)) return;
      const places = placesOf(run, own[0]);
      const keep = own[1].map((_, i) => i).filter((i) => places[i] !== null);
      const x = keep.map((i) => places[i]);
      const y = keep.map((i) => own[1][i]);
      const smooth = state.smoothing > 0 && !metric.points && y.length > 2;
      const lone = metric.points || y.length === 1;
      if (smooth) {
        series.push({ run: index, stroke: faintOf(index), width: 1, points: { show: false }, spanGaps: true });
        tables.push([x, y]);
      }
      series.push({
        run: index,
        readout: true,
        stroke: strokeOf(index),
        width: 2,
        dash: y.length > DENSE ? [] : DASHES[index % DASHES.length],
        points: { show: lone, size: 6, fill: strokeOf(index) },
        spanGaps: true,
      });
      tables.push([x, smooth ? smoothed(y) : y]);
    });
    return { series, tables };
  }

  function teachersOf(metric) {
    return data.runs.flatMap((run, index) => {
      const own = metric.teacher && run.series[metric.teacher];
      return own && !state.hidden.has(index) ? [{ run: index, value: own[1].at(-1) }] : [];
    });
  }

  function draw(metric) {
    const { series, tables } = seriesOf(metric);
    const teachers = teachersOf(metric);
    const readout = element("div", { className: "readout" });
    const body = element("div", {
      className: "plot",
      tabIndex: 0,
      role: "img",
      "aria-label": `${metric.title}: ${ends(metric)}`,
    });
    const card = element(
      "figure",
      { className: "card chart" },
      element("figcaption", {}, element("strong", {}, metric.title), " ", element("small", {}, metric.about)),
      body,
      readout,
    );
    byId("charts").append(card);
    const joined = tables.length ? uPlot.join(tables.map(([x, y]) => [x, y])) : [[]];
    teachers.forEach(({ run, value }) => {
      series.push({ run, stroke: strokeOf(run), width: 1, dash: [3, 4], points: { show: false } });
      joined.push(joined[0].map(() => value));
    });
    const axis = {
      stroke: () => colour("--muted"),
      grid: { stroke: () => colour("--line"), width: 1 },
      ticks: { stroke: () => colour("--line"), width: 1, size: 4 },
      font: "12px system-ui, sans-serif",
    };
    const options = {
      width: Math.max(body.clientWidth, 200),
      height: HEIGHT,
      padding: [8, 16, 0, 0],
      legend: { show: false },
      cursor: { sync: { key: "skd", scales: ["x", null] }, points: { size: 7 }, y: false },
      scales: { x: { time: false, range: wholeRange }, y: { range: metric.zero ? fromZero : padded } },
      axes: [
        { ...axis, size: 30, values: (_, ticks) => ticks.map((tick) => (Number.isInteger(tick) ? number(tick) : "")) },
        { ...axis, size: metric.percent ? 62 : 58, values: (_, ticks) => ticks.map((tick) => tickOf(metric, tick)) },
      ],
      series: [{}, ...series],
      hooks: { setCursor: [(plot) => read(plot, metric, readout, teachers)] },
    };
    const plot = new uPlot(options, joined, body);
    body.addEventListener("keydown", (event) => step(event, plot));
    read(plot, metric, readout, teachers);
    live.set(metric.name, { plot, card, body });
  }

  const tickOf = (metric, tick) => (metric.percent ? `${Number((100 * tick).toPrecision(6))} %` : number(tick));
  const wholeRange = (_, low, high) => (low === high ? [low - 1, high + 1] : [low, high]);
  const fromZero = (_, low, high) => [0, Math.max(high * 1.05, 1e-6)];
  const padded = (_, low, high) => {
    const margin = (high - low || Math.abs(high) || 1) * 0.08;
    return [low - margin < 0 && low >= 0 ? 0 : low - margin, high + margin];
  };

  function ends(metric) {
    return data.runs
      .filter((run) => run.series[metric.name])
      .map((run) => {
        const values = run.series[metric.name][1];
        return `${run.name} from ${format(metric, values[0])} to ${format(metric, values.at(-1))}`;
      })
      .join("; ");
  }

  // The values at the cursor, or the last ones, below the chart.
  function read(plot, metric, readout, teachers) {
    const { idx } = plot.cursor;
    const parts = [];
    plot.series.forEach((series, i) => {
      if (!series.readout) return;
      const values = plot.data[i];
      let at = idx ?? values.length - 1;
      while (at > 0 && values[at] == null) at--;
      const swatch = element("span", { className: `swatch run${series.run % 6}` });
      parts.push(element("span", {}, swatch, format(metric, values[at])));
    });
    const distinct = [...new Set(teachers.map(({ value }) => format(metric, value)))];
    if (distinct.length) parts.push(element("span", { className: "quiet" }, `teacher ${distinct.join(", ")} (dotted)`));
    const place = idx == null ? (state.smoothing && !metric.points ? "last, smoothed" : "last") : state.axis === "step" ? `step ${number(plot.data[0][idx])}` : `${number(plot.data[0][idx])} s`;
    readout.replaceChildren(element("span", { className: "quiet" }, place), ...parts);
  }

  function step(event, plot) {
    const move = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
    if (!move) return;
    event.preventDefault();
    const last = plot.data[0].length - 1;
    const at = Math.min(last, Math.max(0, (plot.cursor.idx ?? (move < 0 ? last + 1 : -1)) + move));
    plot.setCursor({ left: plot.valToPos(plot.data[0][at], "x"), top: 10 });
  }

  function drawAll() {
    live.forEach(({ plot }) => plot.destroy());
    live.clear();
    byId("charts").replaceChildren();
    data.metrics.filter((metric) => state.shown.has(metric.name)).forEach(draw);
    fit();
  }

  function fit() {
    live.forEach(({ plot, body }) => {
      if (body.clientWidth && body.clientWidth !== plot.width) plot.setSize({ width: body.clientWidth, height: HEIGHT });
    });
  }

  function toggle(set, key, button, on) {
    set.has(key) ? set.delete(key) : set.add(key);
    button.setAttribute("aria-pressed", String(on()));
    drawAll();
  }

  data.runs.forEach((run, index) => {
    const swatch = element("span", { className: `swatch run${index % 6}` });
    const button = element("button", { type: "button", "aria-pressed": "true" }, swatch, run.name);
    button.addEventListener("click", () => toggle(state.hidden, index, button, () => !state.hidden.has(index)));
    byId("run-legend").append(button);
  });
  data.metrics.forEach((metric) => {
    const on = () => state.shown.has(metric.name);
    const button = element("button", { type: "button", title: metric.name, "aria-pressed": String(on()) }, metric.title);
    button.addEventListener("click", () => toggle(state.shown, metric.name, button, on));
    byId("chooser").append(button);
  });
  byId("smoothing").addEventListener("input", (event) => {
    state.smoothing = Number(event.target.value);
    byId("smoothing-value").textContent = event.target.value;
    drawAll();
  });
  byId("x-axis").addEventListener("change", (event) => {
    state.axis = event.target.value;
    drawAll();
  });
  Report.themeListeners.push(() => live.forEach(({ plot }) => plot.redraw(false, true)));
  new ResizeObserver(fit).observe(byId("charts"));
  drawAll();
})();
