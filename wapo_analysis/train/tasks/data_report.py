"""What became of the rows of a data file: used, repeated, skipped and why; and when to refuse."""

from dataclasses import dataclass
from typing import Any, Final

from wapo_analysis.errors import UserError

MAX_BAD_SHARE: Final = 0.05
"""Share of unusable rows above which a file is refused."""
_SHOWN: Final = 5
_RECORDED: Final = 100


class DataRefused(UserError):
    """Too much of a source is unusable; ``report`` says what.

    Parameters
    ----------
    message : str
    report : DataReport
    """

    def __init__(self, message: str, report: "DataReport") -> None:
        super().__init__(message)
        self.report = report


@dataclass(frozen=True)
class DataReport:
    """Account of one source of rows.

    Attributes
    ----------
    task, source, sha256 : str
    rows : int
        Rows found, usable or not.
    skipped : tuple of str
        Every unusable row, as ``"line 4: no 'question'"``.
    repeated : tuple of str
        Every row that says again what an earlier one says, used once.
    """

    task: str
    source: str
    sha256: str
    rows: int
    skipped: tuple[str, ...] = ()
    repeated: tuple[str, ...] = ()

    @property
    def used(self) -> int:
        """Rows that became problems."""
        return self.rows - len(self.skipped) - len(self.repeated)

    def check(self, fields: str = "") -> None:
        """Refuse a source that is mostly not what it should be.

        Parameters
        ----------
        fields : str
            Fields that the rows do have, for the message.

        Raises
        ------
        DataRefused
            If no row can be used, or more than 5 % of the rows cannot.
        """
        if self.used and len(self.skipped) <= MAX_BAD_SHARE * self.rows:
            return
        found = f" (fields found: {fields})" if fields else ""
        raise DataRefused(
            f"{self.task}: {len(self.skipped)} of {self.rows} rows of {self.source} cannot be "
            f"used, more than {MAX_BAD_SHARE:.0%}: {_shown(self.skipped)}{found}",
            self,
        )

    def to_line(self) -> str:
        """One line on what was left out, empty if nothing was."""
        parts = []
        if self.skipped:
            parts.append(
                f"{len(self.skipped)} of {self.rows} rows of {self.source} skipped: "
                + _shown(self.skipped)
            )
        if self.repeated:
            many = f"{len(self.repeated)} repeated row{'s' if len(self.repeated) > 1 else ''}"
            parts.append(f"{many} of {self.source} left out: {_shown(self.repeated)}")
        return f"{self.task}: {'; and '.join(parts)}" if parts else ""

    def to_dict(self) -> dict[str, Any]:
        """Plain values for the manifest; the first hundred rows left out are named."""
        return {
            "file": self.source,
            "sha256": self.sha256,
            "rows": self.rows,
            "used": self.used,
            "skipped_rows": len(self.skipped),
            "skipped": list(self.skipped[:_RECORDED]),
            "repeated_rows": len(self.repeated),
            "repeated": list(self.repeated[:_RECORDED]),
        }


def _shown(named: tuple[str, ...]) -> str:
    more = len(named) - _SHOWN
    return ", ".join(named[:_SHOWN]) + (f" and {more} more" if more > 0 else "")
