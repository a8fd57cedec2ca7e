"""A federation of real institutions: who is in it, what a hospital allows, and what carries messages between them."""
