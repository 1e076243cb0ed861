"""Reports: one HTML file about a run, or about several next to each other.

Where it fits: L3, and apart from the trainer: it reads what a run wrote (`run`). In: a run
directory, of a run that has ended or still goes on. Out: `write_report` puts report.html beside the
log, `write_comparison` one file where it is told to. A file is complete in itself: pictures are
embedded (`plots`, `page`), nothing is fetched from anywhere. A series that no run logged leaves its
plot out.
"""

from megatron_drpo.report.comparison import write_comparison
from megatron_drpo.report.single import write_report

__all__ = ["write_comparison", "write_report"]
