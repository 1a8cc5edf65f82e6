"""Attributions as text, Markdown and plain tables."""

from collections.abc import Mapping, Sequence
from math import isfinite
from typing import Any

import pandas as pd

from wapo_analysis.attribute.spikes import StepAttribution, one_line
from wapo_analysis.probes import MEANINGS, set_name

Rows = list[list[str]]


def percent(value: float) -> str:
    """A share as text; a dash where it is not available."""
    return f"{100 * value:.1f}%" if isfinite(value) else "-"


def signed(value: float) -> str:
    """A change as text with its sign and three digits; a dash where it is not available."""
    return f"{value:+.2e}" if isfinite(value) else "-"


def sections(found: StepAttribution) -> list[tuple[str, Rows]]:
    """Headings and tables (first row: column names) of a step attribution."""
    parts = [
        ("Tokens by share of the gradient", _token_rows(found.tokens)),
        ("Tokens by predicted entropy flow", _token_rows(found.by_flow)),
        ("Rollouts by share of the gradient", _rollout_rows(found.rollouts)),
        ("Prompts by share of the gradient", _prompt_rows(found.prompts)),
    ]
    if len(found.three_numbers):
        head = "Entropy change of one update, mean nats: predicted, class alone, measured"
        parts.append((head, three_rows(found.three_numbers)))
    return [(head, rows) for head, rows in parts if len(rows) > 1]


def headline(found: StepAttribution) -> str:
    """One sentence with the totals."""
    text = f"{found.run}, step {found.step}: gradient mass {found.grad_mass:.3g}"
    if isfinite(found.flow):
        way = "raises" if found.flow > 0 else "lowers"
        text += f", predicted entropy flow {found.flow:+.3g} nats per unit learning rate ({way} it)"
    if found.fraction < 1:
        text += f"; from {found.fraction:.0%} of the rollouts"
    return text + "."


def to_text(found: StepAttribution) -> str:
    """Plain text, aligned columns."""
    blocks = [headline(found)]
    for head, rows in sections(found):
        blocks.append(f"{head}\n{_aligned(rows)}")
    return "\n\n".join(blocks + _meanings(found))


def to_markdown(found: StepAttribution) -> str:
    """Markdown with one table per section."""
    blocks = [headline(found)]
    for head, rows in sections(found):
        first, *rest = [[_escaped(cell) for cell in row] for row in rows]
        lines = [first, ["---"] * len(first), *rest]
        table = "\n".join(f"| {' | '.join(line)} |" for line in lines)
        blocks.append(f"### {head}\n\n{table}")
    return "\n\n".join(blocks + _meanings(found))


def three_rows(numbers: pd.DataFrame) -> Rows:
    """Table of :func:`wapo_analysis.probes.three_numbers`."""
    rows = [["tokens of", "tokens", "predicted", "class alone", "measured", "verdict"]]
    for row in numbers.to_dict("records"):
        rows.append(
            [
                set_name(int(row["tokens_of"])),
                str(int(row["tokens"])),
                signed(row["predicted"]),
                signed(row["counterfactual"]),
                signed(row["measured"]),
                str(row["verdict"]),
            ]
        )
    return rows


def _meanings(found: StepAttribution) -> list[str]:
    if not len(found.three_numbers):
        return []
    seen = dict.fromkeys(found.three_numbers["verdict"])
    return ["\n".join(f"{verdict}: {MEANINGS[verdict]}." for verdict in seen)]


def _token_rows(frame: pd.DataFrame) -> Rows:
    rows = [["gradient", "flow", "class", "p", "rollout", "position", "in context"]]
    for row in frame.to_dict("records"):
        rows.append(
            [
                percent(row["mass_share"]),
                percent(row["flow_share"]),
                str(row["cls"]),
                f"{row['prob']:.3g}",
                str(row["rollout"]),
                str(row["position"]),
                row["context"],
            ]
        )
    return rows


def _rollout_rows(frame: pd.DataFrame) -> Rows:
    rows = [["gradient", "flow", "rollout", "prompt", "tokens", "reward", "completion"]]
    for row in frame.to_dict("records"):
        numbers = [
            str(row["rollout"]),
            str(row["group"]),
            str(row["tokens"]),
            f"{row['reward']:.3g}",
        ]
        rows.append([*_shares(row), *numbers, _short(row["completion"])])
    return rows


def _prompt_rows(frame: pd.DataFrame) -> Rows:
    rows = [["gradient", "flow", "prompt", "tokens", "text"]]
    for row in frame.to_dict("records"):
        rows.append([*_shares(row), str(row["group"]), str(row["tokens"]), _short(row["prompt"])])
    return rows


def _shares(row: Mapping[Any, Any]) -> list[str]:
    return [percent(row["mass_share"]), percent(row["flow_share"])]


def _short(text: object, limit: int = 60) -> str:
    """One line of a text; a dash where there is none."""
    if not isinstance(text, str):
        return "-"
    line = one_line(text)
    return line if len(line) <= limit else f"{line[: limit - 3]}..."


def _escaped(cell: str) -> str:
    return cell.replace("|", "\\|")


def _aligned(rows: Sequence[Sequence[str]]) -> str:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return "\n".join(
        "  " + "  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip()
        for row in rows
    )
