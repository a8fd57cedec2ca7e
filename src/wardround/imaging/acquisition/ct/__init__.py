"""CT: projectors, scanners, noise and filtered back projection."""
