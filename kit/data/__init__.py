"""From documents to the rows of a step: corpora, tokenizers, .bin files, batches, readers."""
