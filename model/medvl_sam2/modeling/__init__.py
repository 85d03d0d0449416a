"""Network modules: volume encoder, projector, language model, SAM2 over slices, and their composition."""
