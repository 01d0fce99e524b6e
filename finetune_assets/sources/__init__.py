"""Sources of raw data and base models: the package, local files, S3, the Hugging Face Hub."""
