"""Retrieval: from a query to its neighbours, p_kNN and the mixture with the LM."""
