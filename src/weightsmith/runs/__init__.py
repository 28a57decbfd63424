"""What every run directory needs: atomic files, append-only ledgers, locks, seeds, progress, memory and
machine facts.

Nothing here imports anything heavier than the standard library.
"""

from weightsmith.runs.atomic import append_line, read_json, read_lines, write_bytes, write_json, write_text
from weightsmith.runs.environment import environment, versions
from weightsmith.runs.locks import FolderLock
from weightsmith.runs.memory import peak_rss_bytes
from weightsmith.runs.prediction import Prediction
from weightsmith.runs.progress import SILENT, Progress
from weightsmith.runs.seeds import derive

__all__ = [
    "SILENT",
    "FolderLock",
    "Prediction",
    "Progress",
    "append_line",
    "derive",
    "environment",
    "peak_rss_bytes",
    "read_json",
    "read_lines",
    "versions",
    "write_bytes",
    "write_json",
    "write_text",
]
