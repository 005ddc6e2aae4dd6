"""Run by hand; README.md has the commands and what they printed."""
