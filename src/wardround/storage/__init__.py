"""What parties keep on disk: journal, site store, hash log, cipher."""
