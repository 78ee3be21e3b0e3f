"""What `make_golden.py` builds the golden files from. Encodes lanes/1 by itself, from the specification alone."""
