"""`bt-convert`: from images in any layout to a `.beton` or web shards."""
