"""Programs over the packages: what people run, benches, checks and studies."""
