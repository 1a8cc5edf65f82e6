// What happened, in words: the first sentence, the advice, every finding with links to step and rollout.

import { byId, classTag, el, fill, table } from "./dom.mjs";
import { escaped, number, percent, signed, visible } from "./words.mjs";

export class Story {
  constructor(model) {
    this.model = model;
    for (const name of ["run", "grown"]) model.on(name, () => this.draw());
  }

  draw() {
    const { run } = this.model;
    document.title = `${run.name}: ${run.verdict_words}`;
    fill(byId("verdict"), el("p", { class: `badge ${run.tone}` }, run.verdict_words),
      el("h1", {}, escaped(run.sentence)), run.best_words ? el("p", {}, escaped(run.best_words)) : null,
      this.advice(run), this.culprits(run));
    fill(byId("findings-list"), run.findings.length ? run.findings.map((finding) => this.finding(finding))
      : el("p", { class: "note" }, "No finding."), audit(run), skipped(run));
    fill(byId("trust-table"), trustTable(run));
    fill(byId("facts-list"), factTable(run));
  }

  advice(run) {
    if (!run.advice.length) return null;
    const [first, ...steps] = run.advice;
    return el("div", { class: "advice" }, el("p", {}, el("strong", {}, "What to do: "), command(first)), numbered(steps),
      run.command ? el("p", {}, "To test it: ", el("code", {}, escaped(run.command))) : null);
  }

  culprits(run) {
    const finding = run.findings.find((one) => one.tokens.length);
    if (!finding) return null;
    return el("p", { class: "culprits" }, `Behind it, ${finding.when}: `, classTag(finding.cls), " tokens ",
      finding.tokens.map((token, i) => [i ? ", '" : "'", el("code", {}, visible(token.text)), `' ${percent(token.share)}`]),
      finding.rollouts.length ? "; rollouts " : null,
      finding.rollouts.map((one) => [this.toRollout(one), " "]));
  }

  toStep(step) {
    return el("button", { class: "link", "data-step": step, onclick: () => this.goto(step) }, `step ${step}`);
  }

  toRollout({ step, rollout, share }) {
    return el("button", { class: "link", "data-step": step, onclick: () => this.goto(step, rollout) },
      `${rollout} at step ${step} (${percent(share)})`);
  }

  async goto(step, rollout = null) {
    this.model.goto(step);
    byId("step").scrollIntoView({ behavior: "smooth" });
    if (rollout !== null) await this.model.open(rollout);
  }

  finding(finding) {
    const evidence = Object.entries(finding.evidence).filter(([, value]) => typeof value !== "object");
    return el("article", { class: `finding ${finding.severity}` },
      el("h3", {}, el("span", { class: `badge ${tone(finding.severity)}` }, finding.severity), " ",
        finding.name.replaceAll("_", " "), ", ", this.toStep(finding.step)),
      el("p", {}, escaped(finding.message)),
      finding.rollouts.length ? el("p", {}, "Rollouts: ", finding.rollouts.map((one) => [this.toRollout(one), " "])) : null,
      finding.advice.length ? el("div", { class: "note" }, command(finding.advice[0]), numbered(finding.advice.slice(1))) : null,
      el("details", {}, el("summary", {}, "evidence"),
        table(["number", "value"], evidence.map(([name, value]) => [name.replaceAll("_", " "),
          typeof value === "number" ? number(value) : escaped(String(value))]), { numeric: [1] }),
        el("p", { class: "note" }, escaped(finding.reference))));
  }
}

function tone(severity) {
  return { critical: "bad", warning: "warn", info: "unknown" }[severity];
}

// Steps carry their number in the text; the list makes its own.
function numbered(steps) {
  return steps.length ? el("ol", {}, steps.map((line) => el("li", {}, command(line.replace(/^\d+\. /, ""))))) : null;
}

// Text with what stands in backquotes as code.
function command(line) {
  return escaped(line).split(/`([^`]+)`/).map((part, i) => (i % 2 ? el("code", {}, part) : part));
}

// What the trainer really computes; open where it deviates from what it declares.
function audit(run) {
  if (!run.audit) return null;
  const { summary, deviations, missing } = run.audit;
  const count = deviations.length;
  return el("details", count ? { open: "" } : {},
    el("summary", {}, `Audit of the trainer: ${count ? `${count} deviation${count > 1 ? "s" : ""}` : "no deviation found"}`),
    el("p", {}, escaped(summary)),
    deviations.map((one) => el("article", { class: "finding warning" }, el("p", {}, escaped(one.says)),
      el("p", { class: "note" }, escaped(`Tokens: ${one.tokens}. Usual cause: ${one.cause}. Look at: ${one.look}.`)))),
    missing.length ? el("p", { class: "note" }, escaped(`Not available here: ${missing.join("; ")}.`)) : null);
}

function skipped(run) {
  if (!run.skipped.length) return null;
  return el("details", {}, el("summary", {}, `${run.skipped.length} checks could not be made`),
    table(["check", "missing"], run.skipped.map((one) => [one.name.replaceAll("_", " "), one.missing.join(", ")])));
}

function trustTable(run) {
  if (!run.trust.length) {
    return el("p", { class: "note" }, `No update of this run was probed${run.imported ? "" : " (--probe-every)"}, so nobody can say how often the `
      + "predicted sign came true here. Predictions hold for one softmax; shared parameters can turn them.");
  }
  return table(["class", "probed updates", "sign right, own class applied alone", "sign right, whole update"],
    run.trust.map((row) => [classTag(row.cls), number(row.updates), `${row.alone} of ${row.alone_of}`,
      `${row.whole} of ${row.updates}`]), { numeric: [1, 2, 3] });
}

function factTable(run) {
  const settings = Object.entries(run.settings).map(([name, value]) => [name, escaped(value)]);
  return [table(["fact", "value"], [["folder", escaped(run.path)], ...run.facts.map(([n, v]) => [n, escaped(v)])]),
    settings.length ? el("details", {}, el("summary", {}, `${settings.length} settings`), table(["setting", "value"], settings)) : null];
}

export { signed };
