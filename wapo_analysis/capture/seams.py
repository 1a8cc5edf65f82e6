"""How each trainer calls its policy loss: which argument holds what, as data.

Read in the public sources; docs/watch_your_trainer.md names repository, file and commit of each.
"""

import inspect
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor, nn

from wapo_analysis.errors import UserError, unknown_name

Call = Mapping[str, Any]
#: An argument's name, followed by attributes, keys or indices (``inputs.trainer_logprobs``), or a
#: function of all arguments by name.
Where = str | Callable[[Call], Any] | None


@dataclass(frozen=True, kw_only=True)
class Names:
    """Where a loss finds its quantities.

    P is the shape of the log-probabilities: padded (B, T), packed (M,), the one completion of the
    call (M,), or a list of such completions.
    """

    #: Shape P: log-probabilities, on the autograd graph.
    logp: Where
    #: Shape P or (B,).
    advantages: Where
    #: Shape P: non-zero on the tokens of the loss; None where the loss sees no others.
    mask: Where = None
    #: Shape P: what the loss's ratio is to.
    logp_old: Where = None
    #: Shape P: what the sampler reported, where that is something else.
    sampler: Where = None
    #: As in `wapo_analysis.Recorder.watch`. Without ``logits`` and ``collision`` the model's own
    #: logits are read where they are made.
    tokens: Where = None
    groups: Where = None
    rollouts: Where = None
    cu_seqlens: Where = None
    logits: Where = None
    entropy: Where = None
    collision: Where = None
    #: Shape P: what the loss multiplies its tokens with: 0 leaves one out of the loss.
    weights: Where = None
    #: What the trainer multiplies the loss by, so that averaged gradients are summed ones.
    loss_scale: Where = None
    #: A function that the loss calls for its log-probabilities, by its name in the loss's module or
    #: as ``self.name``; what it returns is then the argument ``scored``.
    scorer: str | None = None

    @classmethod
    def of(cls, names: "str | Mapping[str, Any] | Names") -> "Names":
        """Names of a row of `SEAMS`, of a mapping (with ``like`` a changed row), or themselves.

        Raises UserError if there is no such row or quantity.
        """
        if isinstance(names, Names):
            return names
        if isinstance(names, str):
            if names not in SEAMS:
                raise unknown_name("trainer", names, SEAMS)
            return SEAMS[names]
        given, known = dict(names), [field.name for field in fields(cls)]
        like = given.pop("like", None)
        for name in given:
            if name not in known:
                raise unknown_name("quantity", name, known)
        if like is not None:
            return replace(cls.of(like), **given)
        if not {"logp", "advantages"} <= given.keys():
            raise UserError("names must say where logp and advantages are, or like which trainer")
        return cls(**given)

    def find(self, call: Call) -> dict[str, Any]:
        """Every quantity that a call of the loss holds.

        Raises UserError if log-probabilities or advantages are not where they should be.
        """
        places = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "scorer"}
        found = {name: look_up(where, call) for name, where in places.items()}
        for name in ("logp", "advantages"):
            if found[name] is None:
                raise UserError(
                    f"the loss was called without {name}, which should be at {places[name]!r}; its "
                    f"arguments were {', '.join(call)}"
                )
        return {name: value for name, value in found.items() if value is not None}


def signature_of(loss: Callable[..., Any]) -> inspect.Signature:
    """Names of a loss's arguments. Raises UserError if it does not tell them."""
    try:
        return inspect.signature(loss.forward if isinstance(loss, nn.Module) else loss)
    except (TypeError, ValueError) as error:
        raise UserError(
            f"the arguments of {loss!r} have no names to be read; wrap it in a Python function"
        ) from error


def look_up(where: Where, call: Call) -> Any:
    """Follow a path into the arguments of a call; None where it ends early.

    Examples
    --------
    >>> look_up("batch.lengths.1", {"batch": {"lengths": [4, 7]}})
    7
    """
    if not isinstance(where, str):
        return None if where is None else where(call)
    value: Any = call
    for part in where.split("."):
        if value is None:
            return None
        if part.isdigit():
            value = value[int(part)]
        elif hasattr(value, "keys"):
            value = value[part] if part in value else None
        else:
            value = getattr(value, part, None)
    return value


def _after_first(path: str) -> Callable[[Call], Tensor]:
    """Columns from the second on: what belongs to the L - 1 tokens that are predicted."""

    def columns(call: Call) -> Any:
        found = look_up(path, call)
        return None if found is None else found[:, 1:]

    return columns


def _nemo_mask(call: Call) -> Tensor:
    data = call["data"]
    mask: Tensor = data["token_mask"][:, 1:] * data["sample_mask"][:, None]
    return mask


def _areal_tokens(call: Call) -> Tensor | None:
    ids = call["input_data"].get("input_ids")
    fits = isinstance(ids, Tensor) and ids.numel() == call["logprobs"].numel()
    return ids.reshape(call["logprobs"].shape).roll(-1, -1) if fits else None


def _slime_tokens(call: Call) -> list[Tensor]:
    pairs = zip(call["batch"]["unconcat_tokens"], call["scored"][1]["log_probs"], strict=True)
    return [ids[len(ids) - len(logp) :] for ids, logp in pairs]


def _slime_logits(call: Call) -> list[Tensor] | None:
    """Logits of each completion; None where a process has but a part of them."""
    batch, logits = call["batch"], call["logits"][0]
    whole = sum(len(ids) for ids in batch["unconcat_tokens"])
    if _tensor_parallel() > 1 or not whole <= len(logits):
        return None
    found, end = [], 0
    for ids, count in zip(batch["unconcat_tokens"], batch["response_lengths"], strict=True):
        end += len(ids)
        found.append(logits[end - count - 1 : end - 1])
    return found


def _tensor_parallel() -> int:
    megatron = sys.modules.get("megatron.core.parallel_state")
    return 1 if megatron is None else int(megatron.get_tensor_model_parallel_world_size())


def _nemo_old(call: Call) -> Tensor | None:
    """What the ratio is to; without it in the data the loss takes its own log-probabilities."""
    own: Tensor = call["next_token_logprobs"].detach()
    found = _after_first("data.prev_logprobs")(call)
    return own if found is None else found


def _world_size(call: Call) -> int:
    return torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1


#: How each trainer calls its policy loss.
SEAMS: Mapping[str, Names] = {
    "verl": Names(
        logp="log_prob", logp_old="old_log_prob", advantages="advantages", mask="response_mask",
        weights="rollout_is_weights", loss_scale="config.global_batch_info.dp_size",
    ),
    "skyrl": Names(
        logp="log_probs", logp_old="old_log_probs", sampler="rollout_logprobs",
        advantages="advantages", mask="loss_mask", loss_scale=_world_size,
    ),
    "prime-rl": Names(
        logp="inputs.trainer_logprobs", logp_old="inputs.inference_logprobs",
        advantages="inputs.advantages", mask="inputs.loss_mask",
    ),
    "slime": Names(
        scorer="get_log_probs_and_entropy", logp="scored.1.log_probs", entropy="scored.1.entropy",
        logp_old="batch.log_probs", sampler="batch.rollout_log_probs",
        advantages="batch.advantages", mask="batch.loss_masks", tokens=_slime_tokens,
        logits=_slime_logits,
    ),
    "nemo-rl": Names(
        logp="next_token_logprobs", logp_old=_nemo_old,
        sampler=_after_first("data.generation_logprobs"),
        advantages=_after_first("data.advantages"), mask=_nemo_mask,
        tokens=_after_first("data.input_ids"),
    ),
    "areal": Names(
        logp="logprobs", logp_old="input_data.prox_logp", sampler="input_data.logprobs",
        advantages="input_data.advantages", mask="input_data.loss_mask", entropy="entropy",
        cu_seqlens="input_data.cu_seqlens", tokens=_areal_tokens, loss_scale=_world_size,
    ),
    "openrlhf": Names(
        logp="log_probs", logp_old="old_log_probs", sampler="rollout_log_probs",
        advantages="advantages", mask="action_mask", loss_scale="dp_size",
    ),
    "ms-swift": Names(
        scorer="self._get_per_token_logps_and_entropies", logp="scored.0", entropy="scored.1",
        logp_old="grpo_batch.old_per_token_logps", sampler="grpo_batch.rollout_per_token_logps",
        advantages="grpo_batch.advantages", mask="grpo_batch.completion_mask",
    ),
    "open-instruct": Names(
        logp="new_logprobs", advantages="advantages", weights="rho_weights",
        logp_old=lambda call: call["new_logprobs"].detach() - call["ratio"].detach().log(),
        mask=lambda call: call["new_logprobs"].detach() != 1.0,  # its mark of no response
    ),
}  # fmt: skip


def shaped(found: Mapping[str, Any]) -> dict[str, Any]:
    """What `Names.find` found of one pass, as `Recorder.watch` names and shapes it."""
    given = dict(found)
    logp, advantages = given["logp"], given["advantages"]
    mask, weights = given.get("mask"), given.pop("weights", None)
    whole = torch.ones_like(logp, dtype=torch.bool)
    given["mask"] = whole if mask is None else mask.to(logp.device)
    sampler = given.pop("sampler", None)
    if sampler is not None:
        given["logp_prox"], given["logp_old"] = given.get("logp_old"), sampler
    if advantages.shape == (len(logp), 1):
        given["advantages"] = advantages[:, 0]
    if logp.dim() == 1 and not {"cu_seqlens", "rollouts"} & given.keys():
        given["cu_seqlens"] = torch.tensor([0, len(logp)])
    if weights is not None:
        given["kept"] = weights != 0
    given["loss_scale"] = float(given.get("loss_scale") or 1)
    return given
