"""From a run folder to report.json and a self-contained report.html."""
