"""Adapters that let other trainers generate on a Millrace fleet. Each needs the extra of the same name."""
