"""Features, distances and scores of image sets."""
