"""`bt-fast curate`: near duplicates, outliers, clusters and subsets, by an encoder's features."""
