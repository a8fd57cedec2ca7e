"""From raw data and files to images, and back: acquisitions, readers, writers, data sets, phantoms."""
