"""One interface over every model that can be evaluated (base), the two sorts of models behind it (own, hf), and how one is loaded (load, trust)."""
