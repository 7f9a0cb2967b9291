"""What the bytes mean: names, dtypes, the safetensors layout, the typed tree and the manifest. No input or output."""
