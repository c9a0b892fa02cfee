"""What prepare.py, train.py and sample.py share, one plain idea to a module."""
