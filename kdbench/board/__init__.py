"""From result files to leaderboards and plots; imports nothing of the runner."""
