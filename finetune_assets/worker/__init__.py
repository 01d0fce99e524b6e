"""Job execution on the training machine: job specification, worker processes, their startup and their reports."""
