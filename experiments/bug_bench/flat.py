"""A trainer in another style, right in many ways or wrong in one: flat tensors, no padding.

Every position is a row of one flat tensor, the loss is a sum over groups divided by a denominator,
the recorder gets packed batches. `recipes` says what there is to choose from.

Shapes: M positions of all completions of a batch, R rollouts, V vocabulary.
"""

from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn

from experiments.bug_bench.recipes import HOMES, Recipe
from wapo_analysis import Recorder

DIGITS, END, TOOL, VOCAB, WINDOW, LONGEST, STEPS = 10, 10, 11, 12, 4, 12, 3
RIGHT_ADVANTAGE = "group mean, population std"


@dataclass
class Rollout:
    """One completion: ids with the prompt in front, log-probabilities, who wrote each token."""

    ids: list[int]
    group: int
    logps: list[float] = field(default_factory=list)
    own: list[bool] = field(default_factory=list)
    reward: float = 0.0
    steps: list[float] = field(default_factory=list)
    used: bool = True

    def add(self, token: int, logp: float, own: bool = True) -> None:
        """Append a token; one of a tool is not its own."""
        self.ids.append(token)
        self.logps.append(logp)
        self.own.append(own)

    @property
    def size(self) -> int:
        """Tokens without the prompt."""
        return len(self.own)


def network(dropout: float, dtype: torch.dtype) -> nn.Module:
    """Logits of the next token from the last few: (M, WINDOW) ids to (M, V)."""
    net = nn.Sequential(
        nn.Embedding(VOCAB + 1, 16), nn.Flatten(), nn.Linear(16 * WINDOW, 64), nn.Tanh(),
        nn.Dropout(dropout), nn.Linear(64, VOCAB),
    )  # fmt: skip
    with torch.no_grad():
        net[-1].weight.mul_(8)
        net[-1].bias[TOOL] = -30
    return net.to(dtype)


def window(ids: list[int]) -> list[int]:
    return ([VOCAB] * WINDOW + ids)[-WINDOW:]


class Trainer:
    """The loop: sample groups, make advantages, sum token losses, divide."""

    def __init__(
        self, out: Path, bug: str, recipe: Recipe, seed: int, rank: int = 0, ranks: int = 1
    ) -> None:
        torch.manual_seed(seed)
        self.ranks = ranks
        self.bug, self.r = bug, recipe
        self.net = network(recipe.dropout, recipe.dtype)
        self.start, self.behind = (network(recipe.dropout, recipe.dtype) for _ in range(2))
        for other in (self.start, self.behind):
            other.load_state_dict(self.net.state_dict())
            other.eval()
        torch.manual_seed(seed + 1 + rank)
        self.optimizer = torch.optim.Adam(self.net.parameters(), lr=recipe.lr)
        name = {"token": "dapo", "rollout": "grpo"}[recipe.mean]
        declared = {"name": name, "bounds": list(recipe.bounds), "beta": 0.0}
        if recipe.advantage == "group":
            declared["advantage"] = RIGHT_ADVANTAGE
        heat = 1.0 if bug == "temperature only in the sampler" else recipe.temperature
        self.heat = heat
        manifest = {"objective": {**declared, **recipe.declared}}
        self.recorder = Recorder(out, manifest, temperature=heat, rank=rank)

    @torch.no_grad()
    def sample(self, group: int, prompt: list[int], count: int) -> list[Rollout]:
        """Completions of one prompt, with the sampler's own log-probabilities."""
        net = self.behind if self.bug == "sampler gets weights late" else self.net.eval()
        made = [Rollout(list(prompt), group) for _ in range(count)]
        for place in range(LONGEST):
            open_ = [m for m in made if not m.own or m.ids[-1] != END]
            if not open_:
                break
            if self.r.tools and place in (3, 4):
                for m in open_:
                    m.add(TOOL, 0.0, own=False)
                continue
            logits = net(torch.tensor([window(m.ids) for m in open_])).float()
            logits = logits + self.r.engine * torch.randn_like(logits)
            if self.bug == "log-probabilities after top-k":
                logits = logits.masked_fill(logits < logits.topk(3).values[:, -1:], -torch.inf)
            logps = (logits / self.r.temperature).log_softmax(-1)
            token = logps.exp().multinomial(1)
            told = logits.log_softmax(-1) if "without temperature" in self.bug else logps
            told = told.gather(1, token)[:, 0].tolist()
            for m, t, p in zip(open_, token[:, 0].tolist(), told, strict=True):
                m.add(t, p)
        for m in made:
            self.grade(m, prompt)
        return made

    def grade(self, m: Rollout, prompt: list[int]) -> None:
        """Reward of a rollout and of its steps."""
        written = m.ids[len(prompt) :]
        m.steps = [float(t in prompt) - 0.3 * float(t == TOOL) for t in written]
        m.reward = sum(m.steps) / 4 - self.r.length_penalty * m.size
        if self.r.binary:
            m.reward = float(sum(m.steps) >= 3)
        m.used = not self.r.cut or m.ids[-1] == END

    def batch(self) -> list[Rollout]:
        """Rollouts of a step, group by group."""
        made: list[Rollout] = []
        while len({m.group for m in made}) < self.r.prompts:
            group = len({m.group for m in made})
            prompt = torch.randint(DIGITS, (2,)).tolist()
            count = self.r.size - (group % 3 if self.r.uneven else 0)
            found = self.sample(group, prompt, count)
            if self.r.filtered and len({m.reward for m in found}) == 1:
                continue
            if self.r.picked:
                found.sort(key=lambda m: m.reward)
                half = self.r.picked // 2
                found = found[:half] + found[-half:]
            made += found
        return made

    def advantages(self, made: list[Rollout]) -> Tensor:
        """Advantage of every position, shape (M,)."""
        reward = torch.tensor([m.reward for m in made])
        group = torch.tensor([m.group for m in made])
        if self.bug == "groups cut at a fixed stride":
            group = torch.arange(len(made)) // self.r.size
        if self.bug == "uneven groups taken as one":
            group = torch.zeros_like(group)
        made_of = torch.zeros(len(made))
        for g in group.unique():
            mine = group == g
            r = reward[mine]
            centred = r - r.mean()
            if self.bug == "no std":
                made_of[mine] = centred
            elif self.r.advantage == "loo":
                made_of[mine] = centred * len(r) / max(len(r) - 1, 1)
            else:
                made_of[mine] = centred / (r.std(correction=0) + 1e-6)
        if self.bug == "advantages normalised twice":
            made_of = (made_of - made_of.mean()) / (made_of.std() + 1e-8)
        if self.r.advantage == "gae":
            return torch.cat([self.gae(m) for m in made])
        if self.r.advantage == "process":
            return torch.cat([torch.tensor(m.steps).flip(0).cumsum(0).flip(0) - 1 for m in made])
        return torch.cat([a.expand(m.size) for a, m in zip(made_of, made, strict=True)])

    @staticmethod
    def gae(m: Rollout, lam: float = 0.95) -> Tensor:
        """Advantages of a rollout's tokens beside a value that rises along it."""
        values = torch.linspace(0.2, 0.6, m.size + 1)
        rewards = torch.zeros(m.size)
        rewards[-1], values[-1] = m.reward, 0.0
        found, last = [], 0.0
        for t in reversed(range(m.size)):
            last = float(rewards[t] + values[t + 1] - values[t]) + lam * last
            found.append(last)
        return torch.tensor(found[::-1])

    def logps(self, net: nn.Module, made: list[Rollout]) -> tuple[Tensor, Tensor, Tensor]:
        """Logits before the temperature, tokens and log-probabilities of the flat positions."""
        rows = [window(m.ids[:k]) for m in made for k in range(len(m.ids) - m.size, len(m.ids))]
        tokens = torch.tensor([t for m in made for t in m.ids[len(m.ids) - m.size :]])
        logits = net(torch.tensor(rows))
        logp = (logits.float() / self.heat).log_softmax(-1).gather(1, tokens[:, None])[:, 0]
        return logits, tokens, logp

    def step(self, number: int) -> None:
        """Sample, train, record."""
        made = self.batch()
        self.behind.load_state_dict(self.net.state_dict())
        advantage, sizes = self.advantages(made), torch.tensor([m.size for m in made])
        of = torch.arange(len(made)).repeat_interleave(sizes)
        group = torch.tensor([m.group for m in made])
        mask = torch.tensor([o and m.used for m in made for o in m.own]).float()
        sampler = torch.tensor([p for m in made for p in m.logps])
        with torch.no_grad():
            old = self.logps(self.net.eval(), made)[2]
            ref = self.logps(self.start, made)[2]
        if self.bug in ("log-probabilities after top-k", "sampler gets weights late") or (
            "without temperature" in self.bug
        ):
            old = sampler
        if self.bug == "old log-probabilities one position late":
            old = old.roll(1)
        minibatch = 0
        for _ in range(self.r.epochs):
            self.optimizer.zero_grad()
            for part in torch.arange(self.r.prompts).chunk(self.r.micro):
                rows = torch.isin(group[of], part)
                chosen = [m for m in made if m.group in part]
                self.net.train()
                logits, tokens, logp = self.logps(self.net, chosen)
                before = old[rows]
                if self.bug == "old log-probabilities of the updated policy":
                    before = logp.detach()
                given = {"logp_old": before}
                if self.r.engine:
                    given = {"logp_old": sampler[rows], "logp_prox": before}
                numbers = of[rows]
                self.recorder.watch(
                    logp, tokens, mask[rows], advantage[rows], group[numbers], logits=logits,
                    rollouts=numbers, minibatch=minibatch, clip=self.r.bounds, **given,
                )  # fmt: skip
                minibatch += 1
                loss = self.token_losses(logp, before, advantage[rows], numbers, mask[rows])
                if self.r.engine:
                    loss = loss * (before - sampler[rows]).exp().clamp(max=2)
                if self.r.beta:
                    away = ref[rows] - logp
                    kl = away.exp() - away - 1
                    loss = loss + (-1 if self.bug == "KL subtracted" else 1) * self.r.beta * kl
                if self.r.entropy:
                    full = logits.float().log_softmax(-1)
                    loss = loss + self.r.entropy * (full.exp() * full).sum(-1)
                total = self.reduced(loss, mask, rows, numbers, tokens, made)
                total.backward()
            for parameter in self.net.parameters():
                parameter.grad = self.mean_of_ranks(parameter.grad)
            self.optimizer.step()
        self.recorder.finish_step(
            number, reward=[m.reward for m in made], updates=self.r.epochs, lr=self.r.lr,
            prompts=[str(m.ids[:2]) for m in made],
        )  # fmt: skip

    def mean_of_ranks(self, value: Tensor) -> Tensor:
        """Mean over processes, as data-parallel training takes it of gradients."""
        if self.ranks > 1:
            torch.distributed.all_reduce(value)
        return value / self.ranks

    def token_losses(
        self, logp: Tensor, old: Tensor, advantage: Tensor, of: Tensor, mask: Tensor
    ) -> Tensor:
        """Loss of every position, shape (M,)."""
        x = logp - old
        if self.bug == "ratio to its own detached value":
            x = logp - logp.detach()
        if self.r.sequence or self.bug == "ratio of the summed log-probabilities":
            count = torch.bincount(of, mask)
            total = torch.zeros(len(count)).index_add(0, of, x * mask)
            x = (total / count.clamp(min=1) if self.r.sequence else total)[of]
        if self.bug == "one advantage for all":
            advantage = advantage.mean().abs().expand_as(advantage) + 0.5
        low, high = self.r.bounds
        if self.bug == "clip bounds swapped":
            low, high = 2 - high, 2 - low
        ratio = x.exp()
        kept = torch.minimum(ratio * advantage, ratio.clamp(low, high) * advantage)
        return kept if self.bug == "loss negated twice" else -kept

    def reduced(
        self, loss: Tensor, mask: Tensor, rows: Tensor, of: Tensor, tokens: Tensor,
        made: list[Rollout],
    ) -> Tensor:  # fmt: skip
        """One number: sum of the losses of a micro-batch over a denominator of the batch."""
        mine, micro, whole = mask[rows], self.r.micro, mask.sum().clamp(min=1)
        if self.bug != "every rank divides by its own tokens":
            whole = self.mean_of_ranks(whole)
        own = torch.tensor([o for m in made for o in m.own])
        if self.bug == "masked positions in the numerator":
            mine = torch.ones_like(mine)
        if self.bug == "mask of tools inverted":
            mine, whole = 1 - mine, (1 - mask).sum()
        if self.bug == "masked rollouts in the denominator":
            whole = whole + sum(not m.used for m in made)
        if self.bug == "truncated tokens in the denominator":
            whole = own.sum()
        if self.bug == "end token dropped from the mask":
            mine = mine * (tokens != END)
        if self.bug == "first action dropped from the mask":
            mine = mine * (torch.diff(of, prepend=torch.tensor([-1])) == 0)
        if self.bug == "means of micro-batches averaged":
            return (loss * mine).sum() / mine.sum() / micro
        if self.r.mean == "token":
            total = (loss * mine).sum() / whole
            return total / micro if self.bug == "divided by accumulation once more" else total
        total, used = loss.new_zeros(()), 0
        for number in of.unique():
            here = of == number
            size = mine[here].sum() + (2 if self.bug == "prompt counted in the length" else 0)
            total = total + (loss[here] * mine[here]).sum() / size.clamp(min=1)
            used += 1
        count = float(self.mean_of_ranks(torch.tensor(float(len(made)))))
        return total / used if self.bug == "means of micro-batches summed" else total / count


def train(
    out: Path, bug: str = "", recipe: Recipe | None = None, steps: int = STEPS, seed: int = 0
) -> Recorder:
    """Train some steps by a recipe, with a bug or none, and record them."""
    torch.set_num_threads(1)
    trainer = Trainer(out, bug, recipe or HOMES.get(bug, Recipe()), seed)
    for step in range(1, steps + 1):
        trainer.step(step)
    trainer.recorder.close()
    return trainer.recorder


def _rank(rank: int, out: Path, bug: str, recipes: list[Recipe], meeting: str) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", init_method=meeting, rank=rank, world_size=len(recipes)
    )
    trainer = Trainer(out, bug, recipes[rank], 0, rank, len(recipes))
    for step in range(1, STEPS + 1):
        trainer.step(step)
    trainer.recorder.close()
    torch.distributed.destroy_process_group()


def train_ranks(out: Path, recipes: list[Recipe], bug: str = "") -> None:
    """Train in as many gloo processes as there are recipes, which may have other sizes."""
    meeting = f"file://{out.parent.resolve()}/meeting"
    torch.multiprocessing.spawn(_rank, (out, bug, recipes, meeting), nprocs=len(recipes))
