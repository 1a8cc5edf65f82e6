"""prime-rl: token exports (until August 2026), then the file monitor with annotated traces.

Exports: ``token_exports/step_<s>/rank_<r>.jsonl``, one completion a line with aligned lists, and an
empty ``STABLE`` when a step is whole. Monitor: ``metrics.jsonl`` and, below ``traces/``,
``stream.jsonl`` (episodes as they arrived) with ``annotations/<producer>.jsonl`` (what trainer and
orchestrator learned later, joined by trace). Of annotations only places are kept in memory.
"""

from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from wapo_analysis.importers.jsonl import JsonLines, as_number, as_step, message_text
from wapo_analysis.importers.readers import json_records
from wapo_analysis.importers.report import ImportReport
from wapo_analysis.importers.sink import Sink
from wapo_analysis.importers.tables import Codes, sequence_rows

_COLUMNS = {
    "token_id": "token_ids",
    "loss_mask": "loss_mask",
    "advantage": "advantages",
    "logp": "trainer_logprobs",
    "logp_old": "inference_logprobs",
    "entropy": "entropy",
    "clipped": "is_masked",
}
# Follow from the columns above, or only place the sequence in a batch.
_RECOMPUTED = {
    "schema_version", "step", "export_step", "rank", "micro_step", "micro_sequence_idx",
    "export_sequence_idx", "mismatch_kl", "log_importance_ratio", "importance_ratio", "prob_delta",
    "is_masked_high", "is_masked_low", "rewards", "position_ids",
}  # fmt: skip
_STREAMS = {"advantage": "advantages", "logp": "trainer_logprobs", "entropy": "entropies",
            "clipped": "is_masked"}  # fmt: skip

_CLIP_NOTE = (
    "clipped is prime-rl's is_masked: tokens whose probability moved too far, which its loss drops"
)


def read_prime_rl(files: tuple[Path, ...], sink: Sink, report: ImportReport) -> None:
    """Read token exports, metrics and traces into a run."""
    sealed = [file for file in files if file.suffix == ".zst"]
    if sealed:
        report.note(f"{len(sealed)} sealed parts of streams are not read; unpack them with zstd -d")
    files = tuple(file for file in files if file not in sealed)
    exports = [file for file in files if file.name.startswith("rank_")]
    _read_exports(exports, sink, report)
    metrics = [file for file in files if file.name == "metrics.jsonl"]
    for file in metrics:
        _read_metrics(file, sink, report)
    traces = [file for file in files if file not in exports and file not in metrics]
    read_traces(traces, sink, report)


def _read_exports(files: list[Path], sink: Sink, report: ImportReport) -> None:
    codes = Codes()
    # A file named alone is the user's choice; in the layout a step counts once it is marked.
    for file in files:
        if len(files) > 1 and not (file.parent / "STABLE").exists():
            report.note(f"{file.parent.name} has no STABLE mark, so it is unfinished and left out")
            continue
        for number, values in json_records(file, report):
            with report.record(file, number):
                _add_sequence(values, codes, sink, report)


def _add_sequence(
    values: Mapping[str, Any], codes: Codes, sink: Sink, report: ImportReport
) -> None:
    step = as_step(values.get("export_step") if "export_step" in values else values.get("step"))
    if step is None:
        raise ValueError("no step")
    rank = int(values.get("rank") or 0)
    name = f"{rank}.{values.get('export_sequence_idx', codes.next('unnamed', step))}"
    rollout = codes.code("rollout", step, name)
    columns = {ours: values[theirs] for ours, theirs in _COLUMNS.items() if theirs in values}
    rows = sequence_rows(columns | {"step": step, "rank": rank, "rollout": rollout})
    rows = rows.assign(kept=True, minibatch=values.get("micro_step", 0))
    report.mapped |= {ours: theirs for ours, theirs in _COLUMNS.items() if theirs in values}
    if "is_masked" in values:
        report.note(_CLIP_NOTE)
    sink.add_tokens(rows)
    rewards = [r for r in values.get("rewards") or [] if as_number(r) is not None]
    if rewards:
        sink.add_rollout(
            {"step": step, "rank": rank, "rollout": rollout, "reward": rewards[-1],
             "length": len(rows)}
        )  # fmt: skip
    for key in values.keys() - _RECOMPUTED - set(_COLUMNS.values()):
        report.unknown_keys[key] += 1


def _read_metrics(file: Path, sink: Sink, report: ImportReport) -> None:
    """Metric rows; several a step, one or more per producer."""
    report.trainer = "prime-rl"
    for number, values in json_records(file, report):
        if values.get("step") is None:
            report.counts["metric rows without a step left out"] += 1
            continue
        producer = values.get("producer", "trainer")
        named = {
            # Every producer times its own step; the trainer's is the step's.
            (f"{producer}/{key}" if key.startswith("time/") and producer != "trainer" else key): v
            for key, v in values.items()
            if key not in ("time", "producer")
        }
        with report.record(file, number):
            sink.add_log(named, "prime-rl", (file, number))


def read_traces(files: list[Path], sink: Sink, report: ImportReport) -> None:
    """Read episodes and annotations; tokens come from branches that the trainer annotated.

    ``files``: ``stream.jsonl`` and ``annotations/<producer>.jsonl``, or folders of numbered parts;
    indexes among them are left out, they repeat the streams.
    """
    streams = [file for file in files if ".index." not in file.name and "live" not in file.parts]
    notes = _Annotations()
    for file in streams:
        if "annotations" in file.parts:
            notes.add(file, report)
    reader = _TraceReader(sink, report, notes)
    for file in streams:
        if "annotations" not in file.parts:
            for number, episode in json_records(file, report):
                with report.record(file, number):
                    reader.episode(episode)


@dataclass
class _Annotations:
    """Places of the updates of every trace, in the order they were written."""

    _places: dict[str, list[tuple[Path, int, int]]] = field(
        default_factory=lambda: defaultdict(list)
    )

    def add(self, file: Path, report: ImportReport) -> None:
        log = JsonLines(file)
        for record in log.records():
            trace = record.values.get("trace_id")
            if isinstance(trace, str):
                self._places[trace].append((file, record.number, record.start))
            else:
                report.bad_line(file, record.number, "no trace_id")
        report.close_lines(log, log.tail()[1])

    def of(self, trace: str) -> Iterator[tuple[tuple[Path, int], dict[str, Any]]]:
        for file, number, start in self._places.get(trace, ()):
            yield (file, number), JsonLines(file).at(start)


@dataclass
class _TraceReader:
    """Turns episodes into rollouts and token rows."""

    sink: Sink
    report: ImportReport
    notes: _Annotations
    _codes: Codes = field(default_factory=Codes)

    def episode(self, episode: Mapping[str, Any]) -> None:
        """Take one episode: every trace in it that was trained on."""
        group = episode.get("group")
        name = group.get("id") if isinstance(group, dict) else group
        for trace in episode.get("traces") or [episode]:
            if isinstance(trace, dict):
                self._trace(trace, name)

    def _trace(self, trace: dict[str, Any], group: Any) -> None:
        info, branches = self._folded(trace)
        trained = info.get("train")
        step = as_step(trained.get("trained_at_step")) if isinstance(trained, dict) else None
        if step is None:
            self.report.counts["traces that were not trained on left out"] += 1
            return
        rollout = self._codes.code("rollout", step, str(trace.get("id")))
        code = self._codes.code("group", step, None if group is None else str(group))
        nodes = [node for node in trace.get("nodes") or [] if isinstance(node, dict)]
        keys = {"step": step, "rollout": rollout, "group": code}
        length = self._branches(nodes, branches, keys, info)
        self._rollout(trace, nodes, keys, info, length)

    def _folded(self, trace: Mapping[str, Any]) -> tuple[dict[str, Any], dict[int, dict[str, Any]]]:
        """Information and streams per branch, updates in write order, the newest wins."""
        given = trace.get("info")
        info = dict(given) if isinstance(given, dict) else {}
        branches: dict[int, dict[str, Any]] = defaultdict(dict)
        for (file, number), update in self.notes.of(str(trace.get("id"))):
            with self.report.record(file, number):
                for key, value in (update.get("info") or {}).items():
                    old = info.get(key)
                    both = isinstance(old, dict) and isinstance(value, dict)
                    info[key] = {**old, **value} if both else value  # type: ignore[dict-item]
            with self.report.record(file, number):
                for branch in update.get("branches") or []:
                    streams = {k: v for k, v in branch.items() if k != "index"}
                    branches[int(branch.get("index", 0))].update(streams)
                    for key in streams.keys() - set(_STREAMS.values()):
                        self.report.unknown_keys[key] += 1
        return info, branches

    def _branches(
        self,
        nodes: list[dict[str, Any]],
        branches: Mapping[int, dict[str, Any]],
        keys: Mapping[str, Any],
        info: Mapping[str, Any],
    ) -> int:
        """Token rows of the annotated branches; returns the number of sampled tokens."""
        length = 0
        for index, path in enumerate(_paths(nodes)):
            tokens = _along(path)
            length = max(length, sum(tokens["loss_mask"]))
            streams = branches.get(index, {})
            if "trainer_logprobs" not in streams:
                continue
            for ours, theirs in _STREAMS.items():
                if isinstance(streams.get(theirs), list):
                    tokens[ours] = _padded(streams[theirs], len(tokens["token_id"]))
                    self.report.mapped[ours] = theirs
            if "advantage" not in tokens:
                tokens["advantage"] = [info.get("advantage")] * len(tokens["token_id"])
            # A position without a trainer log-probability was not trained on.
            known = [value is not None for value in tokens["logp"]]
            tokens["loss_mask"] = [a and b for a, b in zip(tokens["loss_mask"], known, strict=True)]
            self.sink.add_tokens(sequence_rows(tokens | dict(keys)).assign(kept=True))
        return length

    def _rollout(
        self,
        trace: Mapping[str, Any],
        nodes: list[dict[str, Any]],
        keys: Mapping[str, Any],
        info: Mapping[str, Any],
        length: int,
    ) -> None:
        rewards = [r for r in (trace.get("rewards") or {}).values() if isinstance(r, dict)]
        if not rewards:
            return
        first = next((i for i, node in enumerate(nodes) if any(node.get("mask") or ())), len(nodes))
        calls = [c for c in trace.get("calls") or [] if isinstance(c, dict)]
        self.sink.add_rollout(
            {
                **keys,
                "prompt": _text(nodes[:first]),
                "completion": _text(nodes[first:]),
                "reward": sum(_score(reward) for reward in rewards),
                "advantage": as_number(info.get("advantage")),
                "length": length or None,
                "finish_reason": calls[-1].get("finish_reason") if calls else None,
            }
        )


def _score(reward: Mapping[str, Any]) -> float:
    weight = as_number(reward.get("weight"))
    return (as_number(reward.get("score")) or 0.0) * (1.0 if weight is None else weight)


def _text(nodes: list[dict[str, Any]]) -> str:
    texts = [message_text((node.get("message") or {}).get("content")) for node in nodes]
    return "\n".join(text for text in texts if text)


def _paths(nodes: list[dict[str, Any]]) -> list[list[dict[str, Any]]]:
    """Nodes from root to leaf, one path per leaf in leaf order; a path is what is trained on."""
    parents = {node.get("parent") for node in nodes}
    paths = []
    for leaf in (place for place in range(len(nodes)) if place not in parents):
        places: list[int] = []
        place: Any = leaf
        while isinstance(place, int) and 0 <= place < len(nodes) and place not in places:
            places.append(place)
            place = nodes[place].get("parent")
        paths.append([nodes[at] for at in reversed(places)])
    return paths


def _along(path: list[dict[str, Any]]) -> dict[str, list[Any]]:
    """Token ids, mask of the sampled ones and behaviour log-probabilities along a path."""
    ids: list[Any] = []
    mask: list[bool] = []
    old: list[Any] = []
    for node in path:
        mine = list(node.get("token_ids") or [])
        sampled = _padded([bool(m) for m in node.get("mask") or []], len(mine), False)
        given = iter(node.get("logprobs") or [])
        ids += mine
        mask += sampled
        old += [next(given, None) if is_sampled else None for is_sampled in sampled]
    return {"token_id": ids, "loss_mask": mask, "logp_old": old}


def _padded(values: list[Any], length: int, fill: Any = None) -> list[Any]:
    return [*values[:length], *[fill] * (length - len(values))]
