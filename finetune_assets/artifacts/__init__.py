"""What is published: the kinds of artifacts, what each must be, its files, and which adapter is the champion."""
