"""What a rank keeps under ZeRO."""
