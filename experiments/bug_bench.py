r"""Does ``wapo audit`` see the bugs that people write? A GRPO loop with switches for them.

A plain loop on a toy policy, right without a switch; each switch is one bug as people write it.
Every variant is recorded for three steps and audited; of right variants nothing may be said.

    python experiments/bug_bench.py --out runs/bug_bench
    python experiments/bug_bench.py --out runs/bug_bench --doc docs/audit.md

Prints a line a bug: seen or not, in which step, and what was said; ``--doc`` writes the table.
"""

import argparse
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from wapo_analysis import Recorder, open_run
from wapo_analysis.audit import Audit, audit

PROMPTS, GROUP, LONGEST, VOCABULARY, PROMPT = 4, 8, 12, 24, 3
END, PAD = 0, 1
B = PROMPTS * GROUP
STEPS, EPOCHS, ACCUMULATE = 3, 2, 4
BUGS = {
    "prompt tokens in the loss": "prompt",
    "padding in the loss": "padding",
    "tokens after the end in the loss": "after_end",
    "end token left out": "no_end",
    "first token left out": "no_first",
    "temperature forgotten in training": "temperature",
    "top-p in sampling alone": "top_p",
    "dropout in the old log-probabilities": "dropout",
    "sampler one update behind": "stale",
    "groups interleaved wrongly": "interleaved",
    "population instead of sample std": "population",
    "batch std instead of the group's": "batch_std",
    "no division by the std": "no_std",
    "leave-one-out instead of the group mean": "leave_one_out",
    "rewards shifted by one sample": "shifted",
    "ratio inverted": "inverted",
    "ratio left out": "no_ratio",
    "one ratio for the rollout": "rollout_ratio",
    "clip on the wrong side for A < 0": "clip_side",
    "sign of the loss": "sign",
    "mean over padded length": "padded_mean",
    "mean over all tokens instead of each rollout": "token_mean",
    "micro-batch means of unequal lengths": "micro_means",
    "loss divided twice by accumulation": "divided_twice",
    "KL term that is not declared": "kl",
    "frozen weights": "frozen",
    "learning rate 0": "lr0",
    "zero_grad between backward and step": "zero_grad",
    "duplicated rollouts": "duplicates",
    "advantages of another rollout": "rolled",
}
RIGHT = ("", "right_token_mean", "right_sequence_ratio", "right_one_epoch")
"""Variants without a bug, each declared as what it is."""
NOT_SHOWN = (
    "entropy bonus of the wrong sign, gradients kept over steps, advantages not detached: their "
    "gradient does not pass through the recorded log-probabilities"
)


class Policy(nn.Module):
    """A softmax over the last two tokens: small, and its rollouts differ in length."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(VOCABULARY, 16)
        self.head = nn.Linear(32, VOCABULARY)

    def forward(self, ids: Tensor, drop: float = 0.0) -> Tensor:
        """Logits (B, L, V) that predict the token after each position."""
        before = torch.cat([ids[:, :1], ids[:, :-1]], 1)
        hidden = torch.cat([self.table(before), self.table(ids)], -1)
        return 2.0 * self.head(nn.functional.dropout(hidden, drop, drop > 0))


@dataclass
class Batch:
    """Prompts and completions, padded: ``ids`` (B, L), ``mask`` (B, T) with the end token."""

    ids: Tensor
    mask: Tensor
    old: Tensor
    rewards: Tensor
    group: Tensor

    @property
    def completion(self) -> Tensor:
        """Sampled tokens, (B, T)."""
        return self.ids[:, PROMPT:]


def sample(policy: Policy, bug: str, step: int) -> Batch:
    """Sample every prompt ``GROUP`` times; the reward counts tokens of the upper half."""
    g = torch.Generator().manual_seed(1000 + step)
    group = torch.arange(PROMPTS).repeat_interleave(GROUP)
    ids = torch.randint(2, VOCABULARY, (PROMPTS, PROMPT), generator=g).repeat_interleave(GROUP, 0)
    done, temperature = torch.zeros(B, dtype=torch.bool), 0.6 if bug == "temperature" else 1.0
    old, mask = [], []
    for _ in range(LONGEST):
        logp = (policy(ids)[:, -1].detach() / temperature).log_softmax(-1)
        logp[:, PAD] = -torch.inf
        logp = logp.log_softmax(-1) if bug != "temperature" else logp
        if bug == "top_p":
            kept = logp >= logp.topk(6, dim=-1).values[:, -1:]
            logp = logp.masked_fill(~kept, -torch.inf).log_softmax(-1)
        token = torch.multinomial(logp.exp(), 1, generator=g)[:, 0]
        if bug == "duplicates":
            token = token.view(PROMPTS, GROUP)[:, : GROUP // 2].repeat(1, 2).flatten()
        token = torch.where(done, PAD, token)
        mask.append(~done)
        old.append(logp.gather(1, token[:, None])[:, 0])
        done, ids = done | (token == END), torch.cat([ids, token[:, None]], 1)
    masked = torch.stack(mask, 1)
    reward = ((ids[:, PROMPT:] > VOCABULARY // 2) & masked).sum(1).float()
    return Batch(ids, masked, torch.stack(old, 1).masked_fill(~masked, 0.0), reward, group)


def advantages(batch: Batch, bug: str) -> Tensor:
    """Standardised within the group, sample std: (B,)."""
    rewards = batch.rewards.roll(1) if bug == "shifted" else batch.rewards
    shape = (GROUP, PROMPTS) if bug == "interleaved" else (PROMPTS, GROUP)
    table = rewards.view(shape) if bug != "interleaved" else rewards.view(shape).t()
    centred = table - table.mean(1, keepdim=True)
    if bug == "leave_one_out":
        centred = centred * GROUP / (GROUP - 1)
    elif bug == "batch_std":
        centred = centred / (table.std() + 1e-4)
    elif bug != "no_std":
        centred = centred / (table.std(1, keepdim=True, correction=int(bug != "population")) + 1e-4)
    back = centred.t().reshape(-1) if bug == "interleaved" else centred.reshape(-1)
    return back


def logps(policy: Policy, batch: Batch, drop: float = 0.0) -> tuple[Tensor, Tensor]:
    """Logits and log-probabilities of the tokens at all positions after the first, (B, L - 1)."""
    logits = policy(batch.ids, drop)[:, :-1].clone()
    logits[..., PAD] = -30.0
    return logits, logits.log_softmax(-1).gather(-1, batch.ids[:, 1:, None])[..., 0]


def token_losses(logp: Tensor, old: Tensor, A: Tensor, mask: Tensor, bug: str) -> Tensor:
    """The clipped surrogate, (b, T)."""
    gap = old - logp if bug == "inverted" else logp - old
    if bug in ("rollout_ratio", "right_sequence_ratio"):
        gap = ((gap * mask).sum(1) / mask.sum(1)).unsqueeze(1).expand_as(gap)
    ratio = gap.exp()
    if bug == "no_ratio":
        return -A * logp
    held = ratio.clamp(0.9, 1.1)
    if bug == "clip_side":
        return -torch.where(
            A > 0, torch.minimum(ratio * A, held * A), torch.maximum(ratio * A, held * A)
        )
    loss = -torch.minimum(ratio * A, held * A)
    if bug == "kl":
        loss = loss + 0.1 * ((old - 0.05 * old.abs() - logp).exp() + logp)
    return -loss if bug == "sign" else loss


def averaged(loss: Tensor, mask: Tensor, whole: int, bug: str) -> Tensor:
    """Mean over each rollout, then over the update's rollouts; one micro-batch's part of it."""
    if bug in ("token_mean", "right_token_mean"):
        return (loss * mask).sum() / whole
    if bug == "micro_means":
        return (loss * mask).sum() / mask.sum() / ACCUMULATE
    if bug == "padded_mean":
        longest = int(mask.sum(1).max())
        return (loss * mask)[:, :longest].mean() / ACCUMULATE
    mean = ((loss * mask).sum(1) / mask.sum(1).clamp(min=1)).sum() / B
    return mean / ACCUMULATE if bug == "divided_twice" else mean


def loss_mask(batch: Batch, bug: str) -> Tensor:
    """Positions of (B, L - 1) that enter the loss."""
    mask = batch.mask.clone()
    last = mask.sum(1) - 1
    if bug == "no_end":
        mask[torch.arange(B), last] = False
    if bug == "no_first":
        mask[:, 0] = False
    if bug == "after_end":
        mask[torch.arange(B), (last + 1).clamp(max=LONGEST - 1)] = True
    if bug == "padding":
        mask[:] = True
    before = torch.zeros(B, PROMPT - 1, dtype=torch.bool)
    if bug == "prompt":
        before[:] = True
    return torch.cat([before, mask], 1).float()


def train(bug: str, out: Path) -> None:
    """The loop: sample, reward, two epochs of one update in four micro-batches; recorded."""
    torch.manual_seed(0)
    policy = Policy()
    lr = 0.0 if bug == "lr0" else 0.03
    optimizer = torch.optim.AdamW(policy.parameters(), lr=lr, weight_decay=0.0)
    if bug == "frozen":
        optimizer = torch.optim.AdamW([nn.Parameter(torch.zeros(1))], lr=lr)
    behind = Policy()
    behind.load_state_dict(policy.state_dict())
    with Recorder(out, {"objective": declared(bug)}, store_bits=23) as recorder:
        for step in range(1, STEPS + 1):
            batch = sample(behind if bug == "stale" else policy, bug, step)
            behind.load_state_dict(policy.state_dict())
            A = advantages(batch, bug)
            A = A.roll(GROUP) if bug == "rolled" else A
            old = torch.cat([torch.zeros(B, PROMPT - 1), batch.old], 1)
            if bug in ("prompt", "padding", "after_end"):
                old = torch.where(loss_mask(batch, bug) > 0, logps(policy, batch)[1].detach(), old)
            if bug == "dropout":
                old = logps(policy, batch, 0.1)[1].detach()
            for epoch in range(1 if bug == "right_one_epoch" else EPOCHS):
                optimizer.zero_grad()
                for part in torch.arange(B).chunk(ACCUMULATE):
                    micro(policy, recorder, batch, A, old, part, epoch, bug)
                if bug == "zero_grad":
                    optimizer.zero_grad(set_to_none=False)
                optimizer.step()
            texts = [
                str(row[m].tolist()) for row, m in zip(batch.completion, batch.mask, strict=True)
            ]
            updates = 1 if bug == "right_one_epoch" else EPOCHS
            recorder.finish_step(step, reward=batch.rewards, completions=texts, updates=updates)


def micro(
    policy: Policy, recorder: Recorder, batch: Batch, A: Tensor, old: Tensor, part: Tensor,
    epoch: int, bug: str,
) -> None:  # fmt: skip
    """One micro-batch: forward, recorded, backward."""
    mask = loss_mask(batch, bug)
    cut = Batch(
        batch.ids[part], batch.mask[part], batch.old[part], batch.rewards[part], batch.group[part]
    )
    logits, logp = logps(policy, cut)
    true_mask = torch.cat([torch.zeros(len(part), PROMPT - 1), cut.mask.float()], 1)
    told = A.roll(-GROUP) if bug == "rolled" else A
    recorder.watch(
        logp, cut.ids[:, 1:], true_mask, told[part], cut.group, logits=logits,
        logp_old=old[part], rollouts=part, minibatch=epoch * ACCUMULATE + int(part[0]) // GROUP,
    )  # fmt: skip
    loss = token_losses(logp, old[part], A[part][:, None], mask[part], bug)
    averaged(loss, mask[part], int(mask.sum()), bug).backward()


def declared(bug: str) -> dict[str, Any]:
    """What the loop says it does."""
    ratio = "rollout ratio (mean)" if bug == "right_sequence_ratio" else "token ratio"
    mean = "tokens" if bug == "right_token_mean" else "rollout"
    return {"name": "grpo", "ratio": ratio, "mean": mean, "advantage": "group mean, sample std",
            "across": "same", "total": 1, "kl": False}  # fmt: skip


def judge(bug: str, folder: Path) -> tuple[int, Audit]:
    """Train a variant; in which step the audit first deviates (0: never), and what it says then."""
    shutil.rmtree(folder, ignore_errors=True)
    train(bug, folder)
    run = open_run(folder)
    for steps in range(1, STEPS + 1):
        found = audit(run, steps)
        if found.deviations:
            return steps, found
    return 0, found


def main() -> None:
    """Judge every variant, print a line each, or write the page's table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path)
    parser.add_argument("--only", default="")
    parser.add_argument("--doc", type=Path, help="write the table between the marks of this page")
    options = parser.parse_args()
    out = options.out or Path(tempfile.mkdtemp(prefix="bug-bench-"))
    rows, seen, false = [], 0, 0
    for name, bug in {**{f"right: {b or 'plain'}": b for b in RIGHT}, **BUGS}.items():
        if options.only and options.only != bug:
            continue
        steps, found = judge(bug, out / (bug or "right"))
        first = found.deviations[0] if found.deviations else None
        said = f"{first.check}: {first.says}" if first else found.sentence
        seen, false = (
            seen + (bool(first) and bug not in RIGHT),
            false + (bool(first) and bug in RIGHT),
        )
        rows.append(f"| {name} | {'step ' + str(steps) if first else 'no'} | {said} |")
        print(rows[-1], flush=True)
    total = f"{seen} of {len(BUGS)} bugs seen, {false} false statements on {len(RIGHT)} right loops"
    print(total)
    if options.doc:
        before, _, rest = options.doc.read_text(encoding="utf-8").partition("<!-- bench -->")
        table = "\n".join(["| bug | seen after | what is said |", "| --- | --- | --- |", *rows])
        after = rest.partition("<!-- end of bench -->")[2]
        body = f"{table}\n\n{total}. Not shown by what is recorded: {NOT_SHOWN}."
        page = f"{before}<!-- bench -->\n{body}\n<!-- end of bench -->{after}"
        options.doc.write_text(page, encoding="utf-8")


if __name__ == "__main__":
    main()
