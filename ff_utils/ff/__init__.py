"""The Forward-Forward algorithm, in reading order: layers, negatives, network, local, recurrent."""
