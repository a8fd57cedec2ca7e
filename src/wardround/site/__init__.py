"""A site: the only opener of its data, stores, ledger and keys."""
