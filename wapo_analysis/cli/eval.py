"""The command that evaluates: ``wapo eval``."""

import json
from math import isfinite
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from wapo_analysis.cli.common import RunArgument, console_error, say

if TYPE_CHECKING:
    from wapo_analysis.train.evaluate import Evaluation

Option = typer.Option


def register(app: typer.Typer) -> None:
    """Add the command to the application."""
    app.command("eval")(evaluate_run)


def evaluate_run(
    run: RunArgument,
    prompts: Annotated[
        int | None, Option(min=1, help="Held-out prompts.  [default: the run's]")
    ] = None,
    samples: Annotated[
        int | None, Option(min=1, help="Completions of each.  [default: the run's]")
    ] = None,
    checkpoint: Annotated[
        int | None, Option(min=0, help="Step; 0 is before training.  [default: the last]")
    ] = None,
    temperature: Annotated[
        float | None, Option(help="Softmax temperature.  [default: the run's]")
    ] = None,
    eval_data: Annotated[
        str | None, Option(help="Held-out problems.  [default: the run's]")
    ] = None,
    device: Annotated[str, Option(help="auto, cpu or cuda.")] = "auto",
    threads: Annotated[
        int | None, Option(min=1, help="CPU threads.  [default: torch's own]")
    ] = None,
    show: Annotated[int, Option(min=0, help="Completions to print.")] = 0,
    format: Annotated[Literal["text", "json"], Option(help="How to print.")] = "text",
) -> None:
    """Grade a checkpoint on held-out prompts: pass@k and more.

    The prompts and the noise of sampling are those of the run's own evaluations. Examples:

        wapo eval runs/wapo --prompts 200 --samples 8
        wapo eval runs/wapo --checkpoint 0 --format json
    """
    from wapo_analysis.train.evaluate import evaluate_run as evaluated
    from wapo_analysis.train.rollout import NonFiniteLogits

    try:
        result, config, step = evaluated(
            run,
            checkpoint,
            threads,
            eval_prompts=prompts,
            eval_samples=samples,
            temperature=temperature,
            eval_data=eval_data,
            device=device,
        )
    except NonFiniteLogits as error:
        console_error(f"stopped: {error}")
        raise typer.Exit(1) from error
    if format == "json":
        say(json.dumps(_as_json(result, run, step, config.temperature), indent=1))
        return
    say(_as_text(result, run, step, config.temperature))
    for number, text in enumerate(result.completions[:show]):
        row, column = divmod(number, result.rewards.shape[1])
        say(f"\n--- prompt {row}, reward {result.rewards[row, column]:g}")
        say(f"{result.problems[row].prompt}\n>>> {text}")


def _as_json(result: "Evaluation", run: Path, step: int, temperature: float) -> dict[str, object]:
    columns = {name.removeprefix("eval/"): value for name, value in result.columns().items()}
    errors = {
        f"pass@{k}": error if isfinite(error) else None for k, (_, error) in _passes(result).items()
    }
    return {
        "run": str(run),
        "checkpoint": step,
        "temperature": temperature,
        "samples": result.rewards.shape[1],
        **columns,
        "standard_error": errors,
    }


def _as_text(result: "Evaluation", run: Path, step: int, temperature: float) -> str:
    prompts, samples = result.rewards.shape
    lines = [
        f"{run}, {f'checkpoint of step {step}' if step else 'before training'}: "
        f"{prompts} held-out prompts, {samples} completions each at temperature {temperature:g}"
    ]
    for k, (mean, error) in _passes(result).items():
        lines.append(f"pass@{k:<6} {mean:.3f} +- {error:.3f} (standard error over prompts)")
    lines += [
        f"reward      {result.rewards.mean():.3f}",
        f"entropy     {result.entropy:.3f} nats",
        f"length      {result.length:.1f} tokens, {result.truncated:.0%} cut at the limit",
        f"time        {result.seconds:.1f} s",
    ]
    return "\n".join(lines)


def _passes(result: "Evaluation") -> dict[int, tuple[float, float]]:
    """pass@k and its standard error over the prompts; one prompt has none."""
    found = {}
    for k, values in result.passes().items():
        spread = float(values.std(ddof=1)) if len(values) > 1 else float("nan")
        found[k] = float(values.mean()), spread / len(values) ** 0.5
    return found
