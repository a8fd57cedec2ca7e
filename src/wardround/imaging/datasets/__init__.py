"""What a site's folders hold, as examples and patients."""
