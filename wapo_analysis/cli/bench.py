"""``wapo bench``: what watching costs on this machine."""

from typing import Annotated, Literal

from typer import Option

from wapo_analysis.cli import FormatOption, show


def bench(
    model: Annotated[
        str | None, Option(help="Model to measure, as in wapo train.  [default: random weights]")
    ] = None,
    layers: Annotated[int, Option(help="Layers of the random model.")] = 4,
    width: Annotated[int, Option(help="Its width, a multiple of 64.")] = 256,
    vocab: Annotated[int, Option(help="Its vocabulary.")] = 32_000,
    rollouts: Annotated[int, Option(help="Rollouts of the batch, an even number.")] = 4,
    tokens: Annotated[int, Option(help="Completion tokens of each rollout.", min=1)] = 64,
    device: Annotated[Literal["auto", "cpu", "cuda"], Option(help="Where to measure.")] = "auto",
    threads: Annotated[int, Option(help="CPU threads of torch.", min=1, max=1024)] = 1,
    seconds: Annotated[float, Option(help="How long to measure, about.", min=0, max=86_400)] = 40.0,
    format: FormatOption = "text",
) -> None:
    """Measure what watching a training run costs on this machine.

    Class totals, token rows, scoring again and probes, each as a share of a training step without
    them (sampling not counted), bytes per token on disk, and the settings that change it. Examples:

        wapo bench

        wapo bench --layers 30 --width 576 --vocab 49152

        wapo bench --model smollm2 --rollouts 2
    """
    from wapo_analysis.bench import watching_costs

    costs = watching_costs(
        model,
        layers=layers,
        width=width,
        vocabulary=vocab,
        rollouts=rollouts,
        tokens=tokens,
        device=device,
        seconds=seconds,
        threads=threads,
    )
    show(costs, format)
