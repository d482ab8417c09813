"""From a query to its neighbours, to p_kNN, to the mixture."""
