"""What a run says of itself: metrics, signs of life, time in collectives, traces."""
