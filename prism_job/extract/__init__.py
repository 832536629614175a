"""Work units -> shards: tokenise, model, capture, uploads. With estimate/ the only room that imports torch."""
