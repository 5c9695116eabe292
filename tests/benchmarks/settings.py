"""What is measured: the sigmoid belief network of the quickstart, 200 units a layer, on digits."""

NUM_PARTICLES = (5, 50, 500)
BATCH_SIZE = 24
LEARNING_RATE = 3e-3
NUM_ROUNDS = 20
NUM_GRADIENT_DRAWS = 50
LAYER_1_SHAPE = (64, 1000)
"""[K, batch]: 64 particles for each of 1,000 images."""
MEMORY_PARTICLES = (1_000, 100_000)
MEMORY_CHUNK = 500
NUM_AUXILIARY = 10
"""Of OVIS by Monte Carlo."""
