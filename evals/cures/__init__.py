"""Cures of state collapse that need no training, and the hooks they act by."""
