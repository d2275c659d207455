"""What models are trained for, on an engine that every task shares."""
