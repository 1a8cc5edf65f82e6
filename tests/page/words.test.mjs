// Run by node: `node --test tests/page`; tests/unit/report/test_report.py does.
import assert from "node:assert/strict";
import { test } from "node:test";

import { flowColumns, smoothed } from "../../wapo_analysis/report/page/charts.mjs";
import { Model, nearest } from "../../wapo_analysis/report/page/model.mjs";
import { differences, overSeeds, settingGroups } from "../../wapo_analysis/report/page/runs.mjs";
import { rolloutRows, topTokens } from "../../wapo_analysis/report/page/step.mjs";
import { alternatives, tokenRange } from "../../wapo_analysis/report/page/tokens.mjs";
import { joinPlanes, readBlock } from "../../wapo_analysis/report/page/unpack.mjs";
import { escaped, number, percent, short, signed, visible } from "../../wapo_analysis/report/page/words.mjs";

test("numbers have three digits and what is missing is said", () => {
  assert.deepEqual([0.123456, 1234567, 0, null, NaN, 2].map(number), ["0.123", "1.23e+6", "0", "n/a", "n/a", "2"]);
  assert.deepEqual([0.5, -0.5].map(signed), ["+0.5", "-0.5"]);
  assert.deepEqual([0.831, 0.019, 0, null].map(percent), ["83%", "1.9%", "0%", "n/a"]);
});

test("control and direction characters are spelled out", () => {
  assert.equal(escaped("a\u0000b\u202ec\u001b[2J"), "a\\u0000b\\u202ec\\u001b[2J");
  assert.equal(escaped("\ud800 ok \ud83d\ude00"), "\\ud800 ok \ud83d\ude00");
  assert.equal(visible("a b\n"), "a\u2423b\u23ce");
  assert.equal(short("x  y\n z"), "x y z");
});

test("byte planes become the numbers they were", () => {
  const values = new Float32Array([0.5, -3.25, NaN, 1e-3]);
  const bytes = new Uint8Array(values.buffer);
  const planes = new Uint8Array(12);
  for (let plane = 0; plane < 3; plane += 1) {
    for (let i = 0; i < 4; i += 1) planes[plane * 4 + i] = bytes[4 * i + plane + 1];
  }
  const got = joinPlanes(planes, "f3", 4);
  assert.deepEqual([got[0], got[1]], [0.5, -3.25]);
  assert.ok(Number.isNaN(got[2]) && Math.abs(got[3] - 1e-3) < 1e-6);
  assert.deepEqual([...joinPlanes(new Uint8Array([255, 3]), "i1", 2)], [-1, 3]);
});

test("a block without tokens is read", () => {
  const head = new TextEncoder().encode(JSON.stringify({ step: 3, tokens: null }));
  const bytes = new Uint8Array(4 + head.length);
  new DataView(bytes.buffer).setUint32(0, head.length, true);
  bytes.set(head, 4);
  assert.equal(readBlock(bytes).step, 3);
});

test("the smoothed line leaves missing values out", () => {
  assert.deepEqual(smoothed([1, NaN, 3]), [1, 2, 3]);
});

test("bars stack upward and downward from zero", () => {
  const flows = { pos_peak: [-1], pos_valley: [2], neg_peak: [3], neg_valley: [-4] };
  const data = flowColumns({ classes: { step: [1], pred_dentropy_sum: flows } });
  assert.deepEqual([data.pos_peak_to, data.neg_valley_from, data.neg_valley_to], [[-1], [-1], [-5]]);
  assert.deepEqual([data.pos_valley_to, data.neg_peak_from, data.neg_peak_to], [[2], [2], [5]]);
});

test("tokens of one text and class are put together, shares are of the whole", () => {
  const tokens = { count: 4, columns: { token_id: [7, 7, 8, 9], cls: [2, 2, 3, 4], pred_dentropy: [1, 2, -1, 9] } };
  const { flow } = topTokens(tokens, { 7: "a" });
  assert.deepEqual(flow.rows.map((r) => [r.text, r.cls, r.value, r.share]), [["a", "neg_peak", 3, 0.75], ["[8]", "neg_valley", -1, 0.25]]);
});

test("rollouts and their tokens are found", () => {
  const rows = rolloutRows({ rollout: [4, 9], group: [0, 1], reward: [1, null], prompts: ["q"], heads: ["q"], prompt: [0, 0] });
  assert.equal(rows[0].reward, 1);
  assert.equal(rows[1].reward, undefined);
  assert.deepEqual(tokenRange({ rollout: [4, 9], start: [0, 5], count: 8 }, 9), [5, 8]);
  assert.equal(tokenRange({ rollout: [4], start: [0], count: 8 }, 9), null);
});

const run = (id, setting, settings, reward) => ({ id, setting, label: "L", settings,
  steps: { values: { step: reward.map((_, i) => i + 1), reward } } });

test("seeds of one setting are pooled, unlike settings stand apart and are named", () => {
  const runs = [run("a", "L", { lr: "1" }, [0, 2]), run("b", "L", { lr: "1" }, [2, 4]), run("c", "L, lr 2", { lr: "2" }, [1])];
  const groups = settingGroups(runs);
  assert.deepEqual(groups.map((group) => group.runs.length), [2, 1]);
  assert.deepEqual(overSeeds(groups[0].runs, "reward").mean, [1, 3]);
  assert.equal(differences([groups[0]]), null);
});

test("the cursor goes to recorded steps and keeps its place when a run grows", () => {
  const model = new Model({});
  const first = run("a", "L", {}, [0, 1, 2]);
  model.setRuns([first]);
  model.choose(first, 2);
  model.move(1);
  assert.equal(model.step, 3);
  model.grown(run("a", "L", {}, [0, 1, 2, 3]));
  assert.equal(model.step, 4, "who stood at the end stays at the end");
  model.goto(1);
  model.grown(run("a", "L", {}, [0, 1, 2, 3, 4]));
  assert.equal(model.step, 1);
  assert.equal(nearest([1, 5, 9], 6), 5);
});

test("alternatives of a token are those of its rollout and place", () => {
  const block = {
    vocab: { 4: "a", 9: "b" },
    tokens: { start: [0, 3], rollout: [2, 7], count: 5, columns: { token_id: [4, 4, 4, 9, 4] } },
    top: { 7: { 0: [[9, 0.8, 0.7], [5, 0.1, null]] } },
  };
  assert.deepEqual(alternatives(block, 3), [
    { word: "b", before: 0.8, after: 0.7, sampled: true },
    { word: "[5]", before: 0.1, after: null, sampled: false },
  ]);
  assert.deepEqual(alternatives(block, 0), []);
  assert.deepEqual(alternatives(block, 4), []);
});
