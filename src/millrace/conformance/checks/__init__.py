"""The checks, grouped by subject."""
