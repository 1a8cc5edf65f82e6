"""The command that evaluates: ``wapo eval``."""

from typing import Annotated

from typer import Exit, Option

from wapo_analysis.cli import (
    FormatOption,
    RunArgument,
    ThreadsOption,
    TrustOption,
    console_error,
    say,
)
from wapo_analysis.cli import show as render


def eval(
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
    threads: ThreadsOption = None,
    trust_run: TrustOption = False,
    show: Annotated[int, Option(min=0, help="Completions to print.")] = 0,
    format: FormatOption = "text",
) -> None:
    """Grade a checkpoint on held-out prompts: pass@k and more.

    The prompts and the noise of sampling are those of the run's own evaluations. Examples:

        wapo eval runs/wapo --prompts 200 --samples 8
        wapo eval runs/wapo --checkpoint 0 --format json
    """
    from wapo_analysis.train.evaluate import evaluate_run
    from wapo_analysis.train.rollout import NonFiniteLogits

    try:
        result = evaluate_run(
            run,
            checkpoint,
            threads,
            trust_run,
            eval_prompts=prompts,
            eval_samples=samples,
            temperature=temperature,
            eval_data=eval_data,
            device=device,
        )
    except NonFiniteLogits as error:
        console_error(f"stopped: {error}")
        raise Exit(1) from error
    render(result, format)
    if format == "json":
        return
    for number, text in enumerate(result.completions[:show]):
        row, column = divmod(number, result.rewards.shape[1])
        say(f"\n--- prompt {row}, reward {result.rewards[row, column]:g}")
        say(f"{result.problems[row].prompt}\n>>> {text}")
