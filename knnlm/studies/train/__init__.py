"""Training with a push-away loss. (`knnlm train`)"""
