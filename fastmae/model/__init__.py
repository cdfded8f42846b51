"""The model: config, masks, positions, blocks, encoder, decoder, weights in and out of files, pictures of what it predicts."""
