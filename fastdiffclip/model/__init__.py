"""What is learnt: diffusion, stems, the shared encoder, decoders, text, the classifier. Knows nothing of files."""
