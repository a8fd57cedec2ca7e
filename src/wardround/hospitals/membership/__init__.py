"""How a hospital joins: kits, the list of sites it is put on, and whether a site is fit to take part."""
