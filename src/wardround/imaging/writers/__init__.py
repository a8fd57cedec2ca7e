"""Files for a clinic."""
