"""A live terminal view of a run that is being written, and a webhook for its findings."""

from wapo_analysis.watch.live import Notifier, watch
from wapo_analysis.watch.view import render

__all__ = ["Notifier", "render", "watch"]
