"""What faces people and other programs: metrics, and the fleet as a table."""
