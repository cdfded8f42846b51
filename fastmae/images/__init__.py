"""What an image file holds: listed, decoded, resized, encoded again."""
