"""The benchmark: cases, timing, peers and reports behind `flash-mla bench` and `flash-mla plot`."""
