"""Other methods trained on the same cases for the same minutes, and scored by the same runner."""
