// What one step did: class totals, the tokens and rollouts behind it, every rollout to sort and search.

import { byId, classTag, el, fill, table } from "./dom.mjs";
import { CLASSES, escaped, number, percent, short, signed, sum, visible } from "./words.mjs";

const TOP = 8;
const SORTS = {
  "predicted dH, largest first": (r) => -Math.abs(r.flow ?? 0),
  "gradient, largest first": (r) => -(r.mass ?? 0),
  "reward, lowest first": (r) => r.reward ?? 0,
  "reward, highest first": (r) => -(r.reward ?? 0),
  "length, longest first": (r) => -(r.length ?? 0),
  "as sampled": (r) => r.rollout,
};
const SHOWN = 60;

export class StepPanel {
  constructor(model) {
    this.model = model;
    this.sort = Object.keys(SORTS)[0];
    this.query = "";
    model.on("step", () => this.draw());
    model.on("grown", () => this.head());
    byId("step-box").addEventListener("change", (event) => model.goto(Number(event.target.value)));
    byId("step-back").addEventListener("click", () => model.move(-1));
    byId("step-on").addEventListener("click", () => model.move(1));
  }

  head() {
    const { model } = this;
    const box = byId("step-box");
    box.value = model.step ?? "";
    [box.min, box.max] = [model.steps[0] ?? 0, model.steps.at(-1) ?? 0];
    byId("step-of").textContent = `of ${model.steps.at(-1) ?? "?"}`;
  }

  async draw() {
    const { run, step } = this.model;
    this.head();
    if (step === null) return;
    fill(byId("step-numbers"), stepNumbers(run, step));
    fill(byId("step-classes"), classTable(run, step));
    const wanted = `${run.id}/${step}`;
    this.wanted = wanted;
    const block = await this.model.block();
    if (this.wanted !== wanted) return;
    this.block = block;
    this.drawTokens();
    this.drawRollouts();
    this.model.emit("block");
  }

  drawTokens() {
    const place = byId("step-tokens");
    if (!this.block?.tokens) {
      fill(place, el("p", { class: "note" }, noTokens(this.model)));
      return;
    }
    const { tokens, vocab } = this.block;
    const { flow } = topTokens(tokens, vocab);
    fill(place, el("h3", {}, flow.byFlow ? "Tokens by predicted dH" : "Tokens by gradient"),
      table(["token", "class", "tokens", flow.byFlow ? "predicted dH" : "gradient", "share"],
        flow.rows.map((row) => [el("code", {}, visible(row.text)), classTag(row.cls), number(row.count),
          signed(row.value), percent(row.share)]), { numeric: [2, 3, 4] }));
  }

  drawRollouts() {
    const place = byId("step-rollouts");
    if (!this.block) {
      fill(place, el("p", { class: "note" }, noBlock(this.model)));
      return;
    }
    const rows = rolloutRows(this.block.rollouts);
    if (!rows.length) {
      fill(place, el("p", { class: "note" }, "This run recorded no completions of this step."));
      return;
    }
    const select = el("select", { "aria-label": "Sort rollouts", onchange: (event) => {
      this.sort = event.target.value;
      this.drawList(rows);
    } }, Object.keys(SORTS).map((name) => el("option", { selected: name === this.sort }, name)));
    const search = el("input", { type: "search", placeholder: "search text, reward, number", value: this.query,
      "aria-label": "Search rollouts", oninput: (event) => {
        this.query = event.target.value;
        this.drawList(rows);
      } });
    fill(place, el("h3", {}, `Rollouts of step ${this.block.step}`),
      el("div", { class: "tools" }, select, search), el("div", { id: "rollout-list" }));
    this.drawList(rows);
  }

  drawList(rows) {
    const asked = this.query.toLowerCase();
    const found = rows.filter((row) => !asked || row.searched.includes(asked));
    found.sort((a, b) => SORTS[this.sort](a) - SORTS[this.sort](b));
    const all = sum(rows.map((row) => Math.abs(row.flow ?? 0)));
    const mass = sum(rows.map((row) => row.mass ?? 0));
    const shown = found.slice(0, SHOWN).map((row) => el("li", {},
      el("button", { class: "rollout", "data-rollout": row.rollout, "aria-pressed": row.rollout === this.model.rollout ? "true" : "false",
        onclick: () => this.model.open(row.rollout) },
      el("span", { class: "keys" }, `rollout ${row.rollout}, prompt ${row.group}`),
      el("span", { class: "facts" }, [
        row.reward === undefined ? null : `reward ${number(row.reward)}`,
        row.advantage === undefined ? null : `A ${signed(row.advantage)}`,
        row.length === undefined ? null : `${number(row.length)} tokens`,
        row.flow === undefined || !all ? null : `${percent(Math.abs(row.flow) / all)} of |predicted dH|`,
        row.mass === undefined || !mass ? null : `${percent(row.mass / mass)} of gradient`,
      ].filter(Boolean).join(" \u00b7 ")),
      el("span", { class: "said" }, row.head ? el("span", { class: "prompt" }, short(row.head, 70)) : null, " ",
        short(row.completion, 110)))));
    fill(byId("rollout-list"), el("ol", { class: "rollouts" }, shown),
      found.length > SHOWN ? el("p", { class: "note" }, `${SHOWN} of ${found.length} shown; search to narrow.`) : null,
      found.length ? null : el("p", { class: "note" }, "No rollout matches."));
  }
}

function noBlock(model) {
  if (!model.run.has_rollouts) return "This run has no rollouts: its source wrote none.";
  return model.source.live
    ? "The server has no rollouts of this step."
    : "This page does not hold the rollouts of this step; wapo board shows every recorded step.";
}

export function noTokens(model) {
  const { run, step } = model;
  if (run.token_steps.includes(step)) {
    return model.source.live ? "The server has no token rows of this step."
      : "This page does not hold the token rows of this step; wapo board shows every recorded step.";
  }
  const near = run.token_steps.toSorted((a, b) => Math.abs(a - step) - Math.abs(b - step)).slice(0, 3);
  return near.length ? `Step ${step} has no token rows; the nearest that have: ${near.join(", ")}.`
    : "This run has no token rows, so single tokens cannot be shown; docs/watch_your_trainer.md shows how to record them.";
}

export function rolloutRows(columns) {
  const { rollout, group, prompts = [], heads = [] } = columns;
  return rollout.map((number_, i) => {
    const row = { rollout: number_, group: group[i] };
    for (const name of ["reward", "advantage", "length", "mass", "flow", "completion", "answer", "finish_reason"]) {
      if (columns[name]) row[name] = columns[name][i] ?? undefined;
    }
    if (columns.prompt) [row.prompt, row.head] = [prompts[columns.prompt[i]], heads[columns.prompt[i]]];
    row.searched = [`rollout ${row.rollout}`, `prompt ${row.group}`, `reward ${row.reward}`, row.prompt, row.completion]
      .join(" ").toLowerCase();
    return row;
  });
}

// Tokens of one text and class together, the largest share of the predicted dH (else gradient) first.
export function topTokens(tokens, vocab, limit = TOP) {
  const { token_id: ids, cls, pred_dentropy: flow, grad_norm: mass } = tokens.columns;
  const byFlow = Boolean(flow);
  const values = flow ?? mass;
  const sums = new Map();
  let total = 0;
  for (let i = 0; values && i < tokens.count; i += 1) {
    if (!Number.isFinite(values[i]) || cls[i] >= CLASSES.length) continue;
    const key = ids[i] * 8 + cls[i];
    const one = sums.get(key) ?? { id: ids[i], cls: CLASSES[cls[i]], value: 0, count: 0 };
    one.value += values[i];
    one.count += 1;
    total += Math.abs(values[i]);
    sums.set(key, one);
  }
  const rows = [...sums.values()].sort((a, b) => Math.abs(b.value) - Math.abs(a.value)).slice(0, limit);
  for (const row of rows) {
    row.share = total ? Math.abs(row.value) / total : NaN;
    row.text = vocab[row.id] ?? `[${row.id}]`;
  }
  return { flow: { rows, byFlow } };
}

function stepNumbers(run, step) {
  const at = run.steps.values.step.indexOf(step);
  const names = ["reward", "entropy", "grad_norm", "length", "kl_old", "clip_low", "clip_high", "truncated", "lr"];
  const known = names.filter((name) => run.steps.values[name]);
  return el("dl", { class: "numbers" }, known.map((name) => {
    const unit = run.steps.units[name];
    return el("div", {}, el("dt", { title: run.steps.docs[name] }, name.replaceAll("_", " ")),
      el("dd", {}, number(run.steps.values[name][at]), unit ? el("small", {}, ` ${unit}`) : null));
  }));
}

function classTable(run, step) {
  const at = run.classes.step.indexOf(step);
  if (at < 0) return el("p", { class: "note" }, "No class totals of this step: its source gives no probabilities per token.");
  const of = (column, cls) => run.classes[column]?.[cls][at];
  const total = (column) => sum(CLASSES.map((cls) => Math.abs(of(column, cls) ?? 0)));
  const [tokens, mass, flow] = ["tokens", "grad_mass", "pred_dentropy_sum"].map(total);
  const rows = CLASSES.map((cls) => [classTag(cls), number(of("tokens", cls)), percent(of("tokens", cls) / tokens),
    mass ? percent(of("grad_mass", cls) / mass) : "n/a", signed(of("pred_dentropy_sum", cls)),
    flow ? percent(Math.abs(of("pred_dentropy_sum", cls)) / flow) : "n/a", trusted(run, cls)]);
  return table(["class", "tokens", "of tokens", "of gradient", "predicted dH", "of dH", "sign right"],
    rows, { numeric: [1, 2, 3, 4, 5, 6] });
}

// How often the prediction had the sign of what was measured, in this run.
export function trusted(run, cls) {
  const known = run.trust.find((row) => row.cls === cls);
  return known ? `${known.whole} of ${known.updates}` : "not probed";
}

export { escaped };
