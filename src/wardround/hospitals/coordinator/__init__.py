"""A federation's coordinator: what waits for sites, and the studies that were submitted."""
