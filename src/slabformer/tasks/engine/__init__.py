"""What every task's training shares: the loop, checkpoints, logs, signals and the guard against NaN."""
