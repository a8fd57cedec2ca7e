"""Identifiers in a site's files: finding them, and taking them out of DICOM."""
