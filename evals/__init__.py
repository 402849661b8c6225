"""Evaluation of language models: perplexity by position, with carried state, beside count-based baselines."""
