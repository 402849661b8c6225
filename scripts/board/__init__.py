"""The board: what each architecture is worth at equal tokens (docs/board)."""
