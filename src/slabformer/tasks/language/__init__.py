"""Language models: the Trainer's callback, packed text, training, evaluation; transformers does the rest."""
