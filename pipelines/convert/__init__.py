"""`bt-convert`: converts images in any layout to a `.beton` or web shards."""
