"""What a run across slow links gave: its figures, what bounds them, tables and pictures."""

from .occupancy import Occupancy, Reading, occupancies
from .run import Run

__all__ = ["Occupancy", "Reading", "Run", "occupancies"]
