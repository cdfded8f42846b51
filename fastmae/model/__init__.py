"""The model: config, masking, positions, blocks, encoder, decoder, weights in files, pictures of its predictions."""
