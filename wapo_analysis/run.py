"""A run with what can be done with it: the object that ``import wapo_analysis`` hands out.

Reading lives in :mod:`wapo_analysis.store`, which knows nothing of diagnoses, figures and pages.
This module stands above all of them and only opens their doors.

>>> import wapo_analysis
>>> run = wapo_analysis.open_run("runs/demo/grpo-0")  # doctest: +SKIP
>>> run.diagnose()  # doctest: +SKIP
>>> run.plot("entropy")  # doctest: +SKIP
>>> run.report("report.html")  # doctest: +SKIP
"""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from wapo_analysis import store

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from wapo_analysis.diagnose import Diagnosis


@dataclass(frozen=True, repr=False)
class Run(store.Run):
    """A run opened for reading (see :class:`wapo_analysis.store.Run`), and its doors."""

    def diagnose(self) -> "Diagnosis":
        """Verdict, since when, which class drives it, what to do; see ``diagnose``.

        Raises
        ------
        UserError
            If a file of the run is broken; the message names it.
        """
        from wapo_analysis.diagnose import diagnose

        return diagnose(self)

    def plot(self, name: str) -> "Figure":
        """Draw a figure of this run, such as ``"entropy"``; ``wapo figures --list`` names them.

        Raises
        ------
        UserError
            If there is no figure of that name, or the run cannot feed it.
        """
        from wapo_analysis.plots import render

        return render(name, [self])

    def report(self, out: str | Path | None = None) -> Path:
        """Write one self-contained HTML page about this run; by default into its folder.

        Returns
        -------
        Path
            The file.

        Raises
        ------
        UserError
            If the run is broken or the file cannot be written.
        """
        from wapo_analysis.report import build_report

        target = self.path / "report.html" if out is None else Path(out)
        build_report([self], target)
        return target


def open_run(path: str | Path) -> Run:
    """Open a run folder for reading, finished or still being written.

    Raises
    ------
    UserError
        If it is no run, is broken, or has another schema version.
    """
    found = store.open_run(path)
    return Run(found.path, found.manifest)
