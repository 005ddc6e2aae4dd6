"""`millrace sidecar`: a small server on a host of engines, which brings weights to it when a trainer asks."""
