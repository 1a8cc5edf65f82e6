// Wires the page: the run and the step in hand, the keyboard, the address, and news from the server.

import { Charts } from "./charts.mjs";
import { byId, el, fill, table } from "./dom.mjs";
import { Embedded, Model, Server } from "./model.mjs";
import { Runs } from "./runs.mjs";
import { StepPanel } from "./step.mjs";
import { Story } from "./story.mjs";
import { TokenView } from "./tokens.mjs";
import { number } from "./words.mjs";

const EVERY = 1000;

export async function start() {
  const page = JSON.parse(byId("page-data").textContent);
  const token = new URLSearchParams(location.search).get("token");
  const source = page.live ? new Server(token) : new Embedded(page.runs, document);
  const model = new Model(source);
  model.comparison = page.comparison;
  new Charts(byId("charts"), model);
  new Story(model);
  new StepPanel(model);
  new TokenView(model);
  new Runs(model);
  model.on("step", () => remember(model));
  for (const name of ["run", "grown"]) model.on(name, () => numbersTable(model));
  keys(model);
  if (page.live) await follow(model, source);
  else model.setRuns(page.runs);
  if (!model.run && model.runs.length) model.choose(...remembered(model));
  window.wapo = model;
  document.body.dataset.ready = "yes";
}

function keys(model) {
  document.addEventListener("keydown", (event) => {
    if (event.target.closest("input, select, textarea, .tokens") || event.ctrlKey || event.metaKey || event.altKey) return;
    const by = { ArrowLeft: -1, ArrowRight: 1, PageUp: -10, PageDown: 10 }[event.key];
    if (!by) return;
    event.preventDefault();
    model.move(by);
  });
}

// The address keeps run and step, so that a link shows what its sender saw.
function remember(model) {
  const asked = `#run=${model.run.id}&step=${model.step}`;
  if (location.hash !== asked) history.replaceState(null, "", asked);
}

function remembered(model) {
  const asked = new URLSearchParams(location.hash.slice(1));
  const run = model.runs.find((one) => one.id === asked.get("run")) ?? worst(model.runs);
  return [run, asked.has("step") ? Number(asked.get("step")) : run.onset ?? run.steps.values.step?.at(-1) ?? null];
}

function worst(runs) {
  const rank = { bad: 0, warn: 1, unknown: 2, good: 3 };
  return runs.toSorted((a, b) => rank[a.tone] - rank[b.tone])[0];
}

// Values behind the charts as a table, for screen readers and for copying.
function numbersTable(model) {
  const { values } = model.run.steps;
  const names = Object.keys(values);
  const rows = (values.step ?? []).map((_, i) => names.map((name) => number(values[name][i])));
  const box = byId("numbers");
  box.ontoggle = () => { if (box.open) fill(byId("numbers-table"), table(names, rows, { numeric: names.map((_, i) => i) })); };
  if (box.open) box.ontoggle();
}

// Ask the server every second what has changed; a run that grew keeps the reader's place.
async function follow(model, source) {
  const seen = new Map();
  const look = async () => {
    try {
      const listed = await source.list();
      const fresh = listed.filter((one) => seen.get(one.id) !== one.mark);
      const runs = await Promise.all(listed.map((one) => (fresh.includes(one) || !model.runs.some((r) => r.id === one.id)
        ? source.run(one.id) : model.runs.find((r) => r.id === one.id))));
      for (const one of listed) seen.set(one.id, one.mark);
      if (fresh.length || runs.length !== model.runs.length) await take(model, source, runs, fresh);
      fill(byId("live"), el("span", { class: "dot", "aria-hidden": "true" }), `live: ${runs.length} run${runs.length === 1 ? "" : "s"}`);
    } catch (error) {
      fill(byId("live"), `the server does not answer (${error.message.slice(0, 80)}); trying again`);
    }
  };
  await look();
  setInterval(look, EVERY);
}

async function take(model, source, runs, fresh) {
  if (runs.length > 1) model.comparison = await source.compare(runs.map((run) => run.id)).catch(() => null);
  if (model.comparison) for (const run of runs) run.setting = model.comparison.settings[run.id];
  const same = model.runs.length === runs.length && model.runs.length === 1;
  for (const run of runs) if (fresh.some((one) => one.id === run.id)) model.grown(run);
  if (!same) model.setRuns(runs);
}

start();
