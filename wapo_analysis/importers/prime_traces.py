"""prime-rl's trace stream with its annotations: episodes joined with what was learned later."""

from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from wapo_analysis.importers.jsonl import JsonLines
from wapo_analysis.importers.readers import json_records, message_text
from wapo_analysis.importers.report import ImportReport
from wapo_analysis.importers.sequences import Codes, sequence_rows
from wapo_analysis.importers.sink import Sink, as_number, as_step

_STREAMS = {"advantage": "advantages", "logp": "trainer_logprobs", "entropy": "entropies",
            "clipped": "is_masked"}  # fmt: skip


def read_traces(files: list[Path], sink: Sink, report: ImportReport) -> None:
    """Read episodes and annotations; tokens come from branches that the trainer annotated.

    Parameters
    ----------
    files : list of Path
        ``stream.jsonl`` and ``annotations/<producer>.jsonl``, or folders of numbered parts;
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
            for _, episode in json_records(file, report):
                reader.episode(episode)


@dataclass
class _Annotations:
    """Places of the updates of every trace, in the order they were written."""

    _places: dict[str, list[tuple[Path, int]]] = field(default_factory=lambda: defaultdict(list))

    def add(self, file: Path, report: ImportReport) -> None:
        log = JsonLines(file)
        for record in log.records():
            trace = record.values.get("trace_id")
            if isinstance(trace, str):
                self._places[trace].append((file, record.start))
            else:
                report.bad_line(file, record.number, "no trace_id")
        report.close_lines(log, log.tail()[1])

    def of(self, trace: str) -> Iterator[dict[str, Any]]:
        for file, start in self._places.get(trace, ()):
            yield JsonLines(file).at(start)


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
        info = dict(trace.get("info") or {})
        branches: dict[int, dict[str, Any]] = defaultdict(dict)
        for update in self.notes.of(str(trace.get("id"))):
            for key, value in (update.get("info") or {}).items():
                old = info.get(key)
                both = isinstance(old, dict) and isinstance(value, dict)
                info[key] = {**old, **value} if both else value  # type: ignore[dict-item]
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
