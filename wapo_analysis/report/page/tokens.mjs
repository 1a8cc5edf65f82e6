// One completion token by token: heat by a number, its details by mouse or keyboard, two side by side.

import { byId, classTag, el, fill } from "./dom.mjs";
import { noTokens, rolloutRows } from "./step.mjs";
import { CLASSES, escaped, number, signed, visible } from "./words.mjs";

export const HEATS = {
  "predicted dH": { column: "pred_dentropy", signed: true, doc: "first-order change of entropy, nats per unit step; orange raises, blue lowers" },
  probability: { value: (c, i) => Math.exp(c.logp[i]), needs: "logp", low: true, doc: "probability of the sampled token; strong colour is unlikely" },
  class: { byClass: true, needs: "cls", doc: "class of the update" },
  "gradient norm": { column: "grad_norm", doc: "exact L2 norm of the logit gradient" },
  entropy: { column: "entropy", doc: "entropy of the policy at this position, nats" },
  "change of probability": { column: "dprob", signed: true, doc: "probability after the update minus before; orange rose, blue fell" },
  "change of entropy": { column: "dentropy", signed: true, doc: "entropy after the update minus before, nats; orange rose, blue fell" },
};
const LIMIT = 1500;

export class TokenView {
  constructor(model) {
    this.model = model;
    this.heat = "predicted dH";
    this.beside = null;
    model.open = (rollout) => this.open(rollout);
    model.on("block", () => this.draw());
    model.on("step", () => { this.beside = null; });
  }

  async open(rollout) {
    this.model.rollout = rollout;
    this.beside = null;
    await this.draw();
    byId("token-view").scrollIntoView({ behavior: "smooth", block: "nearest" });
  }

  async draw() {
    const place = byId("token-view");
    const block = await this.model.block();
    if (!block) return fill(place);
    const rows = rolloutRows(block.rollouts);
    if (!rows.length) return fill(place);
    const chosen = rows.find((row) => row.rollout === this.model.rollout) ?? strongest(rows);
    const group = rows.filter((row) => row.group === chosen.group && row !== chosen);
    const other = group.find((row) => row.rollout === this.beside);
    for (const button of document.querySelectorAll("button.rollout")) {
      button.setAttribute("aria-pressed", String(Number(button.dataset.rollout) === chosen.rollout));
    }
    fill(place, el("h3", {}, "Completion, token by token"), this.tools(block, group),
      el("div", { class: "pair" }, [chosen, other].filter(Boolean).map((row) => this.completion(block, row))),
      el("div", { id: "token-detail", class: "detail", role: "status", "aria-live": "polite" },
        "Point at a token, or move to it with the arrow keys."));
  }

  tools(block, group) {
    const known = Object.entries(HEATS).filter(([, heat]) => block.tokens?.columns[heat.column ?? heat.needs]);
    if (known.length && !known.some(([name]) => name === this.heat)) this.heat = known[0][0];
    const heats = el("select", { id: "heat", "aria-label": "Colour tokens by", onchange: (event) => {
      this.heat = event.target.value;
      this.draw();
    } }, known.map(([name]) => el("option", { selected: name === this.heat }, name)));
    const others = el("select", { "aria-label": "Second rollout of the same prompt", onchange: (event) => {
      this.beside = event.target.value === "" ? null : Number(event.target.value);
      this.draw();
    } }, el("option", { value: "" }, "beside: none"),
    group.map((row) => el("option", { value: row.rollout, selected: row.rollout === this.beside },
      `beside: rollout ${row.rollout}, reward ${number(row.reward)}`)));
    return el("div", { class: "tools" }, known.length ? el("label", {}, "colour by ", heats) : null,
      group.length ? others : null,
      known.length ? el("span", { class: "note" }, HEATS[this.heat].doc) : null);
  }

  completion(block, row) {
    const head = el("p", { class: "facts" }, `step ${block.step}, rollout ${row.rollout}, prompt ${row.group}`
      + (row.reward === undefined ? "" : `, reward ${number(row.reward)}`)
      + (row.advantage === undefined ? "" : `, advantage ${signed(row.advantage)}`)
      + (row.finish_reason ? `, ended by ${row.finish_reason}` : ""));
    const prompt = row.prompt ? el("details", {}, el("summary", {}, escaped(row.head ?? row.prompt).slice(0, 160)),
      el("pre", {}, escaped(row.prompt)), row.answer ? el("p", {}, `answer: ${escaped(row.answer)}`) : null) : null;
    const range = tokenRange(block.tokens, row.rollout);
    if (!range) {
      return el("article", {}, head, prompt, el("p", { class: "said" }, escaped(row.completion ?? "")),
        el("p", { class: "note" }, block.tokens ? "No token rows of this rollout were written." : noTokens(this.model)));
    }
    const spans = this.spans(block, ...range);
    const text = el("div", { class: "tokens", tabindex: "0", role: "listbox", "aria-label": `Tokens of rollout ${row.rollout}`,
      onkeydown: (event) => this.key(event) }, spans);
    const left = range[1] - range[0] - spans.length;
    return el("article", {}, head, prompt, text, left > 0 ? el("p", { class: "note" }, `${left} more tokens not shown.`) : null);
  }

  spans(block, from, to) {
    const shade = shader(block.tokens, HEATS[this.heat], from, to);
    const spans = [];
    for (let i = from; i < Math.min(to, from + LIMIT); i += 1) {
      const word = block.vocab[block.tokens.columns.token_id[i]] ?? `[${block.tokens.columns.token_id[i]}]`;
      spans.push(el("span", { class: "token", role: "option", style: shade(i), "data-token": i,
        onmouseenter: () => this.detail(block, i, word), onclick: () => this.detail(block, i, word) }, visible(word),
      word.includes("\n") ? el("br") : null));
    }
    return spans;
  }

  key(event) {
    const move = { ArrowRight: 1, ArrowLeft: -1, Home: -1e9, End: 1e9 }[event.key];
    if (!move) return;
    event.preventDefault();
    event.stopPropagation();
    const spans = [...event.currentTarget.querySelectorAll(".token")];
    const at = spans.findIndex((span) => span.classList.contains("here"));
    const next = spans[Math.min(Math.max(at + move, 0), spans.length - 1)];
    next.dispatchEvent(new MouseEvent("mouseenter"));
    next.scrollIntoView({ block: "nearest" });
  }

  detail(block, i, word) {
    for (const span of document.querySelectorAll(".token.here")) span.classList.remove("here");
    document.querySelector(`.token[data-token="${i}"]`)?.classList.add("here");
    fill(byId("token-detail"), el("strong", {}, visible(word)), " ", tokenFacts(block.tokens, i), topTable(block, i));
  }
}

function strongest(rows) {
  return rows.toSorted((a, b) => Math.abs(b.flow ?? 0) - Math.abs(a.flow ?? 0))[0];
}

export function tokenRange(tokens, rollout) {
  const at = tokens?.rollout.indexOf(rollout) ?? -1;
  return at < 0 ? null : [tokens.start[at], tokens.start[at + 1] ?? tokens.count];
}

function tokenFacts(tokens, i) {
  const c = tokens.columns;
  const cls = CLASSES[c.cls[i]];
  const facts = [["p", number(Math.exp(c.logp?.[i] ?? NaN))], ["log p", `${number(c.logp?.[i])} nats`],
    ["entropy", `${number(c.entropy?.[i])} nats`], ["coef", signed(c.coef?.[i])],
    ["gradient norm", number(c.grad_norm?.[i])], ["predicted dH", signed(c.pred_dentropy?.[i])],
    ["measured dp", signed(c.dprob?.[i])], ["measured dH", signed(c.dentropy?.[i])]];
  return [cls ? classTag(cls) : "no class (advantage 0 or unknown)",
    el("dl", { class: "numbers" }, facts.map(([name, value]) => el("div", {}, el("dt", {}, name), el("dd", {}, value))))];
}

// What else the policy could have said at a token's place, most probable first; [] if not recorded.
export function alternatives(block, i) {
  const at = block.tokens.start.findLastIndex((start) => start <= i);
  const rows = block.top?.[block.tokens.rollout[at]]?.[i - block.tokens.start[at]] ?? [];
  const sampled = block.tokens.columns.token_id[i];
  return rows.map(([id, before, after]) => ({ word: block.vocab[id] ?? `[${id}]`, before, after, sampled: id === sampled }));
}

function topTable(block, i) {
  const rows = alternatives(block, i);
  if (!rows.length) return null;
  const again = rows.some((row) => row.after !== null);
  const cell = (value) => (value === null ? el("td", {}, "") : el("td", { class: "bar", style: `--share:${100 * value}%` }, number(value)));
  return el("table", { class: "top" },
    el("caption", {}, `the ${rows.length} most probable tokens here`),
    el("thead", {}, el("tr", {}, ["token", "p before", ...(again ? ["p after"] : [])].map((name) => el("th", { scope: "col" }, name)))),
    el("tbody", {}, rows.map((row) => el("tr", { class: row.sampled ? "sampled" : "" },
      el("th", { scope: "row" }, visible(row.word), row.sampled ? " (sampled)" : ""), cell(row.before), again ? cell(row.after) : null))));
}

// A style for each token: opacity by size against the strongest few of the completion.
function shader(tokens, heat, from, to) {
  const c = tokens.columns;
  if (heat.byClass) {
    return (i) => (CLASSES[c.cls[i]] ? background(CLASSES[c.cls[i]].replace("_", "-"), 0.75) : "");
  }
  const value = heat.value ?? ((columns, i) => columns[heat.column][i]);
  const sizes = [];
  for (let i = from; i < to; i += 1) if (Number.isFinite(value(c, i))) sizes.push(Math.abs(value(c, i)));
  sizes.sort((a, b) => a - b);
  const full = sizes[Math.floor(0.98 * (sizes.length - 1))] || 1;
  return (i) => {
    const one = value(c, i);
    if (!Number.isFinite(one)) return "";
    if (heat.low) return background("accent", 0.8 * (1 - one));
    return background(heat.signed && one < 0 ? "fell" : "rose", 0.8 * Math.min(1, Math.abs(one) / full));
  };
}

function background(name, strength) {
  return `background:color-mix(in srgb, var(--${name}) ${(100 * strength).toFixed(0)}%, transparent)`;
}
