"""Reading what other tools wrote: logs of every trainer in use, completions, tokens, tables.

Every source becomes a normal run folder that all commands read. Sources are only read; the run
appears under its name once it is whole.
"""

from wapo_analysis.importers.detect import FORMATS, Found, detect
from wapo_analysis.importers.follow import SourceTail, account, open_source
from wapo_analysis.importers.jsonl import JsonLines, Line, Record
from wapo_analysis.importers.mapping import parse_mapping
from wapo_analysis.importers.report import ImportReport
from wapo_analysis.importers.run import import_run

__all__ = [
    "FORMATS",
    "Found",
    "ImportReport",
    "JsonLines",
    "Line",
    "Record",
    "SourceTail",
    "account",
    "detect",
    "import_run",
    "open_source",
    "parse_mapping",
]
