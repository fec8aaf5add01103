"""The matching real SGD. A run never sees a prediction: of ``theory`` only the vocabulary is imported here."""
