"""From bytes of an image to the steps of a tile."""
