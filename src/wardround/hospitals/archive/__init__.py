"""A site's images from an archive (PACS) that speaks DICOMweb: asked for, cleaned of identifiers, kept in a folder."""
