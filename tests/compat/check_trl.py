"""Check attach() and use_wapo() against the TRL that is installed; prints one JSON line.

Run by run_matrix.py inside an environment of its own, from the root of the checkout:
``python tests/compat/check_trl.py``. Each check is a number with its bound, or a word.
"""

import copy
import inspect
import json
import logging
import os
import sys
import tempfile
import traceback
import warnings
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

sys.path[:0] = [".", "taxonomy"]
os.environ["HF_HUB_OFFLINE"] = "1"
warnings.simplefilter("ignore")
logging.disable(logging.INFO)

# ruff: noqa: E402, I001 - the paths and switches above must come first
import numpy as np
import torch

from tests.support.trl_toy import (
    LOSSES,
    WatchedLoss,
    collect_tokens,
    full_softmax,
    mask_of,
    run,
    toy_model,
    toy_trainer,
)

from wapo_analysis import attach, open_run, use_wapo


def watched(out: Path, **settings: Any) -> tuple[Any, list[Any]]:
    """Train the toy under watch; returns the trainer and the token records of each step."""
    trainer = toy_trainer(out / "out", WatchedLoss, **settings)
    with attach(trainer, out / "run", token_every=1, rescore_every=1) as attachment:
        steps = collect_tokens(attachment.recorder)
        run(trainer)
    if attachment.recorder.failure is not None:
        raise RuntimeError(attachment.recorder.failure)
    return trainer, steps


def losses_of_this_trl() -> list[str]:
    """Loss types the installed trainer knows, by the names in its source."""
    from trl import GRPOTrainer

    source = inspect.getsource(GRPOTrainer)
    return [name for name in LOSSES if f'"{name}"' in source]


def coef_error(out: Path, loss: str) -> float:
    """Largest difference between recorded coef and autograd through TRL's own loss."""
    level = "sequence" if loss == "luspo" else "token"
    trainer, steps = watched(
        out, loss_type=loss, num_iterations=2, max_steps=4, epsilon=0.02,
        importance_sampling_level=level,
    )  # fmt: skip
    coef = np.concatenate([tokens["coef"] for tokens in steps])
    expected = torch.cat([grad[mask_of(inputs)] for grad, inputs in trainer.expected()]).numpy()
    return float(np.abs(coef - expected).max())


def statistics_error(out: Path) -> dict[str, Any]:
    """Largest differences of logp, H, S, Q from full softmaxes, and the source of them."""
    model = toy_model()
    before = copy.deepcopy(model)
    trainer, steps = watched(out, model=model, max_steps=1)
    whole = [full_softmax(before, inputs) for _, inputs, _ in trainer.calls]
    errors = {
        name: float(
            np.abs(steps[0][name] - torch.cat([stats[name] for stats in whole]).numpy()).max()
        )
        for name in whole[0]
    }
    return {**errors, "source": open_run(out / "run").manifest["statistics_from"]}


def bitwise(out: Path, lora: bool) -> bool:
    """Whether weights after 5 steps are bitwise those of a plain run."""
    from peft import LoraConfig

    def build(name: str) -> Any:
        torch.manual_seed(1)
        config = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], lora_dropout=0.1)
        return toy_trainer(out / name, lora=config if lora else None, max_steps=5)

    plain = run(build("plain"))
    trainer = build("watched")
    with attach(trainer, out / "run", token_every=1, rescore_every=1) as attachment:
        weights = run(trainer)
    if attachment.recorder.failure is not None:
        raise RuntimeError(attachment.recorder.failure)
    return all(torch.equal(weights[name], tensor) for name, tensor in plain.items())


def identity(out: Path) -> bool:
    """Whether every token's text and advantage are those of its rollout."""
    watched(out, steps_per_generation=4, num_iterations=2, max_steps=4)
    found = open_run(out / "run")
    rollouts = found.rollouts.set_index(["step", "rollout"])
    good = rollouts.index.is_unique
    for key, rows in found.tokens().groupby(["step", "rollout"]):
        text = "".join(found.vocab[i] for i in rows.sort_values("position")["token_id"])
        plain = text.replace("<eos>", "").replace("<pad>", "")
        good &= plain == rollouts.loc[key, "completion"]
        good &= bool(np.allclose(rows["advantage"], rollouts.loc[key, "advantage"], rtol=1e-4))
    return bool(good)


def wapo_error(out: Path) -> float:
    """Largest difference of coef under use_wapo from ratio A / (Z G L)."""
    trainer = toy_trainer(out / "out", WatchedLoss, num_iterations=2, max_steps=4)
    use_wapo(trainer, max_seq_len=8)
    with attach(trainer, out / "run", token_every=1) as attachment:
        steps = collect_tokens(attachment.recorder)
        run(trainer)
    if attachment.recorder.failure is not None:
        raise RuntimeError(attachment.recorder.failure)
    rollouts, worst = open_run(out / "run").rollouts, 0.0
    for tokens in steps:
        lines = rollouts[(rollouts["step"] == tokens["step"][0]) & (rollouts["advantage"] > 0)]
        trained = (tokens["advantage"] > 0) & (tokens["ratio"] <= 10)
        pushed = np.where(trained, tokens["ratio"] * tokens["advantage"], 0.0)
        expected = pushed / (max(lines["group"].nunique(), 1) * 4 * 8)
        worst = max(worst, float(np.abs(tokens["coef"] - expected).max()))
    return worst


def guarded(check: Callable[..., Any], *args: Any) -> Any:
    """Run a check in a folder of its own; an exception becomes its text."""
    with tempfile.TemporaryDirectory() as folder:
        try:
            return check(Path(folder), *args)
        except Exception as error:
            traceback.print_exc(file=sys.stderr)
            return f"{type(error).__name__}: {str(error).splitlines()[0][:120]}"


def main() -> None:
    """Run every check."""
    results: dict[str, Any] = {"trl": version("trl"), "transformers": version("transformers")}
    results["torch"] = version("torch")
    results["statistics"] = guarded(statistics_error)
    results["coef"] = {loss: guarded(coef_error, loss) for loss in losses_of_this_trl()}
    results["bitwise"] = guarded(bitwise, False)
    results["bitwise_lora"] = guarded(bitwise, True)
    results["identity"] = guarded(identity)
    results["wapo"] = guarded(wapo_error)
    print("RESULT " + json.dumps(results))


if __name__ == "__main__":
    main()
