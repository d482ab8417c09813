"""Does dispersion go with perplexity, segment by segment? (`knnlm correlate`)"""
