"""Label-free scores of vectors, and the choice of a layer. Knows no model."""
