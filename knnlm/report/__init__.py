"""Reports of a run: `document` (report.json) and `html` (report.html). They see results only, never a model, a datastore or an index."""
