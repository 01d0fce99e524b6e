"""Your own assets, checks, jobs and sensors; see README.md in this folder."""
