"""Active learning: which image an annotator gets next."""
