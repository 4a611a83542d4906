"""Short scripts in the manner of learn2learn's, each as a user of it writes them and batched.

``python -m fastmaml.examples.few_shot``, ``sine``, ``protonet``, ``hypergradient``; ``--help`` says
what each does.
"""
