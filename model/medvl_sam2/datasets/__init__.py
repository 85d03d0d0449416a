"""Public data sets in their own folder layouts, one manifest for all of them, and a stream of their cases."""
