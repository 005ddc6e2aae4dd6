"""What the adapters of stock engines have in common: neither engine asks what it may be asked in which state."""
