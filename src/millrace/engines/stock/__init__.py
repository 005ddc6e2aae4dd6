"""Code shared by the adapters of stock engines, which do not check whether a call is safe in their current state."""
