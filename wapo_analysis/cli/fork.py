"""The command that asks what would have been: ``wapo fork``."""

from pathlib import Path
from typing import Annotated

from typer import Exit, Option, echo

from wapo_analysis.cli import (
    FormatOption,
    RunArgument,
    ThreadsOption,
    TrustOption,
    console_error,
    next_commands,
    say,
    show,
)
from wapo_analysis.cli.train import as_settings, shown_progress
from wapo_analysis.declare import assigned
from wapo_analysis.errors import printable


def fork(
    run: RunArgument,
    at: Annotated[int, Option(help="The change is in force after this step; 0 from the first on.")],
    objective: Annotated[str | None, Option(help="Change it.  [default: the run's]")] = None,
    include_bins: Annotated[
        str | None, Option(help="Train on these classes only.  [default: the run's]")
    ] = None,
    exclude_bins: Annotated[
        str | None, Option(help="Leave these classes out.  [default: the run's]")
    ] = None,
    other: Annotated[
        list[str] | None,
        Option("--set", metavar="NAME=VALUE", help="Change this; repeatable.  [default: none]"),
    ] = None,
    steps: Annotated[
        int | None, Option(min=1, help="Steps to train.  [default: to the run's last step]")
    ] = None,
    out: Annotated[
        Path | None, Option(help="Folder of the fork.  [default: RUN-fork-STEP-CHANGE]")
    ] = None,
    threads: ThreadsOption = None,
    trust_run: TrustOption = False,
    format: FormatOption = "text",
) -> None:
    """Train the rest of a run again with one thing changed.

    It starts from the nearest checkpoint at or before --at, meets the same prompts and the same
    sampling noise as the run did, and ends with rewards paired by prompt. A run keeps its last two
    checkpoints; with --set checkpoint_every=10 --set keep_checkpoints=100 it can fork anywhere,
    e.g.:

        wapo fork runs/grpo --at 60 --exclude-bins neg_peak
        wapo fork runs/grpo --at 60 --objective wapo --steps 40
        wapo fork runs/grpo --at 0 --set lr=1e-5 --out runs/gentle
    """
    from wapo_analysis.train.checkpoint import only_data, settings_of
    from wapo_analysis.train.fork import fork_run, plan_fork
    from wapo_analysis.train.rollout import NonFiniteLogits

    given = {"objective": objective, "include_bins": include_bins, "exclude_bins": exclude_bins}
    changes = assigned(other or []) | as_settings(given)
    settings_of(run, {}, trust_run)  # refuses code of a stranger's
    plan = plan_fork(run, at, changes, steps)
    folder = out or run.with_name(f"{run.resolve().name}-fork-{at}-{plan.slug}")
    echo(printable(plan.start), err=True)
    try:
        with (
            only_data(not trust_run),
            shown_progress(plan.config.shown_label, plan.last, err=True) as shown,
        ):
            result = fork_run(plan, folder, progress=shown, threads=threads)
    except NonFiniteLogits as error:
        console_error(f"the fork stopped: {error}; its run up to here is in {folder}")
        raise Exit(1) from error
    show(result, format)
    if format != "json":
        say(f"run: {folder}")
        say(next_commands(("wapo", "compare", run, folder), ("wapo", "diagnose", folder)))
