"""What is measured: loss by document and by position, retrieval, states, and the intervals that figures are given with."""
