// The page's state: which run, which step, which rollout and token; and where step data come from.

import { fromBase64, inflate, readBlock } from "./unpack.mjs";

export class Model {
  constructor(source) {
    this.source = source;
    this.runs = [];
    this.run = null;
    this.step = null;
    this.rollout = null;
    this.listeners = {};
    this.blocks = new Map();
  }

  on(name, listener) {
    (this.listeners[name] ??= []).push(listener);
  }

  emit(name) {
    for (const listener of this.listeners[name] ?? []) listener(this);
  }

  get steps() {
    return this.run?.steps.values.step ?? [];
  }

  setRuns(runs) {
    this.runs = runs;
    if (!this.run || !runs.includes(this.run)) this.run = runs.find((r) => r.id === this.run?.id) ?? null;
    this.emit("runs");
  }

  choose(run, step = null) {
    this.run = run;
    this.rollout = null;
    this.step = null;
    this.emit("run");
    this.goto(step ?? run.first_step ?? this.steps[0] ?? null);
  }

  // The nearest recorded step.
  goto(step) {
    if (step === null || !this.steps.length) return;
    this.step = nearest(this.steps, step);
    this.rollout = null;
    this.emit("step");
  }

  move(by) {
    const at = this.steps.indexOf(this.step);
    const to = Math.min(Math.max(at + by, 0), this.steps.length - 1);
    if (to !== at) this.goto(this.steps[to]);
  }

  // Rows of a run grew: keep the place unless it was the last step.
  grown(run) {
    const last = this.run?.id === run.id && this.step === this.steps.at(-1);
    const at = this.runs.findIndex((other) => other.id === run.id);
    if (at >= 0) this.runs[at] = run;
    if (this.run?.id === run.id) {
      this.run = run;
      this.emit("grown");
      if (last && this.steps.at(-1) !== this.step) this.goto(this.steps.at(-1));
    }
  }

  // Rollouts and tokens of a step, or null where this page does not hold them.
  async block(step = this.step, run = this.run) {
    const key = `${run.id}/${step}`;
    if (!this.blocks.has(key)) {
      this.blocks.set(key, this.source.block(run, step).then((bytes) => bytes && inflate(bytes).then(readBlock)));
    }
    return this.blocks.get(key);
  }
}

export function nearest(sorted, value) {
  let best = sorted[0];
  for (const one of sorted) if (Math.abs(one - value) < Math.abs(best - value)) best = one;
  return best;
}

// Data that lie in the page itself.
export class Embedded {
  constructor(runs, document) {
    this.runs = runs;
    this.document = document;
    this.live = false;
  }

  async list() {
    return this.runs;
  }

  async block(run, step) {
    const node = this.document.getElementById(`block-${run.id}-${step}`);
    return node ? fromBase64(node.textContent.trim()) : null;
  }
}

// Data of a server that reads the run folders.
export class Server {
  constructor(token) {
    this.token = token;
    this.live = true;
  }

  address(path) {
    return this.token ? `${path}?token=${encodeURIComponent(this.token)}` : path;
  }

  async json(path) {
    const answer = await fetch(this.address(path));
    if (!answer.ok) throw new Error(await answer.text());
    return answer.json();
  }

  list() {
    return this.json("api/runs");
  }

  run(id) {
    return this.json(`api/runs/${id}`);
  }

  compare(ids) {
    return this.json(`api/compare/${ids.join(",")}`);
  }

  async block(run, step) {
    const answer = await fetch(this.address(`api/runs/${run.id}/steps/${step}`));
    return answer.ok ? new Uint8Array(await answer.arrayBuffer()) : null;
  }
}
