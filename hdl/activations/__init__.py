"""x and h: loaded, quantised, kept in lanes; the activation function."""
