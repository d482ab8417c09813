"""Published perplexities on WikiText-103, measured again by the protocol that they were published under."""
