"""The papers' findings on small models that are trained here: pre-trained, fine-tuned, merged with paramdelta, scored."""
