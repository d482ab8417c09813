"""What vectors tell without labels, and the choice of a layer; knows no model."""
