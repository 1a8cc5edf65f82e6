// Several runs: the picker, settings overlaid with intervals over seeds, and how they differ.

import { newFigure, palette } from "./charts.mjs";
import { byId, el, fill, table } from "./dom.mjs";
import { escaped } from "./words.mjs";

const METRICS = ["reward", "entropy", "grad_norm", "length", "pass_rate", "kl_old"];
// As in the figures, and neither blue nor orange: those are the signs of the advantage.
const OWN = { GRPO: "#9b59b6", WAPO: "#1b9e55" };
const STROKES = ["#8c8c8c", "#a0724a", "#d264a0", "#3f9a9a", "#6a5acd", "#8b7d2b"];

export class Runs {
  constructor(model) {
    this.model = model;
    this.metric = null;
    model.on("runs", () => this.draw());
    model.on("run", () => this.pick());
    matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => this.chart());
  }

  draw() {
    const { runs } = this.model;
    fill(byId("picker"), runs.length > 1 ? el("label", {}, "run ", el("select", { id: "run-box",
      onchange: (event) => this.model.choose(runs.find((run) => run.id === event.target.value)) },
    runs.map((run) => el("option", { value: run.id }, `${escaped(run.name)}: ${run.verdict_words}`)))) : null);
    const link = document.querySelector('a[href="#compare"]');
    for (const part of [byId("compare"), link]) if (part) part.hidden = runs.length < 2;
    if (runs.length < 2) return;
    const shared = METRICS.filter((name) => runs.filter((run) => run.steps.values[name]).length > 1);
    this.metric ??= shared[0];
    fill(byId("compare-tools"), el("label", {}, "show ", el("select", { onchange: (event) => {
      this.metric = event.target.value;
      this.chart();
    } }, shared.map((name) => el("option", { selected: name === this.metric, value: name }, name.replaceAll("_", " "))))));
    this.chart();
    this.compared();
    this.pick();
  }

  pick() {
    const box = byId("run-box");
    if (box && this.model.run) box.value = this.model.run.id;
  }

  chart() {
    const place = byId("compare-chart");
    place.replaceChildren();
    if (this.model.runs.length < 2 || !this.metric) return;
    const groups = settingGroups(this.model.runs);
    fill(byId("compare-banner"), differences(groups));
    const colors = palette(place);
    const figure = newFigure(this.metric.replaceAll("_", " "), "", colors, 260);
    figure.xaxes[0].axis_label = "rollout step";
    groups.forEach((group, i) => {
      const source = new Bokeh.ColumnDataSource({ data: overSeeds(group.runs, this.metric) });
      const color = OWN[group.label] ?? STROKES[i % STROKES.length];
      const xy = { x: { field: "step" }, source, color, legend_label: `${group.label} (n=${group.runs.length})` };
      if (group.runs.length > 1) {
        figure.varea({ x: { field: "step" }, y1: { field: "low" }, y2: { field: "high" }, source, fill_color: color, fill_alpha: 0.2 });
      }
      figure.line({ ...xy, y: { field: "mean" }, line_width: 2 });
    });
    figure.add_layout(figure.legend, "below");
    Object.assign(figure.legend, { orientation: innerWidth < 700 ? "vertical" : "horizontal", background_fill_alpha: 0.6, background_fill_color: colors.box, label_text_color: colors.ink,
      border_line_color: null, label_text_font_size: "12px", click_policy: "hide" });
    figure.add_tools(new Bokeh.HoverTool({ mode: "vline", tooltips: [["step", "@step"], ["mean", "@mean{0.000}"]] }));
    Bokeh.Plotting.show(figure, place);
  }

  compared() {
    const found = this.model.comparison;
    if (!found) return;
    const numeric = found.header.map((_, i) => i).slice(1);
    fill(byId("compare-table"), table(found.header, found.rows.map((row) => row.map(escaped)), { numeric }),
      el("details", { open: true }, el("summary", {}, "in words"),
        el("ul", {}, found.sentences.map((sentence) => el("li", {}, escaped(sentence))))));
  }
}

// Runs of one setting: those whose recorded settings agree but for the seed.
export function settingGroups(runs) {
  const groups = new Map();
  for (const run of runs) {
    const key = run.setting ?? run.label;
    if (!groups.has(key)) groups.set(key, { label: key, runs: [] });
    groups.get(key).runs.push(run);
  }
  return [...groups.values()];
}

// Mean over the runs of a setting that have the step, and plus or minus two standard errors.
export function overSeeds(runs, metric) {
  const at = new Map();
  for (const run of runs) {
    run.steps.values.step.forEach((step, i) => {
      const value = run.steps.values[metric]?.[i];
      if (Number.isFinite(value)) at.set(step, [...(at.get(step) ?? []), value]);
    });
  }
  const steps = [...at.keys()].sort((a, b) => a - b);
  const data = { step: steps, mean: [], low: [], high: [] };
  for (const step of steps) {
    const values = at.get(step);
    const mean = values.reduce((a, b) => a + b, 0) / values.length;
    const spread = values.length > 1
      ? 2 * Math.sqrt(values.reduce((a, b) => a + (b - mean) ** 2, 0) / (values.length - 1) / values.length) : 0;
    data.mean.push(mean);
    data.low.push(mean - spread);
    data.high.push(mean + spread);
  }
  return data;
}

// One line on the settings that tell the groups apart, so that nobody compares unlike with like unawares.
export function differences(groups) {
  if (groups.length < 2) return null;
  const [first] = groups;
  const names = new Set(groups.flatMap((group) => Object.keys(group.runs[0].settings)));
  const unlike = [...names].filter((name) =>
    groups.some((group) => group.runs[0].settings[name] !== first.runs[0].settings[name]));
  if (!unlike.length) return null;
  return el("p", { class: "banner" }, "These settings differ in: ", unlike.map((name) => `${name} (${groups.map((group) =>
    escaped(group.runs[0].settings[name] ?? "unset")).join(" / ")})`).join("; "));
}
