"""Attacks a site's own updates and model, at the site: lint, gradient inversion, membership, properties, epsilon."""
