"""Servers as processes: started, watched and ended."""
