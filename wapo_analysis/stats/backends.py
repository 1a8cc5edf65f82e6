"""Which program reduces the rows."""

import os
from collections.abc import Callable
from importlib.util import find_spec

import torch
from torch import Tensor

from wapo_analysis.errors import UserError
from wapo_analysis.stats.eager import reduce_rows
from wapo_analysis.stats.formulas import Reduced

BACKENDS = ("auto", "eager", "compile", "triton")

Reducer = Callable[..., Reduced]


def reducer(backend: str, logits: Tensor) -> Reducer:
    """Program for these logits.

    Parameters
    ----------
    backend : str
        One of `BACKENDS`.
    logits : Tensor

    Returns
    -------
    callable
        ``(rows, targets, temperature, topk, chunk_rows) -> Reduced``.

    Raises
    ------
    UserError
        If the backend was asked for by name and cannot run here.
    """
    if backend == "compile":
        from wapo_analysis.stats.eager import reduce_compiled

        return reduce_compiled
    if backend == "triton" or (backend == "auto" and logits.is_cuda):
        obstacle = _no_triton(logits)
        if obstacle is None:
            from wapo_analysis.stats.triton_kernel import reduce_triton

            return reduce_triton
        if backend == "triton":
            raise UserError(f"backend 'triton' cannot run here: {obstacle}")
    return reduce_rows


def _no_triton(logits: Tensor) -> str | None:
    """Return what keeps the Triton kernel from running, None if nothing."""
    if find_spec("triton") is None:
        return "triton is not installed"
    if logits.dtype == torch.float64:
        return "float64 is reduced by 'eager'"
    if not logits.is_cuda and os.environ.get("TRITON_INTERPRET") != "1":
        return f"the logits are on {logits.device}, not on a CUDA device"
    return None
