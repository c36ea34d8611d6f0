"""FlashServe over HTTP: admission, media, worker pool and streams. Knows nothing of tensors; imports no torch."""
