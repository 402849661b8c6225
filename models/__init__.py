"""Language models assembled from configs: sequence mixers, cells, blocks, and generation."""
