"""Files of scans, read with bounds."""
