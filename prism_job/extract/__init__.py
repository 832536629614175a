"""The only room where torch and transformers are imported: examples in, projected gradients out."""
