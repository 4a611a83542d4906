"""A GPU that is the host, on which PyTorch runs as on one: its allocator, streams, autograd threads
and CUDA graphs are its own. Triton's kernels are compiled as for a GPU and run by its interpreter,
those of ``csrc/cuda`` by their build for the host.

``PYTHONPATH=tests python -m gpu_on_host COMMAND ...`` runs a command there. It is slow, and shows
neither races between blocks nor how the hardware rounds, but all else of the GPU backend is as on a
GPU: what is launched on which stream, what a capture forbids, whose memory a graph reads.
Each stream runs as late as CUDA allows: a wait that is missing shows.
"""
