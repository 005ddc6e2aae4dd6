"""Adapters that make environments and tools of other libraries' classes and servers."""
