"""The HTTP worker: class names in, the weights of a classifier head out.

Read in this order: `app` (what runs when), `routes` (the HTTP contract), `engine` (admission, draining),
`batch_runner` (one denoiser call after the other), `problems` (every error a client can see).
"""
