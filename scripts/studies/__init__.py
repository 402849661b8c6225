"""Studies: small models trained on purpose, and what is seen in them."""
