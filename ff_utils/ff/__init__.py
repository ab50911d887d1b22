"""The Forward-Forward algorithm, in reading order: layers, negatives, network, local, recurrent.

`blocks` trains any other network block by block.
"""
