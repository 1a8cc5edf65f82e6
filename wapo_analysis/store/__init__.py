"""A run on disk: manifest, step log and Parquet parts; the only package that knows the layout.

A part is written atomically (temporary file, fsync, rename), so it is whole or absent. The step
log is appended and flushed; its last line may be half written and is then left out on reading.
"""

from wapo_analysis.store.files import MANIFEST, PART_TABLES, STEP_LOG, write_atomic
from wapo_analysis.store.manifest import Manifest, is_run, read_manifest
from wapo_analysis.store.needs import Need
from wapo_analysis.store.parquet import round_mantissa
from wapo_analysis.store.reader import Run, find_run, find_runs, open_run, run_folders
from wapo_analysis.store.writer import PartWriter, RunWriter

__all__ = [
    "MANIFEST",
    "PART_TABLES",
    "STEP_LOG",
    "Need",
    "Manifest",
    "Run",
    "PartWriter",
    "RunWriter",
    "find_run",
    "find_runs",
    "open_run",
    "is_run",
    "read_manifest",
    "round_mantissa",
    "run_folders",
    "write_atomic",
]
