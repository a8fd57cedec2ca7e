"""Results on disk -> one self-contained page and a model card."""

from wardround.report.card import write_card
from wardround.report.html import write_report

__all__ = ["write_card", "write_report"]
