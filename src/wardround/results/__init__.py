"""One typed schema of everything a run writes, and what people read of it: tables, report, model card."""
