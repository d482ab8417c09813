"""The pilot of each layer: the mixed perplexity of a small kNN-LM whose keys and queries are a sample of text.

Its mechanism is that of an evaluation: k, T and lambda are fitted on half of the clusters of text and measured on the
other half, both ways. A query's keys are the sampled ones of other clusters.

Legend: Q queries, M sampled vectors, D dimension.
"""

from __future__ import annotations

from functools import partial

import numpy as np
import torch

from knnlm.evaluation.outcomes import cross_fit, cross_fitted_losses, exp_or_inf
from knnlm.evaluation.parts import Parts, split_parts
from knnlm.evaluation.queries import LEAST_TOKENS, Floats
from knnlm.knn.mixing import Search
from knnlm.model.lm import LanguageModel
from knnlm.scores.pilot import MeasurePilot, Pilot, no_pilot
from knnlm.scores.sample import Sample
from knnlm.scores.sample_search import SampleSearch, query_rows


def pilots_of(lm: LanguageModel, head: Sample, *, seed: int) -> MeasurePilot:
    """Return the function that measures a layer's pilot.

    :param head: the sample's `final_norm` vectors, from which the model's own probabilities are computed.
    :param seed: that of the layers' `SampleSearch`.
    """
    rows_Q = query_rows(head.cluster_M, seed=seed)
    parts = split_parts(head.cluster_M[rows_Q])
    if min(parts.tuning_Q.sum(), parts.fitting_Q.sum()) < LEAST_TOKENS or len(np.unique(head.cluster_M)) < 2:
        return no_pilot
    final_QD = torch.from_numpy(head.vectors_MD[rows_Q]).to(lm.dtype)
    lm_Q = lm.target_log_probs(final_QD, torch.from_numpy(head.next_token_M[rows_Q])).numpy()
    return partial(measure_pilot, lm_Q=lm_Q, parts=parts)


def measure_pilot(search: SampleSearch, *, lm_Q: Floats, parts: Parts) -> Pilot:
    """Return the pilot of one layer.

    :param lm_Q: the plain LM's log-probability of each query's next token.
    """
    found = Search(search.distances_QK, search.hits_QK)
    both = parts.tuning_Q | parts.fitting_Q
    losses_Q = cross_fitted_losses(*cross_fit(found, lm_Q, parts), parts)[both]
    return Pilot(exp_or_inf(float(losses_Q.mean())), losses_Q, parts.clusters_Q[both])
