"""What a terminal shows."""

import os
from typing import Any

from rich.console import Console


def shown(renderable: Any, width: int = 100) -> str:
    console = Console(width=width, record=True, file=open(os.devnull, "w"))  # noqa: SIM115
    console.print(renderable)
    text = console.export_text()
    console.file.close()
    return text
