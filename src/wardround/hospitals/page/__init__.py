"""The coordinator's live web page: what `status.json` and the runs' files say, behind a password. No patient data."""
