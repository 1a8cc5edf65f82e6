// The three charts of a run under one step cursor, drawn by Bokeh: entropy, reward, predicted dH.

import { CLASSES, number, signed } from "./words.mjs";

const HEIGHTS = { entropy: 210, reward: 170, flow: 150 };

export function palette(node) {
  const style = getComputedStyle(node);
  const of = (name) => style.getPropertyValue(name).trim();
  return {
    ink: of("--ink"), muted: of("--muted"), line: of("--line"), box: of("--box"), bad: of("--bad"),
    good: of("--good"), warn: of("--warn"), accent: of("--accent"), band: of("--band"),
    ...Object.fromEntries(CLASSES.map((cls) => [cls, of(`--${cls.replace("_", "-")}`)])),
  };
}

// A Bokeh figure in the page's colours, with zoom by drag and reset by double click.
export function newFigure(title, label, colors, height, xRange = null) {
  const P = Bokeh.Plotting;
  const figure = P.figure({
    height, sizing_mode: "stretch_width", tools: "box_zoom,reset,save", toolbar_location: null,
    ...(xRange ? { x_range: xRange } : {}),
    background_fill_alpha: 0, border_fill_alpha: 0, outline_line_color: colors.line, min_border_left: 58,
  });
  figure.title.text = title;
  figure.title.text_color = colors.ink;
  figure.title.text_font_size = "13px";
  figure.title.text_font_style = "normal";
  for (const axis of [...figure.xaxes, ...figure.yaxes]) {
    axis.axis_label_text_color = colors.muted;
    axis.axis_label_text_font_style = "normal";
    axis.axis_label_text_font_size = "12px";
    axis.major_label_text_color = colors.muted;
    axis.axis_line_color = colors.line;
    axis.major_tick_line_color = colors.line;
    axis.minor_tick_line_color = null;
  }
  for (const grid of [...figure.xgrids, ...figure.ygrids]) grid.grid_line_color = colors.line;
  figure.yaxes[0].axis_label = label;
  figure.on_event(Bokeh.require("core/bokeh_events").DoubleTap, () => figure.reset.emit());
  return figure;
}

export class Charts {
  constructor(node, model) {
    this.node = node;
    this.model = model;
    this.cursors = [];
    model.on("run", () => this.draw());
    model.on("grown", () => this.update());
    model.on("step", () => this.point());
    matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => this.draw());
  }

  draw() {
    this.node.replaceChildren();
    this.cursors = [];
    this.sources = {};
    const { run } = this.model;
    if (!run || !this.model.steps.length) return;
    const colors = palette(this.node);
    this.xRange = new Bokeh.Range1d(this.extent());
    const shown = [this.entropy(run, colors), this.reward(run, colors), this.flow(run, colors)];
    const figures = shown.filter(Boolean);
    if (figures.length) figures.at(-1).xaxes[0].axis_label = stepWords(run);
    for (const figure of figures) this.finish(figure, colors);
    // One document, so that the figures may share their range.
    Bokeh.Plotting.show(figures, this.node);
    this.point();
  }

  extent() {
    const { steps } = this.model;
    const pad = Math.max(0.5, 0.01 * (steps.at(-1) - steps[0]));
    return { start: steps[0] - pad, end: steps.at(-1) + pad, bounds: [steps[0] - pad, steps.at(-1) + pad] };
  }

  finish(figure, colors) {
    const { Span, CrosshairTool } = Bokeh;
    const cursor = new Span({ dimension: "height", location: this.model.step, line_color: colors.ink, line_width: 1.5 });
    figure.add_layout(cursor);
    this.cursors.push(cursor);
    figure.add_tools(new CrosshairTool({ dimensions: "height", line_color: colors.muted, line_alpha: 0.5 }));
    const events = Bokeh.require("core/bokeh_events");
    figure.on_event(events.Tap, (event) => this.model.goto(event.x));
  }

  point() {
    for (const cursor of this.cursors) cursor.location = this.model.step;
  }

  // Steps were added: the sources grow, marks stay.
  update() {
    const { run } = this.model;
    if (!this.sources?.entropy && !this.sources?.reward) return this.draw();
    const marks = JSON.stringify([run.onset, run.first_warning, run.best_step, run.best_checkpoint, run.bands]);
    if (marks !== this.marks) return this.draw();
    for (const name of ["entropy", "reward"]) {
      if (this.sources[name]) this.sources[name].data = columns(run, name);
    }
    if (this.sources.flow) this.sources.flow.data = flowColumns(run);
    const { start, end, bounds } = this.extent();
    const followed = this.xRange.start <= start;
    this.xRange.bounds = bounds;
    if (followed) Object.assign(this.xRange, { start, end });
  }

  entropy(run, colors) {
    if (!run.steps.values.entropy) return null;
    const band = run.bands.entropy;
    const figure = newFigure("Entropy", "nats per token", colors, HEIGHTS.entropy, this.xRange);
    if (band) this.band(figure, band.low, band.high, colors, "baseline band");
    this.line(figure, run, "entropy", colors.accent, "nats");
    if (run.first_warning !== run.onset) this.mark(figure, run.first_warning, colors.warn, "first warning", 20);
    this.mark(figure, run.onset, colors.bad, "onset");
    this.marks = JSON.stringify([run.onset, run.first_warning, run.best_step, run.best_checkpoint, run.bands]);
    return figure;
  }

  reward(run, colors) {
    if (!run.steps.values.reward) return null;
    const band = run.bands.reward;
    const figure = newFigure("Reward", "mean reward", colors, HEIGHTS.reward, this.xRange);
    if (band) this.band(figure, band.low, band.high, colors, "baseline band");
    this.line(figure, run, "reward", colors.good, "");
    this.mark(figure, run.onset, colors.bad, "onset");
    const best = run.best_checkpoint ?? run.best_step;
    this.mark(figure, best, colors.good, run.best_checkpoint === null ? "best step" : "best checkpoint", 20);
    return figure;
  }

  flow(run, colors) {
    const data = flowColumns(run);
    if (!data) return null;
    const figure = newFigure("Predicted dH by class", "nats, per unit step", colors, HEIGHTS.flow, this.xRange);
    const source = new Bokeh.ColumnDataSource({ data });
    this.sources.flow = source;
    const width = 0.9 * typicalGap(this.model.steps);
    for (const cls of CLASSES) {
      figure.vbar({ x: { field: "step" }, bottom: { field: `${cls}_from` }, top: { field: `${cls}_to` }, width,
        color: colors[cls], line_color: null, source });
    }
    const hover = new Bokeh.HoverTool({ mode: "vline", attachment: "above",
      tooltips: [["step", "@step"], ...CLASSES.map((cls) => [cls, `@${cls}{+0.000e+0}`])] });
    hover.renderers = figure.renderers.slice(0, 1);
    figure.add_tools(hover);
    figure.add_layout(new Bokeh.Span({ dimension: "width", location: 0, line_color: colors.muted }));
    return figure;
  }

  band(figure, low, high, colors, words) {
    figure.add_layout(new Bokeh.BoxAnnotation({ bottom: low, top: high, fill_color: colors.band, fill_alpha: 1,
      line_color: null, level: "underlay" }));
    figure.add_layout(new Bokeh.Label({ x: 4, y: high, x_units: "screen", text: words, text_color: colors.muted,
      text_font_size: "11px", text_baseline: "top" }));
  }

  line(figure, run, name, color, unit) {
    const source = new Bokeh.ColumnDataSource({ data: columns(run, name) });
    this.sources[name] = source;
    const xy = { x: { field: "step" }, source };
    if (run.steps.values.step.length > 20) figure.line({ ...xy, y: { field: "raw" }, color, alpha: 0.3 });
    figure.line({ ...xy, y: { field: "smooth" }, color, line_width: 2 });
    const dots = figure.scatter({ ...xy, y: { field: "raw" }, size: 5, color, alpha: this.model.steps.length > 80 ? 0 : 0.7 });
    figure.add_tools(new Bokeh.HoverTool({ mode: "vline", renderers: [dots],
      tooltips: [["step", "@step"], [name, `@raw{0.0000} ${unit}`], ["smoothed", "@smooth{0.0000}"]] }));
  }

  mark(figure, step, color, words, height = 4) {
    if (step === null || step === undefined) return;
    figure.add_layout(new Bokeh.Span({ dimension: "height", location: step, line_color: color, line_width: 2,
      line_dash: [6, 3] }));
    const steps = this.model.steps, late = step - steps[0] > 0.85 * (steps.at(-1) - steps[0]);
    figure.add_layout(new Bokeh.Label({ x: step, y: height, y_units: "screen", text: ` ${words}: ${step} `,
      text_align: late ? "right" : "left", text_color: color, text_font_size: "12px" }));
  }
}

export function stepWords(run) {
  const updates = run.updates;
  return updates > 1 ? `rollout step (${number(updates)} updates each)` : "rollout step";
}

function typicalGap(steps) {
  const gaps = steps.slice(1).map((step, i) => step - steps[i]).sort((a, b) => a - b);
  return gaps.length ? gaps[Math.floor(gaps.length / 2)] : 1;
}

export function columns(run, name) {
  const raw = run.steps.values[name].map((value) => value ?? NaN);
  return { step: run.steps.values.step, raw, smooth: smoothed(raw) };
}

// Centred rolling median, as the diagnosis smooths.
export function smoothed(values) {
  const width = Math.min(25, Math.max(3, Math.floor(values.length / 20))) | 1;
  const half = (width - 1) / 2;
  return values.map((_, i) => {
    const part = values.slice(Math.max(0, i - half), i + half + 1).filter(Number.isFinite).sort((a, b) => a - b);
    if (!part.length) return NaN;
    const middle = part.length >> 1;
    return part.length % 2 ? part[middle] : (part[middle - 1] + part[middle]) / 2;
  });
}

// Stacked bars: what raises entropy above zero, what lowers it below.
export function flowColumns(run) {
  const flows = run.classes.pred_dentropy_sum;
  if (!flows) return null;
  const data = { step: run.classes.step };
  const up = run.classes.step.map(() => 0);
  const down = up.slice();
  for (const cls of CLASSES) {
    data[cls] = flows[cls].map((value) => value ?? 0);
    const side = data[cls].map((value) => (value >= 0 ? up : down));
    data[`${cls}_from`] = side.map((of, i) => of[i]);
    data[`${cls}_to`] = side.map((of, i) => (of[i] += data[cls][i]));
  }
  return data;
}

export { signed };
