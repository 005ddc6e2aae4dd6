"""`millrace sidecar`: a small server on a host of engines, which brings weights there when a trainer asks."""
