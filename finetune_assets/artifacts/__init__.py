"""Published artifacts: their kinds, identities and files, and the champion records."""
