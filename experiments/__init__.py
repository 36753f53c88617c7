"""The papers' findings on small models trained here: pre-trained, fine-tuned, merged with paramdelta, scored."""
