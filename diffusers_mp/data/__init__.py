"""Images, their encoding by an autoencoder, and the data set of latents that comes of it."""
