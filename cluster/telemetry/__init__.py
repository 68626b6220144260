"""What a run says: the run folder and its metrics, the screen, plots and the report."""
