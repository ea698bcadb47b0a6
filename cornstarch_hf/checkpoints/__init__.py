"""Between a folder and a live model: what is written, in which order, what is verified, and the code that it carries."""
