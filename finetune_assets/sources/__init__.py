"""Where raw data and base models come from: the package, local files, S3, the Hugging Face Hub."""
