"""``wapo import``: runs from what other tools wrote."""

from pathlib import Path
from typing import Annotated

from typer import Argument, Option

from wapo_analysis.cli import ChosenRun, MapOption, next_commands, say


def import_(
    source: Annotated[Path, Argument(help="File or folder another tool wrote.", metavar="SOURCE")],
    out: Annotated[
        Path | None, Option(help="Run folder.  [default: runs/<name of SOURCE>]")
    ] = None,
    format: Annotated[
        str,
        Option(
            "--format",
            "-f",
            help="auto, official, prime-rl, verl, trl, table, tensorboard, wandb or console.",
        ),
    ] = "auto",
    map: MapOption = None,
    run: ChosenRun = None,
    name: Annotated[str | None, Option(help="Name of the run.  [default: that of --out]")] = None,
    label: Annotated[
        str | None,
        Option(help="Legend; runs that share it are seeds of one setting.  [default: --objective]"),
    ] = None,
    objective: Annotated[
        str, Option(help="Objective it was trained with, which no source says.")
    ] = "unknown",
    temperature: Annotated[float, Option(help="Softmax temperature of the log-probs.")] = 1.0,
    seed: Annotated[
        int | None, Option(help="Seed; pairs runs in a comparison.  [default: none]")
    ] = None,
) -> None:
    """Make a run from what another trainer wrote.

    Known: console output, JSON and CSV logs, TensorBoard and W&B folders, trainer states, dumped
    completions, token exports, and tables of your own (docs/import.md). The source is only read.
    What had no place in a run is listed. Examples:

        wapo import train.log --out runs/theirs
        wapo import outputs/plots/my-run --objective wapo --out runs/official
        wapo import tokens.csv --map logp=my_logprob --map advantage=adv
    """
    from wapo_analysis.importers import import_run, parse_mapping
    from wapo_analysis.importers.run import ImportSettings

    settings = ImportSettings(
        format=format,
        mapping=parse_mapping(map or []),
        run=run,
        name=name,
        label=label,
        objective=objective,
        temperature=temperature,
        seed=seed,
    )
    folder = out or Path("runs") / (
        (source.resolve() if source.exists() else source).stem or "imported"
    )
    report = import_run(source, folder, settings)
    say(report.to_text())
    say(f"run: {folder}")
    say(next_commands(("wapo", "diagnose", folder), ("wapo", "report", folder)))
