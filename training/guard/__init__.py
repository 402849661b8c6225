"""What keeps a run right when something fails: agreement of the ranks, bad steps, requests to stop."""
