"""The training engine: steps any task over any loader, loses nothing, knows nothing of Hydra or of images."""
