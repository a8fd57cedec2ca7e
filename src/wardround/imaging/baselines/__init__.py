"""Classical methods that networks are compared with, one a file. None imports torch before it is used."""
