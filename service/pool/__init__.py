"""One supervised engine process per device, and the streams that survive them."""
