"""Forward-Forward in PyTorch, trained and weighed against backpropagation.

Modules, each importing only those before it: checks, paths, datasets, pairs,
layers, networks, training, memory, results, figures, pipeline.
"""
