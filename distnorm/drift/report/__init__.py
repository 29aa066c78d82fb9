"""The report: one page that shows a run's drift, and figures for papers."""
