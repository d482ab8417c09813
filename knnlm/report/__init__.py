"""Reports of a run: `document` (report.json) and `html` (report.html). They see results, never a model or an index."""
