"""Images in, quantisation scales out."""
