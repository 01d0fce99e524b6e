"""What runs on the machine that trains: the job, its processes, how they start and are watched, what they report."""
