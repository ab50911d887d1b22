"""Forward-Forward in PyTorch, trained and weighed against backpropagation.

Modules, each importing only those before it: checks, paths, files, progress,
datasets, pairs, layers, networks, training, language, memory, results, reference, figures, readme,
pipeline, points, sweep.
"""
