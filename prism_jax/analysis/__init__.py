"""Looking at a finished run: diversity, figures, the summary and the report."""
