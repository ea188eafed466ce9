"""A model, an objective and a TrainConfig in, a folder with the trained model out, and an exact place to go on from."""
